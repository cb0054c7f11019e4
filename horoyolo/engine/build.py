"""From a configuration to everything that the training loop uses."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from horoyolo.compression.build import build_compressor
from horoyolo.config import Comms, Config, Optim
from horoyolo.data.dataset import EvalDataset, TrainDataset
from horoyolo.data.loader import build_eval_loader, build_train_loader, choose_num_workers
from horoyolo.data.sampler import Sampler
from horoyolo.data.scan import Split
from horoyolo.distributed.comm import Comm, broadcast_tensors
from horoyolo.distributed.exact import ExactSum, convert_exact
from horoyolo.distributed.exchange import Compressor, Exchange
from horoyolo.distributed.syncbn import convert_sync_bn
from horoyolo.engine.checkpoint import save_checkpoint
from horoyolo.engine.device import Numerics
from horoyolo.engine.evaluate import evaluate
from horoyolo.engine.runs import Run
from horoyolo.engine.schedule import Schedule
from horoyolo.engine.state import Progress, TrainState
from horoyolo.files import atomic_file
from horoyolo.model.ema import EMA
from horoyolo.model.loss import DetectionLoss, scale_gains
from horoyolo.model.weights import load_matching, model_from_weights, read_weights, save_weights
from horoyolo.model.yolo import YOLO, load_layer_table, model_from_table

log = logging.getLogger("horoyolo")


@dataclass
class Training:
    """The parts of a run and what only they together can do."""

    config: Config
    comm: Comm
    numerics: Numerics
    run: Run
    model: YOLO
    loss: DetectionLoss
    ema: EMA[YOLO]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    exchange: Exchange
    schedule: Schedule
    sampler: Sampler
    loader: DataLoader
    val_split: Split
    val_loader: DataLoader
    progress: Progress
    state: TrainState

    @property
    def global_batch(self) -> int:
        """Images in the global batch that comes next."""
        return min(self.config.batch, self.sampler.num_samples - self.sampler.consumed)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Cells (height, width) of each layer's grid for training images."""
        return [(self.config.img // stride, self.config.img // stride) for stride in self.model.strides]

    def evaluate(self, model: YOLO) -> tuple[dict[str, Any], list[float]]:
        """Metrics and losses on the validation split, over all workers."""
        return evaluate(model, self.val_loader, self.val_split, self.numerics, self.comm, self.loss)

    def save_weights(self, model: YOLO, epoch: int, metrics: dict[str, Any] | None, is_best: bool) -> None:
        """Writes last.pt, best.pt and metrics.json on rank 0."""
        if self.comm.rank() != 0:
            return
        notes = {"epoch": epoch, "img": self.config.img, "metrics": metrics or {}}
        names = ["last", "best"] if is_best else ["last"]
        for name in names:
            save_weights(self.run.weights / f"{name}.pt", model, notes)
        if metrics is not None:
            path = self.run.folder / "metrics.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            with atomic_file(path, "w") as stream:
                json.dump(known | dict.fromkeys(names, metrics), stream, indent=1)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint on rank 0. A full disk stops no training: the file before stays good."""
        if self.comm.rank() != 0:
            return
        notes = {"epoch": self.sampler.epoch, "workers": self.comm.size()}
        try:
            save_checkpoint(self.run.checkpoints, state, self.progress.step, self.config.keep_checkpoints, notes)
        except OSError as error:
            log.error("checkpoint of step %d not written: %s; training goes on", self.progress.step, error)


def build_model_for(config: Config, num_classes: int, names: dict[int, str]) -> YOLO:
    """The model that ``--cfg`` and ``--weights`` ask for, on the CPU, initialised from the run's seed (InputError: unknown or unreadable)."""
    weights = read_weights(config.weights) if config.weights else None
    table = load_layer_table(config.cfg) if config.cfg else model_from_weights(config.weights)[0].table
    torch.manual_seed(config.seed)
    model = model_from_table(table, num_classes, names)
    if weights is not None:
        # As in YOLOv5, anchors come from --cfg where it is given.
        report = load_matching(model, weights.tensors, skip_anchors=bool(config.cfg))
        log.info("weights %s: %d of %d tensors taken", config.weights, report.loaded, report.total)
        for line in report.left_out:
            log.info("  left out: %s", line)
    return model


def build_training(config: Config, comm: Comm, numerics: Numerics, run: Run, model: YOLO, train_split: Split, val_split: Split) -> Training:
    """Places the parts in each other's reach, restores a resumed state, and gives all workers rank 0's weights."""
    sync_bn = config.comms.sync_bn
    if sync_bn:
        convert_sync_bn(model, comm)
    model = model.to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    sampler = Sampler(len(train_split), config.batch, config.seed)
    schedule = Schedule(config.hyp, config.optim, config.epochs, config.batch, sampler.global_batches_left())
    optimizer = build_optimizer(model, config.optim, config.hyp.lr0, config.hyp.momentum, schedule.weight_decay)
    scaler = torch.amp.GradScaler(numerics.device.type, enabled=numerics.dtype == torch.float16)
    ema = EMA(model, config.optim.ema_decay, config.optim.ema_tau)
    progress = Progress()
    state = TrainState(model=model, ema=ema, optimizer=optimizer, scaler=scaler, sampler=sampler, progress=progress)

    # Rank 0 alone reads the checkpoint: the others need not see its disk.
    resumed = comm.broadcast_object(run.resumed)
    if resumed is not None:
        state.load_state_dict(resumed)
        log.info("resumed at step %d, epoch %d", progress.step, sampler.epoch)
    broadcast_tensors([*model.state_dict().values(), *ema.model.state_dict().values()], comm)

    num_workers = choose_num_workers(config.workers, comm.local_size())
    pin_memory = numerics.device.type == "cuda"
    train_data = TrainDataset(train_split, config.img, config.hyp, config.seed)
    return Training(
        config=config,
        comm=comm,
        numerics=numerics,
        run=run,
        model=model.train(),
        loss=build_loss(config, model),
        ema=ema,
        optimizer=optimizer,
        scaler=scaler,
        exchange=build_exchange(model, config.comms, numerics, comm),
        schedule=schedule,
        sampler=sampler,
        loader=build_train_loader(train_data, sampler, comm, num_workers, pin_memory),
        val_split=val_split,
        val_loader=build_eval_loader(EvalDataset(val_split, config.img, max(model.strides)), config.batch, comm, num_workers, pin_memory),
        progress=progress,
        state=state,
    )


def build_exchange(model: YOLO, comms: Comms, numerics: Numerics, comm: Comm) -> Exchange:
    """What sums gradients over workers.

    With synchronised BatchNorm on CPUs in full precision nothing but the order of sums tells one number of workers from another: there sums are
    made exact, and losses and weights have the same bits at any number.
    """
    compressor: Compressor = build_compressor(comms)
    if comms.sync_bn and numerics.device.type == "cpu" and numerics.dtype == torch.float32 and comms.compression == "none":
        try:
            compressor = ExactSum(convert_exact(model))
        except ValueError as error:
            log.info("losses will differ a little between numbers of workers: %s", error)
    return Exchange(model.named_parameters(), compressor, comm, comms.bucket_mb, overlaps(comms, numerics))


def overlaps(comms: Comms, numerics: Numerics) -> bool:
    """Whether buckets leave while backward runs.

    Not beside a synchronised BatchNorm, whose small exchanges would queue behind them; and not on a CPU whose cores are all at work: there the
    network's share of them comes out of backward, and its threads disturb those that compute (README, Speed).
    """
    if comms.overlap != "auto":
        return comms.overlap == "yes"
    return numerics.device.type == "cuda" and not comms.sync_bn


def build_loss(config: Config, model: YOLO) -> DetectionLoss:
    """The loss with its gains scaled by layers, classes and image size, as YOLOv5's training does."""
    hyper = config.hyp
    box, obj, cls = scale_gains(hyper.box, hyper.obj, hyper.cls, len(model.strides), model.num_classes, config.img)
    return DetectionLoss(
        anchors=model.anchors,
        num_classes=model.num_classes,
        box=box,
        obj=obj,
        cls=cls,
        cls_pw=hyper.cls_pw,
        obj_pw=hyper.obj_pw,
        anchor_t=hyper.anchor_t,
        label_smoothing=hyper.label_smoothing,
        fl_gamma=hyper.fl_gamma,
    )


def build_optimizer(model: nn.Module, optim: Optim, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD or AdamW over three groups: weights, which decay; scales of normalisation layers and biases, which do not."""
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "norm": [], "bias": []}
    for name, param in model.named_parameters():
        if param.requires_grad:
            kind = "bias" if name.endswith("bias") else "norm" if param.ndim == 1 else "weight"
            groups[kind].append(param)
    decays = {"weight": weight_decay, "norm": 0.0, "bias": 0.0}
    options = [{"params": params, "kind": kind, "weight_decay": decays[kind]} for kind, params in groups.items() if params]
    # One fused pass over parameter, gradient and momentum: on a CPU several times the speed of the plain loop.
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=lr, betas=(momentum, 0.999), fused=True)
    return torch.optim.SGD(options, lr=lr, momentum=momentum, nesterov=True, fused=True)


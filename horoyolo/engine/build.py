"""From a configuration to everything that the training loop uses."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from horoyolo.compression.base import Compressor
from horoyolo.compression.build import build_compressor, describe_compression
from horoyolo.compression.dense import ExactSum
from horoyolo.compression.feedback import ErrorFeedback
from horoyolo.config import Comms, Config, InputError, frozen_layers
from horoyolo.data.build import build_eval_data, build_sampler, build_train_data, describe_input
from horoyolo.data.loader import build_eval_loader, build_train_loader, choose_num_workers
from horoyolo.data.sampler import Sampler
from horoyolo.data.scan import Split
from horoyolo.distributed.comm import Comm
from horoyolo.distributed.exact import convert_exact
from horoyolo.distributed.exchange import Exchange
from horoyolo.distributed.syncbn import convert_sync_bn
from horoyolo.elastic.member import Fixed, Member
from horoyolo.engine.background import Background, attempt
from horoyolo.engine.checkpoint import serialised, write_checkpoint, write_rank_state
from horoyolo.engine.commit import Commits
from horoyolo.engine.device import Numerics
from horoyolo.engine.evaluate import evaluate
from horoyolo.engine.hooks import StepRecord
from horoyolo.engine.ledger import Ledger
from horoyolo.engine.loss_scale import LossScale
from horoyolo.engine.optimizer import build_optimizer
from horoyolo.engine.recipe import class_counts, imbalance_notes
from horoyolo.engine.runs import Run
from horoyolo.engine.schedule import Schedule
from horoyolo.engine.state import Progress, Standing, TrainState
from horoyolo.engine.transfer import fingerprint
from horoyolo.engine.unreadable import Unreadable
from horoyolo.files import atomic_file
from horoyolo.model.ema import EMA
from horoyolo.model.loss import DetectionLoss, class_weights_from, scale_gains
from horoyolo.model.weights import load_matching, model_from_weights, read_weights, save_weights
from horoyolo.model.yolo import ACTIVATION_NAMES, YOLO, load_layer_table, model_from_table

log = logging.getLogger("horoyolo")

REMEMBERED = 256  # steps that every worker knows, which rank 0 may have died without writing


@dataclass
class Training:
    """The parts of a run and what only they together can do."""

    config: Config
    comm: Comm
    numerics: Numerics
    model: YOLO
    loss: DetectionLoss
    ema: EMA[YOLO]
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    compressor: Compressor
    exchange: Exchange
    schedule: Schedule
    sampler: Sampler
    loader: DataLoader
    train_split: Split
    val_split: Split
    val_loader: DataLoader
    progress: Progress
    state: TrainState
    standing: Standing
    member: Member | Fixed  # who may come and go
    data_hash: str  # of images, sizes and labels
    ledger: Ledger
    unreadable: Unreadable
    background: Background = field(default_factory=Background)
    commits: Commits = field(default_factory=Commits)
    saved_s: float = field(default_factory=time.monotonic)  # when the newest checkpoint was begun, or the run
    first_bad: str = ""  # the tensor that made this worker's newest update be left out
    recent: deque[StepRecord] = field(default_factory=partial(deque, maxlen=REMEMBERED))  # the last steps
    unwritten: dict[str, str] = field(default_factory=dict)  # what rank 0 began to write and has not, or could not: weights, checkpoint
    begun: bool = False  # whether workers have met: before, the state is that of a newcomer
    recalled: bool = False  # since workers met this process was replaced: the state is a copy, which may be old
    run: Run = field(init=False)  # known once workers have met

    @property
    def global_batch(self) -> int:
        """Images in the global batch that comes next."""
        return min(self.config.batch, self.sampler.num_samples - self.sampler.consumed)

    def grids(self, hw: Sequence[int]) -> list[tuple[int, int]]:
        """Cells (height, width) of each layer's grid for images of this height and width."""
        return [(hw[0] // stride, hw[1] // stride) for stride in self.model.strides]

    def heed(self, metrics: dict[str, Any]) -> None:
        """Has the sampler draw by what an evaluation found, where it was asked to, and notes in the metrics what that changes."""
        balance = self.sampler.balance
        if balance is not None:
            names = self.val_split.names
            of_class = [metrics["per_class"][names[i]] for i in sorted(names)]
            # Of a class without a box in val nothing is known.
            balance.ap = np.array([it["map50_95"] if it["instances"] else metrics["map50_95"] for it in of_class])
            metrics["sampling"] = {"by": balance.by, "boxes_seen": dict(zip(names.values(), balance.boxes_seen().tolist(), strict=True))}

    def evaluate(self, model: YOLO) -> tuple[dict[str, Any], list[float]]:
        """Metrics and losses on the validation split, over all workers."""
        batches = self.member.steps(self.val_loader, "evaluate")
        return evaluate(model, batches, self.val_split, self.numerics, self.comm, self.loss)

    def save_weights(self, model: YOLO, epoch: int, metrics: dict[str, Any] | None, is_best: bool) -> None:
        """Writes last.pt, best.pt, the epoch's own where it is to stay, and metrics.json on rank 0.

        A full disk stops no training: the files before stay good.
        """
        if self.comm.rank() != 0:
            return
        notes = {"epoch": epoch, "img": self.config.img, "metrics": metrics or {}}
        names, period = ["last", "best"] if is_best else ["last"], self.config.save_period
        stays = [f"epoch{epoch + 1}"] if period > 0 and (epoch + 1) % period == 0 else []
        self.unwritten["weights"] = f"weights of epoch {epoch + 1}"
        try:
            for name in names + stays:
                save_weights(self.run.weights / f"{name}.pt", model, notes)
            if metrics is not None:
                path = self.run.folder / "metrics.json"
                known = json.loads(path.read_text()) if path.exists() else {}
                with atomic_file(path, "w") as stream:
                    json.dump(known | dict.fromkeys(names, metrics) | imbalance_notes(self.config, self.loss, self.model.names), stream, indent=1)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            log.error("weights of epoch %d NOT WRITTEN: %s; training goes on", epoch + 1, str(error).splitlines()[0])
        else:
            del self.unwritten["weights"]

    def save_checkpoint(self, state: dict[str, Any], is_best: bool = False) -> None:
        """Begins to write a checkpoint on rank 0, and on every worker what only it knows; ``background`` ends it while training goes on."""
        folder, step, keep, rank, size = self.run.checkpoints, self.progress.step, self.config.keep_checkpoints, self.comm.rank(), self.comm.size()
        notes = {"update": self.progress.update, "epoch": self.sampler.epoch, "workers": size, "best": is_best}
        own = serialised(self.rank_state() | {"weights": self.weights_fingerprint()}) if size > 1 else None
        whole = serialised(state) if rank == 0 else None

        def write() -> None:
            if own is not None:  # a run can be resumed without it
                attempt(f"this worker's own state of step {step}", lambda: write_rank_state(folder, own, step, rank, size, keep, notes))
            if whole is not None:
                self.unwritten["checkpoint"] = f"checkpoint of step {step}"
                write_checkpoint(folder, whole, step, keep, notes)
                del self.unwritten["checkpoint"]

        self.background.start(f"checkpoint of step {step}", write)
        self.saved_s = time.monotonic()

    def checkpoint_is_due(self) -> bool:
        """Whether it is time for a checkpoint within an epoch; by the clock of rank 0, which the others follow."""
        every_s = 60 * self.config.checkpoint_minutes
        return self.comm.rank() == 0 and 0 < every_s <= time.monotonic() - self.saved_s and not self.background.busy

    def rank_state(self) -> dict[str, Any]:
        """What is this worker's own: what its compressor has not sent yet, and the statistics of its BatchNorm layers."""
        return {
            "residuals": self.compressor.rank_state_dict(),
            "buffers": dict(self.model.named_buffers()),
            "ema_buffers": dict(self.ema.model.named_buffers()),
        }

    def weights_fingerprint(self) -> str:
        """What tells whether a worker's own belongs to a checkpoint: a run that went back comes to the same step again with other weights."""
        return fingerprint(dict(self.model.named_parameters()))

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Takes back what ``rank_state`` gave."""
        self.compressor.load_rank_state_dict(state["residuals"])
        for model, saved in ((self.model, state["buffers"]), (self.ema.model, state["ema_buffers"])):
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


@dataclass
class CompressorState:
    """A compressor's part of a checkpoint: of no use to a run that was resumed with another one."""

    settings: str
    compressor: Compressor

    def state_dict(self) -> dict[str, Any]:
        """What is alike on all workers, with the settings that it belongs to."""
        return {"settings": self.settings, "state": self.compressor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave, where the settings are the same."""
        if state["settings"] == self.settings:
            self.compressor.load_state_dict(state["state"])
        else:
            log.info("compression was %s and is %s: it starts anew", state["settings"], self.settings)


def build_model_for(config: Config, names: dict[int, str]) -> YOLO:
    """The model of these classes that ``--cfg`` and ``--weights`` ask for, on the CPU, initialised from the run's seed.

    Raises InputError for what is unknown or unreadable.
    """
    weights = read_weights(config.weights) if config.weights else None
    table = load_layer_table(config.cfg) if config.cfg else model_from_weights(config.weights)[0].table
    if config.recipe.activation:
        table = {**table, "activation": ACTIVATION_NAMES[config.recipe.activation]}
    if config.hyp.anchors:
        table = {**table, "anchors": max(round(config.hyp.anchors), 1)}
    if isinstance(table["anchors"], int) and not config.recipe.autoanchor:
        raise InputError(f"{config.cfg} with --noautoanchor: it only says how many anchors a layer has, which are to be fitted to the data")
    torch.manual_seed(config.seed)
    model = model_from_table(table, len(names), names)
    if weights is not None:
        # As in YOLOv5, anchors come from --cfg where it is given.
        report = load_matching(model, weights.tensors, skip_anchors=bool(config.cfg or config.hyp.anchors))
        log.info("weights %s: %d of %d tensors taken", config.weights, report.loaded, report.total)
        for line in report.left_out:
            log.info("  left out: %s", line)
    model.freeze(frozen_layers(config.recipe.freeze))
    stride = max(model.strides)
    if config.img % stride:
        whole = math.ceil(config.img / stride) * stride
        raise InputError(f"img = {config.img}; a multiple of {stride}, the largest stride of {config.cfg or config.weights}, is wanted: {whole}")
    return model


def build_training(
    config: Config,
    comm: Comm,
    numerics: Numerics,
    model: YOLO,
    train_split: Split,
    val_split: Split,
    num_local: int,
    member: Member | Fixed | None = None,
) -> Training:
    """Places the parts in each other's reach; ``num_local`` workers share this host, ``member`` is this one's side of an elastic job.

    Nobody talks to another worker here: how they come to the same state is in ``synchronise.py``.
    """
    if config.comms.sync_bn:
        convert_sync_bn(model, comm)
    model = model.to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    compressor = pick_compressor(model, config.comms, numerics)
    stride = max(model.strides)
    sampler = build_sampler(config, train_split, stride)
    batch = min(config.batch, sampler.num_samples)
    schedule = Schedule(config.hyp, config.optim, config.epochs, batch, sampler.global_batches_left())
    optimizer = build_optimizer(model, config.optim, config.hyp.lr0, config.hyp.momentum, schedule.weight_decay)
    loss_scale = LossScale(enabled=numerics.dtype == torch.float16)
    ema = EMA(model, config.optim.ema_decay)
    progress = Progress()
    state = TrainState(model=model, ema=ema, optimizer=optimizer, loss_scale=loss_scale, sampler=sampler, progress=progress)
    ledger, unreadable = Ledger(), Unreadable()
    state.add("compressor", CompressorState(describe_compression(config.comms), compressor))
    state.add("ledger", ledger)
    state.add("unreadable", unreadable)

    num_workers = choose_num_workers(config.workers, num_local)
    pin_memory = numerics.device.type == "cuda"
    for line in describe_input(config, sampler, train_split.names):
        log.info("%s", line)
    return Training(
        config=config,
        comm=comm,
        numerics=numerics,
        model=model.train(),
        loss=build_loss(config, model, class_counts(train_split, model.num_classes)),
        ema=ema,
        optimizer=optimizer,
        loss_scale=loss_scale,
        compressor=compressor,
        exchange=Exchange(model.named_parameters(), compressor, comm, config.comms.bucket_mb, alone=not config.comms.sync_bn),
        schedule=schedule,
        sampler=sampler,
        loader=build_train_loader(build_train_data(config, train_split), sampler, comm, num_workers, pin_memory),
        train_split=train_split,
        val_split=val_split,
        val_loader=build_eval_loader(build_eval_data(config, val_split, stride), config.batch, comm, num_workers, pin_memory),
        progress=progress,
        state=state,
        standing=Standing(state, model),
        ledger=ledger,
        unreadable=unreadable,
        member=member or Fixed(),
        data_hash=train_split.content_hash + val_split.content_hash,
    )


def pick_compressor(model: YOLO, comms: Comms, numerics: Numerics) -> Compressor:
    """What sums gradients over workers.

    With synchronised BatchNorm on CPUs in full precision nothing but the order of sums tells one number of workers from another: there sums are
    made exact, and losses and weights have the same bits at any number.
    """
    if comms.sync_bn and numerics.device.type == "cpu" and numerics.dtype == torch.float32 and comms.compression == "none":
        try:
            exact = ExactSum(convert_exact(model))
            if comms.overlap == "yes":
                log.warning("comms.overlap=yes: no bucket leaves during backward here, exact sums are complete at its end")
            return ErrorFeedback(exact, overlap=False)
        except ValueError as error:
            log.info("losses will differ a little between numbers of workers: %s", error)
    return build_compressor(comms, overlaps(comms, numerics))


def overlaps(comms: Comms, numerics: Numerics) -> tuple[bool, ...]:
    """When buckets may leave: while backward runs (True), after it (False); where both are given, measurement decides.

    Not during backward beside a synchronised BatchNorm, whose small exchanges would queue behind them. On a CPU whose cores are all at work the
    network's share of them comes out of backward, and its threads disturb those that compute; but a slow link leaves them idle (README, Speed).
    """
    if comms.overlap != "auto":
        return (comms.overlap == "yes",)
    if comms.sync_bn:
        return (False,)
    return (True,) if numerics.device.type == "cuda" else (False, True)


def build_loss(config: Config, model: YOLO, counts: Tensor | None = None) -> DetectionLoss:
    """The loss with its gains scaled by layers, classes and image size, as YOLOv5's training does.

    ``counts`` (num_classes,), the training boxes of each class, are what class weights are made of.
    """
    hyper, power = config.hyp, config.recipe.class_weights
    weights = class_weights_from(counts, power).to(model.anchors.device) if power and counts is not None else None
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
        box_loss=config.recipe.box_loss,
        class_weights=weights,
    )

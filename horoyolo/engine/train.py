"""The training loop. Everything that it uses is built in ``build.py``; everything that only watches it is a hook."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from horoyolo.distributed.syncbn import average_bn_buffers
from horoyolo.engine.build import Training
from horoyolo.engine.hooks import EpochRecord, Hook, StepRecord
from horoyolo.engine.schedule import Rates
from horoyolo.engine.stop import StopRequest
from horoyolo.model.yolo import YOLO

log = logging.getLogger("horoyolo")

MOST_SKIPPED_UPDATES = 20  # in a row; a loss scale that is settling skips a few


class TrainingError(RuntimeError):
    """Training can't go on (exit status 1)."""


def train(job: Training, hooks: Sequence[Hook], stop: StopRequest) -> bool:
    """Trains to the last epoch, or until scores no longer rise. True: done; False: stopped on request, with a checkpoint to resume from."""
    for hook in hooks:
        hook.before_train()
    try:
        for epoch in range(job.sampler.epoch, job.config.epochs):
            started_s = time.perf_counter()
            for batch, data_s in timed(job.loader):
                record, stop_agreed = train_step(job, batch, data_s, stop.pending)
                for hook in hooks:
                    hook.after_step(record, batch)
                if stop_agreed and job.progress.last_update_step == job.progress.step:
                    job.save_checkpoint(whole_state(job))
                    log.info("stopped on request after step %d; --resume goes on from there", job.progress.step)
                    return False
            epoch_record = finish_epoch(job, epoch, started_s)
            for hook in hooks:
                hook.after_epoch(epoch_record)
            job.comm.barrier()  # the epoch is over when rank 0 has written what came of it
            job.standing.mark()
            if job.progress.out_of_patience(job.config.recipe.patience):
                best, patience = job.progress.best_epoch + 1, job.config.recipe.patience
                log.info("no better score for %d epochs: training ends; epoch %d was the best (--patience)", patience, best)
                break
    finally:
        for hook in hooks:
            hook.after_train()
        job.background.wait()
    return True


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch with the seconds that it was waited for."""
    started_s = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - started_s
        started_s = time.perf_counter()


def train_step(job: Training, batch: Any, data_s: float, stop_pending: bool) -> tuple[StepRecord, bool]:
    """Trains on this worker's share of one global batch: forward, loss, backward while gradients leave, and an update where one is due.

    Gives the record of the global batch, and whether any worker was asked to stop.
    """
    progress, sampler, comm, numerics = job.progress, job.sampler, job.comm, job.numerics
    epoch, global_batch = sampler.epoch, job.global_batch
    last_of_epoch = sampler.consumed + global_batch == sampler.num_samples
    rates = job.schedule.at(epoch, progress.step)
    update_due = last_of_epoch or progress.step + 1 - progress.last_update_step >= rates.accumulate
    set_rates(job.optimizer, rates, job.config.optim.backbone_lr)

    # What the loss is divided by depends on labels and anchors alone: it is summed over workers while forward runs.
    started_s = time.perf_counter()
    ahead = comm.allreduce_async(known_ahead(job, batch, stop_pending), "step.ahead")
    has_images = len(batch.images) > 0
    # Without images there is nothing to compute, but a synchronised BatchNorm waits for every worker.
    takes_part = has_images or (job.config.comms.sync_bn and comm.size() > 1)
    if takes_part:
        with numerics.autocast():
            heads = job.model(numerics.as_input(batch.images))
    *positives, batch_crc, stops = ahead.wait().tolist()
    if takes_part:
        losses = job.loss(heads, batch.targets.to(numerics.device), torch.tensor(positives, device=numerics.device), global_batch)
    else:
        losses = torch.zeros(3, device=numerics.device)
    sum_of_losses = comm.allreduce_async(losses.detach().double(), "step.losses")
    forward_s = time.perf_counter() - started_s

    started_s = time.perf_counter()
    if update_due:
        job.exchange.arm(job.loss_scale.value)
    if takes_part:
        # As in YOLOv5 the loss is summed over images: the step grows with the batch.
        (losses.sum() * global_batch * job.loss_scale.value).backward()
    backward_s = time.perf_counter() - started_s

    # All that is to come from other workers is awaited before anything changes: a worker that gets so far completes the update whatever happens
    # to the others, and one that does not stands at the update before.
    started_s = time.perf_counter()
    sums = sum_of_losses.wait()
    exchange = job.exchange.finish() if update_due else None
    exchange_wait_s = time.perf_counter() - started_s
    box_loss, obj_loss, cls_loss = sums.tolist()
    if exchange is not None:
        apply_update(job, exchange.norm)
    sampler.advance(global_batch)
    progress.count(global_batch, (box_loss, obj_loss, cls_loss))
    if exchange is not None:
        progress.last_update_step = progress.step
        job.standing.mark()
        job.exchange.measure()
    record = StepRecord(
        step=progress.step,
        epoch=epoch,
        update=progress.update,
        images=global_batch,
        batch_crc=int(batch_crc) % 2**32,
        box_loss=box_loss,
        obj_loss=obj_loss,
        cls_loss=cls_loss,
        loss=box_loss + obj_loss + cls_loss,
        lr=rates.lr,
        data_s=data_s,
        forward_s=forward_s,
        backward_s=backward_s,
        exchange_wait_s=exchange_wait_s,
        wire_bytes=exchange.wire_bytes if exchange is not None else 0,
        workers=comm.size(),
    )
    return record, stops > 0


def known_ahead(job: Training, batch: Any, stop_pending: bool) -> Tensor:
    """What workers sum before the loss: positives of each layer, CRC-32 of the images, requests to stop; (num_layers + 2,) float64.

    Doubles hold sums of 32-bit checksums exactly.
    """
    positives = job.loss.count_positives(batch.targets, job.grids(batch.images.shape[2:]))
    return torch.cat([positives.double().cpu(), torch.tensor([batch.crc, stop_pending], dtype=torch.float64)])


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates, backbone_lr: float) -> None:
    """Sets the rates of this step; biases have one of their own, and layers of the backbone ``backbone_lr`` times what the head has."""
    for group in optimizer.param_groups:
        lr = rates.bias_lr if group["kind"] == "bias" else rates.lr
        group["lr"] = lr * backbone_lr if group["part"] == "backbone" else lr
        if "momentum" in group:
            group["momentum"] = rates.momentum
        else:
            group["betas"] = (rates.momentum, group["betas"][1])


def apply_update(job: Training, norm: float) -> None:
    """Clips the summed gradient, whose 2-norm is ``norm``, steps, and follows with the EMA. No worker waits for another here.

    A gradient that is not finite is left out. All workers do the same since all hold the same bits.
    """
    finite = math.isfinite(norm)
    if finite:
        largest = job.schedule.clip_norm
        if 0 < largest < norm:
            torch._foreach_mul_([bucket.flat for bucket in job.exchange.buckets], largest / norm)
        job.optimizer.step()
        job.ema.update(job.model)
        job.progress.update += 1
        job.progress.skipped_updates = 0
    else:
        job.progress.skipped_updates += 1
        log.warning("step %d: gradient is not finite, update left out", job.progress.step + 1)
        if job.progress.skipped_updates > MOST_SKIPPED_UPDATES:
            raise TrainingError(f"{job.progress.skipped_updates} updates in a row had gradients that are not finite; try a lower hyp.lr0")
    job.loss_scale.update(finite)
    job.exchange.zero_grad()


def finish_epoch(job: Training, epoch: int, started_s: float) -> EpochRecord:
    """Evaluates where it is time to, and saves weights and a checkpoint. Where it fails it can be done again: nobody has gone on."""
    progress = job.progress
    images, losses, lr = progress.epoch_images, progress.epoch_means(), job.schedule.at(epoch, progress.step - 1).lr
    ema = averaged(job.ema.model, job)
    metrics, val_losses = None, None
    if (epoch + 1) % job.config.evaluate_every == 0 or epoch + 1 == job.config.epochs:
        metrics, val_losses = job.evaluate(ema)
        metrics["epoch"] = epoch
        job.heed(metrics)
    job.sampler.next_epoch()
    progress.start_epoch()
    is_best = metrics is not None and progress.score(epoch, fitness(metrics))
    job.save_weights(ema, epoch, metrics, is_best)
    job.save_checkpoint(whole_state(job), is_best)
    val = val_losses or (None, None, None)
    return EpochRecord(
        epoch=epoch,
        step=progress.step,
        images=images,
        train_box_loss=losses[0],
        train_obj_loss=losses[1],
        train_cls_loss=losses[2],
        val_box_loss=val[0],
        val_obj_loss=val[1],
        val_cls_loss=val[2],
        precision=metrics["precision"] if metrics else None,
        recall=metrics["recall"] if metrics else None,
        map50=metrics["map50"] if metrics else None,
        map50_95=metrics["map50_95"] if metrics else None,
        lr=lr,
        seconds=time.perf_counter() - started_s,
    )


def fitness(metrics: dict[str, Any]) -> float:
    """One figure to choose the best epoch by, YOLOv5's: mostly AP over all IoU thresholds."""
    return 0.1 * metrics["map50"] + 0.9 * metrics["map50_95"]


def averaged(model: YOLO, job: Training) -> YOLO:
    """A copy of ``model`` with BatchNorm statistics averaged over workers; every worker must call it."""
    model = copy.deepcopy(model)
    average_bn_buffers(model.learning_layers(), job.comm)
    return model


def whole_state(job: Training) -> dict[str, Any]:
    """What a checkpoint holds, free of the number of workers: BatchNorm statistics are averaged on copies; every worker must call it."""
    state = job.state.state_dict()
    state["model"] = averaged(job.model, job).state_dict()
    state["ema"]["model"] = averaged(job.ema.model, job).state_dict()
    return state

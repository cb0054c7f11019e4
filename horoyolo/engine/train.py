"""The training loop. Everything that it uses is built in ``build.py``; everything that only watches it is a hook."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from horoyolo.config import InputError
from horoyolo.data.loader import batches
from horoyolo.distributed.syncbn import average_bn_buffers
from horoyolo.engine.build import Training
from horoyolo.engine.checkpoint import find_checkpoint
from horoyolo.engine.hooks import EpochRecord, Hook, StepRecord
from horoyolo.engine.ledger import note_update
from horoyolo.engine.nonfinite import MOST_SKIPPED, go_back, leave_out, lowered
from horoyolo.engine.schedule import Rates
from horoyolo.engine.state import TrainingError
from horoyolo.engine.stop import StopRequest
from horoyolo.model.yolo import YOLO

log = logging.getLogger("horoyolo")


class Asks(NamedTuple):
    """What workers ask of all before a step; summed over workers, what is not zero was asked for."""

    stop: float = 0  # with a checkpoint, after the next update
    save: float = 0  # a checkpoint after the next update
    news: float = 0  # to hear of images that can't be read any more
    change: float = 0  # workers are to come or to go, after the next update


class Outcome(Enum):
    """How a generation of workers ended, for an ordinary job the only one."""

    DONE = "done"
    STOPPED = "stopped"  # on request, with a checkpoint to resume from
    CHANGE = "change"  # workers are to come or to go


def train(job: Training, hooks: Sequence[Hook], stop: StopRequest) -> Outcome:
    """Trains to the last epoch, until scores no longer rise, or until all agree after an update to stop or to change."""
    member = job.member
    member.enter("start")  # loaders start, and kernels are chosen
    stop.watch(job.run.folder)
    job.commits.offer(job)
    while not is_finished(job):
        started_s = time.perf_counter()
        for batch, data_s in timed(batches(job.loader)):
            member.begin_step("train")
            record, asked = train_step(job, batch, data_s, stop.pending)
            member.step = record.step
            job.recent.append(record)
            for hook in hooks:
                hook.after_step(record, batch)
            # May ask the others, so it comes when the step is on record.
            job.exchange.measure(comparable=record.images == usual_images(job))
            member.enter("step")
            if job.progress.last_update_step != job.progress.step:
                continue
            if job.progress.skipped_updates == MOST_SKIPPED:
                go_back(job)
                job.recent.clear()
                for hook in hooks:
                    hook.after_return()
                break
            job.commits.offer(job)
            too_many = len(job.unreadable.files) > job.config.max_bad_share * len(job.train_split)
            if asked.stop or asked.save or too_many:
                with member.phase("other"):
                    job.save_checkpoint(whole_state(job))
            if too_many:
                raise TrainingError(f"{len(job.unreadable.files)} images can't be read any more, of {len(job.train_split)}: see max_bad_share")
            if asked.stop:
                stop.heeded()
                log.info("stopped on request after step %d", job.progress.step)
                return Outcome.STOPPED
            if asked.change:
                return Outcome.CHANGE
        if job.sampler.consumed < job.sampler.num_samples:
            continue  # the run went back, perhaps to an earlier epoch
        member.enter("other")
        epoch_record = finish_epoch(job, started_s)
        for hook in hooks:
            hook.after_epoch(epoch_record)
        job.comm.barrier()  # the epoch is over when rank 0 has written what came of it
        job.standing.mark()
        if job.progress.out_of_patience(job.config.recipe.patience):
            best, patience = job.progress.best_epoch + 1, job.config.recipe.patience
            log.info("no better score for %d epochs: training ends; epoch %d was the best (--patience)", patience, best)
    return Outcome.DONE


def is_finished(job: Training) -> bool:
    """Whether nothing is left to train: all epochs are done, or scores no longer rose."""
    return job.sampler.epoch >= job.config.epochs or job.progress.out_of_patience(job.config.recipe.patience)


def usual_images(job: Training) -> int:
    """Images in the batch that most updates end with: a full one, or, where no full one can end an update, the short one that ends each epoch."""
    batch, images = job.config.batch, job.sampler.num_samples
    return batch if images // batch >= job.schedule.full_accumulate else images % batch or batch


@contextmanager
def watched(job: Training, hooks: list[Hook]) -> Iterator[None]:
    """Tells ``hooks``, and those that join them meanwhile, of the end of training, however it comes. What is being written is finished."""
    try:
        yield
    finally:
        with job.member.phase("other"):
            for hook in hooks:
                hook.after_train()
            hooks.clear()
            job.background.wait()


def what_is_lost(job: Training, outcome: Outcome) -> str:
    """What a run that ends so could not write, and what is there instead; empty where all is written, or whoever resumes it will write it.

    Every worker calls it when ``watched`` has ended, and all get the same.
    """
    told = ""
    lost = [what for kind, what in job.unwritten.items() if outcome is Outcome.DONE or kind == "checkpoint"]
    if job.comm.rank() == 0 and lost:
        try:
            there = f"the newest good checkpoint is {find_checkpoint(job.run.folder)[1]}"
        except InputError as error:
            there = str(error)
        told = f"{outcome.value} after step {job.progress.step}, but not written: {' and '.join(lost)}; {there}"
    elif outcome is Outcome.STOPPED:
        log.info("--resume goes on after step %d", job.progress.step)
    return job.comm.broadcast_object(told)


def timed(given: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch with the seconds that it was waited for."""
    started_s = time.perf_counter()
    for batch in given:
        yield batch, time.perf_counter() - started_s
        started_s = time.perf_counter()


def train_step(job: Training, batch: Any, data_s: float, stop_pending: bool) -> tuple[StepRecord, Asks]:
    """Trains on this worker's share of one global batch: forward, loss, backward while gradients leave, and an update where one is due.

    Gives the record of the global batch, and what workers asked for.
    """
    progress, sampler, comm, numerics = job.progress, job.sampler, job.comm, job.numerics
    epoch, global_batch = sampler.epoch, job.global_batch
    last_of_epoch = sampler.consumed + global_batch == sampler.num_samples
    rates = lowered(job.schedule.at(epoch, progress.step), progress.returns)
    update_due = last_of_epoch or progress.step + 1 - progress.last_update_step >= rates.accumulate
    set_rates(job.optimizer, rates, job.config.optim.backbone_lr)

    # What the loss is divided by depends on labels and anchors alone: it is summed over workers while forward runs.
    started_s = time.perf_counter()
    asks = Asks(stop_pending, job.checkpoint_is_due(), job.unreadable.has_news(batch.failed), job.member.change_wanted)
    ahead = comm.allreduce_async(known_ahead(job, batch, asks), "step.ahead")
    has_images = len(batch.images) > 0
    # Without images there is nothing to compute, but a synchronised BatchNorm waits for every worker.
    takes_part = has_images or (job.config.comms.sync_bn and comm.size() > 1)
    if takes_part:
        with numerics.autocast():
            heads = job.model(numerics.as_input(batch.images))
    figures = ahead.wait().tolist()
    asked = Asks(*figures[-len(asks) :])
    *positives, batch_crc = figures[: -len(asks)]
    if asked.news:
        job.unreadable.agree(batch.failed, comm)
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
        note_update(job, finite=math.isfinite(exchange.norm))
        job.standing.mark()
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
    return record, asked


def known_ahead(job: Training, batch: Any, asks: Asks) -> Tensor:
    """What workers sum before the loss: positives of each layer, CRC-32 of the images, what each asks for; float64, (num_layers + 1 + asks,).

    Doubles hold sums of 32-bit checksums exactly.
    """
    positives = job.loss.count_positives(batch.targets, job.grids(batch.images.shape[2:]))
    return torch.cat([positives.double().cpu(), torch.tensor([batch.crc, *asks], dtype=torch.float64)])


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates, backbone_lr: float) -> None:
    """Sets the rates of this step, weight decay too: a checkpoint brought those of the run before. Biases have a rate of their own, and layers of
    the backbone ``backbone_lr`` times what the head has.
    """
    for group in optimizer.param_groups:
        lr = rates.bias_lr if group["kind"] == "bias" else rates.lr
        group["lr"] = lr * backbone_lr if group["part"] == "backbone" else lr
        if group["kind"] == "weight":
            group["weight_decay"] = rates.weight_decay
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
        leave_out(job)
    job.loss_scale.update(finite)
    job.exchange.zero_grad()


def finish_epoch(job: Training, started_s: float) -> EpochRecord:
    """Evaluates where it is time to, and saves weights and a checkpoint. Where it fails it can be done again: nobody has gone on."""
    progress, epoch = job.progress, job.sampler.epoch
    images, losses = progress.epoch_images, progress.epoch_means()
    lr = lowered(job.schedule.at(epoch, progress.step - 1), progress.returns).lr
    ema = averaged(job.ema.model, job)
    metrics, val_losses = None, None
    every = job.config.evaluate_every
    if epoch + 1 == job.config.epochs or (every and (epoch + 1) % every == 0):
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
    """A copy of ``model`` with BatchNorm statistics averaged over workers, where they differ; every worker must call it."""
    model = copy.deepcopy(model)
    if not job.config.comms.sync_bn:  # all hold the same bits, which a mean of three would change
        average_bn_buffers(model.learning_layers(), job.comm)
    return model


def whole_state(job: Training) -> dict[str, Any]:
    """What a checkpoint holds, free of the number of workers: BatchNorm statistics are averaged on copies; every worker must call it."""
    state = job.state.state_dict()
    state["model"] = averaged(job.model, job).state_dict()
    state["ema"]["model"] = averaged(job.ema.model, job).state_dict()
    return state

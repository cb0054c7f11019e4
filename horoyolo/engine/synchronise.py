"""How workers that meet come to the same state: at the start of a run, and whenever some have gone or come.

Nothing is kept by a worker that leads: all say how far they are, and who is furthest gives the others what they lack. Survivors of a failure
are at most one update apart, since the next one needs everybody.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horoyolo.config import AgreedError, Config, InputError
from horoyolo.elastic.member import KnownRun
from horoyolo.engine.build import Training
from horoyolo.engine.checkpoint import read_rank_state
from horoyolo.engine.device import own_gpu
from horoyolo.engine.ledger import last_step
from horoyolo.engine.recipe import settle_anchors
from horoyolo.engine.runs import Run, newest_state, open_run, reopen_run
from horoyolo.engine.state import Position
from horoyolo.engine.transfer import broadcast_state, fingerprint

log = logging.getLogger("horoyolo")

NOWHERE = Position(-1, -1, -1)  # of a newcomer


class Disagreement(RuntimeError):
    """Workers hold different weights after they were brought together (exit status 1)."""


@dataclass(frozen=True)
class Claim:
    """What a worker says of itself when workers meet."""

    host: str
    data_hash: str
    config: Config
    computes_on: str  # ``Numerics.kind``: what ``auto`` means there
    gpu: str  # that no other worker may have, since NCCL would refuse; empty where there is none
    position: Position
    update: int  # updates used
    run: Run | None  # without the state it may have been resumed from
    survived: bool  # it was there when the last generation trained; others are new, or have a copy that may be old


def synchronise(job: Training, known: KnownRun | None = None) -> bool:
    """Brings all workers to the state of the one that is furthest; the first time to that of rank 0, which opens the run. Whether it begins now.

    ``known``: the run that workers before these had opened, the same for all. Where none of those is left, it goes on from its newest checkpoint,
    or from a worker's copy that is newer.
    Every worker calls it when communication has begun. Raises InputError where workers were started with different data or settings, or there is
    nothing to resume; Disagreement where they differ afterwards.
    """
    rank = job.comm.rank()
    claims = job.comm.allgather_object(claim_of(job))
    root = max(range(len(claims)), key=lambda other: (claims[other].position, -other))
    check_agreement(claims, rank, root)
    begins = known is None and claims[root].position == NOWHERE
    if known is not None and not any(claim.survived for claim in claims):
        go_on(job, claims, root, known)
    elif claims[root].position == NOWHERE:
        begin(job)
    else:
        catch_up(job, claims, root)
    check_weights(job)
    job.begun, job.recalled = True, False
    job.standing.mark()
    while job.recent and job.recent[-1].step > job.progress.step:
        job.recent.pop()  # after the last update: it will be taken again
    return begins


def claim_of(job: Training) -> Claim:
    """What this worker says of itself."""
    position = job.standing.position if job.begun else NOWHERE
    run = Run(job.run.folder) if job.begun else None
    gpu = own_gpu(job.numerics.device) if job.comm.size() > 1 else ""  # one process needs no Horovod to ask
    survived = job.begun and not job.recalled
    return Claim(platform.node(), job.data_hash, job.config, job.numerics.kind, gpu, position, job.standing.update, run, survived)


def check_agreement(claims: Sequence[Claim], rank: int, root: int) -> None:
    """Raises InputError where this worker's data, settings or precision are not those of ``root``, or another has its GPU; at the start of a run,
    on all, where that is so of any worker.
    """
    told = claims[root]
    starting = told.position == NOWHERE
    error = AgreedError if starting else InputError
    for claim in claims if starting else [claims[rank]]:
        if claim.data_hash != told.data_hash:
            raise error(f"the data set on {claim.host} differs from that on {told.host} (images, sizes or labels): copy it again")
        if claim.config != told.config:
            here, there = asdict(claim.config), asdict(told.config)
            different = ", ".join(name for name in there if here[name] != there[name])
            raise error(f"the settings on {claim.host} differ from those on {told.host}: {different}")
        if claim.computes_on != told.computes_on:  # other precisions have other collectives
            remedy = "name what all have by --device and --precision"
            raise error(f"{claim.host} computes on {claim.computes_on}, {told.host} on {told.computes_on}: {remedy}")
        sharing = [other for other in claims if claim.gpu and other.gpu == claim.gpu]
        if len(sharing) > 1 and not claim.survived:
            raise error(f"{len(sharing)} workers on {claim.host} have the same GPU, which NCCL refuses: a worker for each GPU, or --device cpu")


def go_on(job: Training, claims: Sequence[Claim], root: int, known: KnownRun) -> None:
    """The run of workers who are all gone, from the newest of what is left of it: a checkpoint that some worker sees, or the copy of ``root``.

    Any worker may see it: the one that wrote it may have been on a host that is gone with its disk.
    """
    comm = job.comm
    state = newest_state(known.folder)
    mine = NOWHERE if state is None else Position(state["progress"]["returns"], state["progress"]["last_update_step"], state["sampler"]["epoch"])
    del state
    seen = comm.allgather_object((mine, last_step(known.folder)))
    reader = max(range(len(seen)), key=lambda rank: (seen[rank][0], -rank))
    copy, checkpoint = claims[root].position, seen[reader][0]
    from_copy = copy > NOWHERE and copy >= checkpoint
    if from_copy:
        catch_up(job, claims, root)
    else:
        begin(job, reader, known.folder)
    if comm.rank() == 0:
        step = job.progress.step
        lost = max(0, max(known.step, *(done for _, done in seen)) - step)
        whence = f"the {'copy in memory' if from_copy else 'checkpoint'} of step {step}"
        if not from_copy and checkpoint == NOWHERE:
            whence = "the START, without a checkpoint"
        level = logging.ERROR if lost or not from_copy else logging.INFO  # whoever had to be replaced to leave a generation kept all
        log.log(level, "ALL WORKERS WERE LOST: %s goes on from %s; %d completed steps are lost and done again", job.run.folder, whence, lost)


def begin(job: Training, root: int = 0, folder: Path | None = None) -> None:
    """The run as ``root`` opens it: the one in ``folder``, or what the settings say. It alone reads a checkpoint: others need not see its disk."""
    comm = job.comm
    opened: Run | InputError | None = None
    if comm.rank() == root:
        try:
            opened = open_run(job.config) if folder is None else reopen_run(folder)
            check_parts(job, opened)
        except InputError as error:
            opened = error
    resumed = opened.resumed if isinstance(opened, Run) else None
    told, is_resumed = comm.broadcast_object((Run(opened.folder) if isinstance(opened, Run) else opened, resumed is not None), root)
    if isinstance(told, InputError):
        raise AgreedError(str(told))
    job.run = told
    if resumed is not None:
        job.state.load_state_dict(resumed)
    elif comm.rank() == root:
        settle_anchors(job.model, job.train_split, job.config)
        job.ema.model.load_state_dict(job.model.state_dict())
    state = broadcast_state(job.state.state_dict() if comm.rank() == root else None, comm, root)
    if comm.rank() != root:
        job.state.load_state_dict(state)
    job.unreadable.files.clear()  # what can't be read now was found by the scan
    if job.recalled:
        job.compressor.load_rank_state_dict({})  # what the copy had not sent yet belongs to another step
    if is_resumed:
        log.info("resumed at step %d, epoch %d", job.progress.step, job.sampler.epoch)
        load_own(job)


def check_parts(job: Training, run: Run) -> None:
    """Raises InputError where the state that ``run`` was resumed from lacks a part of this version's, or is of another model or optimizer."""
    if run.resumed is None:
        return
    missing = job.state.missing_from(run.resumed)
    found = f"another version of horoyolo: it has no {', '.join(missing)}" if missing else ""
    if not found:
        own, saved = (shapes(state["model"]) for state in (job.state.state_dict(), run.resumed))
        other = next((name for name in own | saved if own.get(name) != saved.get(name)), None)
        if other is not None:
            found = f"another model or other classes: {other} is {saved.get(other, 'missing')} there and {own.get(other, 'missing')} here"
        elif groups(job.optimizer.state_dict()) != groups(run.resumed["optimizer"]):
            found = "another --optimizer or other layers frozen"
    if found:
        raise InputError(
            f"the checkpoint in {run.folder} is of {found}; start a new run from what it learned: --weights {run.weights / 'last.pt'}"
        )


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def groups(optimizer_state: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What has to agree of an optimizer's groups for one to go on from the other's state: their parameters, and what is kept of each."""
    return [(group.get("part"), group.get("kind"), len(group["params"]), "betas" in group) for group in optimizer_state["param_groups"]]


def load_own(job: Training) -> None:
    """What this worker saved of its own beside the checkpoint, where as many workers saved it."""
    step, rank, size = job.progress.step, job.comm.rank(), job.comm.size()
    if size == 1:
        return
    own = read_rank_state(job.run.checkpoints, step, rank, size)
    if own is None:
        log.info("nothing of this worker's own was saved at step %d by %d workers: residuals start at zero", step, size)
    elif own.get("weights") not in (None, job.weights_fingerprint()):  # versions before this one did not note them
        log.warning("what this worker saved of its own at step %d is of another course of the run: residuals start at zero", step)
    else:
        job.load_rank_state(own)


def catch_up(job: Training, claims: Sequence[Claim], root: int) -> None:
    """Everyone comes to stand where ``root`` stands: at its last update, in whatever step communication ended."""
    mine, told = claims[job.comm.rank()], claims[root]
    if mine.position == told.position:
        job.standing.go_back()
        job.exchange.reset()
    if all(claim.position == told.position for claim in claims):
        return
    given = {"state": job.state.state_dict(), "recent": list(job.recent)} if job.comm.rank() == root else None
    given = broadcast_state(given, job.comm, root)
    if mine.position != told.position:
        take_over(job, given["state"], mine, told)
        job.recent.clear()
        job.recent.extend(given["recent"])


def take_over(job: Training, state: dict[str, Any], mine: Claim, told: Claim) -> None:
    """The ``state`` of the worker that is furthest, without losing what is this worker's own: BatchNorm statistics and residuals.

    Where others completed the update that failed here, they got all that this worker sent in it, so what is its own is that of this update; where
    they left it out, since it was not finite, that of the update before. A newcomer has nothing of its own: it takes the statistics too, and no
    residuals.
    """
    if mine.position[:2] == told.position[:2]:  # others have finished the epoch besides
        job.standing.go_back()
        job.exchange.reset()
        has_own = True
    else:
        has_own, used = job.exchange.settled, told.update > mine.update
        job.exchange.reset(used=has_own and used)
        if not used:
            torch._foreach_copy_(list(job.model.buffers()), job.standing.buffers)
    own = [buffer.clone() for buffer in job.model.buffers()]
    job.state.load_state_dict(state)
    if has_own:
        torch._foreach_copy_(list(job.model.buffers()), own)
    else:
        job.compressor.load_rank_state_dict({})
    assert told.run is not None
    job.run = told.run


def check_weights(job: Training) -> None:
    """Raises Disagreement, which says where, unless all workers hold the same: weights, their average, optimizer, what compressors share."""
    if job.comm.size() == 1:
        return
    state = job.state.state_dict()
    parts = {
        "weights": dict(job.model.named_parameters()),
        "EMA": dict(job.ema.model.named_parameters()),
        "optimizer": state["optimizer"]["state"],  # the rates beside it are set anew in every step
        "compressor": state["compressor"],
        "counters": job.state.figures(),
    }
    if job.config.comms.sync_bn:
        parts["BatchNorm statistics"] = dict(job.model.named_buffers())
    everyone = job.comm.allgather_object((platform.node(), {name: fingerprint(part) for name, part in parts.items()}))
    first_host, first = everyone[0]
    for rank, (host, prints) in enumerate(everyone):
        different = ", ".join(name for name in first if prints[name] != first[name])
        if different:
            raise Disagreement(f"rank {rank} on {host} holds other values than rank 0 on {first_host}: {different}; resume from a checkpoint")

"""What a run does where numbers are not finite any more.

An update whose summed gradient holds a NaN or an infinity is left out by all workers together: they hold the same bits. After many in a row the
weights themselves lead nowhere: all go back to the last state from which training went on well, and on from there at a lower rate.
"""

from __future__ import annotations

import dataclasses
import logging

import torch

from horoyolo.engine.build import Training
from horoyolo.engine.commit import first_bad
from horoyolo.engine.schedule import Rates
from horoyolo.engine.state import TrainingError
from horoyolo.engine.transfer import broadcast_state

log = logging.getLogger("horoyolo")

MOST_SKIPPED = 20  # updates in a row; those that settle a loss scale do not count
MOST_RETURNS = 3  # of a run
GRADIENT = "gradient of"
SLOWER = 0.5  # the rates after a return, as a part of those before


def leave_out(job: Training) -> None:
    """Counts an update that is left out, says what was not finite, and forgets the statistics that BatchNorm layers drew from its images."""
    step = job.progress.step + 1
    job.first_bad = first_bad_tensor(job)
    torch._foreach_copy_(list(job.model.buffers()), job.standing.buffers)
    if job.loss_scale.settling:
        log.info("step %d: a gradient overflowed, update left out; the loss scale is halved", step)
        return
    job.progress.skipped_updates += 1
    log.warning("step %d: %s is not finite, update left out", step, job.first_bad)


def first_bad_tensor(job: Training) -> str:
    """The first tensor of the model that is not finite on this worker: weights, statistics of what went through a layer, gradients summed over all.

    In that order, which is that of cause and effect.
    """
    weights, statistics = dict(job.model.named_parameters()), dict(job.model.named_buffers())
    gradients = {name: param.grad for name, param in weights.items() if param.grad is not None}
    for kind, tensors in (("weight", weights), ("BatchNorm statistic", statistics), (GRADIENT, gradients)):
        bad = first_bad(tensors)
        if bad:
            return f"{kind} {bad}"
    return f"{GRADIENT} all together"


def go_back(job: Training) -> None:
    """Brings all workers to the last good state that any of them kept, with lower rates; every worker calls it after the same update.

    Good is a state after which an update was used: what it led to was finite. Raises TrainingError when there is none, or the run went back too
    often; the message names the first bad tensor.
    """
    comm, progress = job.comm, job.progress
    returns, skipped = progress.returns, progress.skipped_updates
    found = job.commits.latest(below=progress.update) or job.commits.latest()
    told = comm.allgather_object((found[0] if found else -1, job.first_bad))
    updates = [update for update, _ in told]
    root = max(range(len(updates)), key=lambda rank: (updates[rank], -rank))
    # Gradients are sums: bad on all. Who has more to say is where it began.
    rank, bad = min(enumerate(bad for _, bad in told), key=lambda said: (said[1].startswith(GRADIENT), said[0]))
    what = f"{skipped} updates in a row were not finite; the first bad tensor was {bad} on rank {rank}"
    if returns == MOST_RETURNS:
        raise TrainingError(f"{what}; the run had gone back {returns} times and on at lower rates: try a lower hyp.lr0, look at the data")
    if updates[root] < 0:
        raise TrainingError(f"{what}; there is no good state to go back to: try a lower hyp.lr0")

    shared = broadcast_state(found[1]["shared"] if found and comm.rank() == root else None, comm, root)
    job.state.load_state_dict(shared)
    if found and found[0] == updates[root]:
        job.load_rank_state(found[1]["own"])
    else:
        job.compressor.load_rank_state_dict({})
    progress.returns, progress.skipped_updates = returns + 1, 0
    job.standing.mark()
    job.commits.clear()
    job.commits.offer(job)
    log.warning("%s: back to update %d, on at %g of the learning rate", what, progress.update, SLOWER**progress.returns)


def lowered(rates: Rates, returns: int) -> Rates:
    """The rates of a run that went back ``returns`` times."""
    slower = SLOWER**returns
    return dataclasses.replace(rates, lr=rates.lr * slower, bias_lr=rates.bias_lr * slower)

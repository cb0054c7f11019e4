"""Training in an elastic job: one generation of workers after another, each going on where the one before stood."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from horoyolo.compression.base import Compressor
from horoyolo.distributed.comm import Comm, CommBroken
from horoyolo.elastic.member import Member, Place
from horoyolo.elastic.state import ElasticComm
from horoyolo.engine.build import Training
from horoyolo.engine.commit import Commits, local_state, restore
from horoyolo.engine.hooks import Hook
from horoyolo.engine.runs import Run
from horoyolo.engine.state import TrainingError
from horoyolo.engine.stop import StopRequest
from horoyolo.engine.synchronise import synchronise
from horoyolo.engine.train import Outcome, is_finished, train, watched, what_is_lost, whole_state
from horoyolo.engine.transfer import broadcast_state
from horoyolo.engine.watch import RecordFigures, build_hooks, build_recording_hooks
from horoyolo.files import atomic_file
from horoyolo.report.logs import start_logs

log = logging.getLogger("horoyolo")

RUN_NOTE = "run"  # a file in memory with the name of the run's folder


def recall(job: Training, memory: Path | None) -> None:
    """Stands where the worker before this one in its slot stood, where there was one: joining a generation in which somebody dies ends a process.

    From now on copies of the state are kept in ``memory``, which outlives this process.
    """
    if memory is None:
        return
    job.commits = Commits(memory)
    note = memory / RUN_NOTE
    kept = job.commits.latest() if note.exists() else None
    if kept is not None:
        restore(job, kept[1])
        job.run, job.begun, job.recalled = Run(Path(note.read_text())), True, True
        job.standing.mark()


def keep(job: Training, memory: Path | None) -> None:
    """Copies to ``memory`` where this worker stands, at its last update, whatever was begun since: leaving a generation or joining one may
    end this process.
    """
    if memory is not None and job.begun:
        job.commits.save(state_at_mark(job), job.standing.update)


def note_run(job: Training, member: Member) -> None:
    """Tells the launcher the run's folder and where it goes on, and leaves the folder's name beside the copies in memory."""
    folder, memory = str(job.run.folder.absolute()), member.memory
    member.step = job.progress.step
    member.say("run", folder=folder, step=member.step)
    if memory is None:
        return
    try:
        memory.mkdir(parents=True, exist_ok=True)
        with atomic_file(memory / RUN_NOTE, "w") as stream:
            stream.write(folder)
    except OSError as error:
        log.warning("%s: %s; a worker that takes this one's place will have no copy of its state", memory, error.strerror)


def train_elastic(job: Training, comm: ElasticComm, member: Member, stop: StopRequest, open_run: Callable[[bool], None]) -> Outcome:
    """Trains through all changes of workers. CHANGE: this worker has left for good, the others go on.

    ``open_run`` is called when this worker knows its rank and the run's folder, in each generation, and told whether the run begins with it.
    Raises TrainingError on all workers where what the run ended with could not be written.
    """
    recall(job, member.memory)
    hooks: list[Hook] = []
    with watched(job, hooks):
        while True:
            member.ready()
            place = member.wait_place()
            try:
                comm.join(place)
                outcome = train_generation(job, member, place, hooks, stop, open_run)
                if outcome is Outcome.CHANGE:
                    leaving = end_in_order(job, member)
                    if leaving:
                        with watched(job, hooks):  # while this worker still has a rank
                            pass
                    comm.leave()
                    if leaving:
                        member.say("left")
                        return outcome
                    keep(job, member.memory)
                else:
                    with watched(job, hooks):
                        pass
                    with member.phase("other"):
                        lost = what_is_lost(job, outcome)
                    comm.barrier()  # nobody leaves while rank 0 still writes
                    comm.leave()
                    if lost or outcome is Outcome.DONE:
                        member.say("done")  # nobody is to try again
                    if lost:
                        raise TrainingError(lost)
                    return outcome
            except CommBroken as error:
                log.warning("generation %d broke after step %d: %s", place.generation, job.progress.step, str(error).splitlines()[0])
                member.broken()
                keep(job, member.memory)
                # In this block: the frames that it came through still hold what was handed to collectives.
                comm.leave()


def train_generation(
    job: Training, member: Member, place: Place, hooks: list[Hook], stop: StopRequest, open_run: Callable[[bool], None]
) -> Outcome:
    """Brings this generation's workers together, and trains until it ends."""
    last_step = job.recent[-1].step if job.recent else None
    start_logs(job.comm.rank(), job.comm.size())
    with member.phase("start"):
        begins = synchronise(job, place.run)
        note_run(job, member)
        open_run(begins)
        watch(job, hooks, last_step)
    if place.stop:
        with member.phase("other"):
            job.save_checkpoint(whole_state(job))
        return Outcome.STOPPED
    if is_finished(job):
        if not begins:  # rank 0 may have died before it had written the last checkpoint
            with member.phase("other"):
                job.save_checkpoint(whole_state(job))
        return Outcome.DONE
    return train(job, hooks, stop)


def watch(job: Training, hooks: list[Hook], last_step: int | None) -> None:
    """Hooks for a worker that begins, more of them for one that has become rank 0; the others hear what they missed since ``last_step``."""
    if not hooks:
        hooks += build_hooks(job)
        for hook in hooks:
            hook.before_train()
        return
    missed = [record for record in job.recent if last_step is not None and record.step > last_step]
    for hook in hooks:
        hook.after_change()
        for record in missed:
            hook.missed_step(record)
    if job.comm.rank() == 0 and not any(isinstance(hook, RecordFigures) for hook in hooks):
        recording = build_recording_hooks(job)
        for hook in recording:
            hook.before_train()
        hooks += recording


def end_in_order(job: Training, member: Member) -> bool:
    """What workers that leave for good have not sent yet goes to one that stays. Whether this worker leaves."""
    member.wait_change()
    hand_over(job.compressor, job.comm, member.leaving)
    if member.leaving:
        keep(job, member.memory)  # earlier copies hold what has been handed over: a worker that takes this slot would send it again
    return member.leaving


def hand_over(compressor: Compressor, comm: Comm, leaves: bool) -> None:
    """The residuals of workers that leave are added to those of the first that stays, where one does.

    Nobody changes anything before all of them have arrived: if this breaks off, every residual is its owner's still, and no other's besides.
    """
    rank, own = comm.rank(), compressor.rank_state_dict()
    everyone = comm.allgather_object((leaves, bool(own)))
    heir = next((other for other, (other_leaves, _) in enumerate(everyone) if not other_leaves), None)
    givers = [giver for giver, (giver_leaves, has_residuals) in enumerate(everyone) if giver_leaves and has_residuals]
    if heir is None or not givers:
        return
    sums = dict(own)
    for giver in givers:
        given = broadcast_state(own if rank == giver else None, comm, giver)
        if rank == heir:
            sums |= {name: sums[name] + part.to(sums[name].device) if name in sums else part for name, part in given.items()}
    comm.barrier()
    if rank == heir:
        compressor.load_rank_state_dict(sums)
    elif rank in givers:
        compressor.load_rank_state_dict({})


def state_at_mark(job: Training) -> dict[str, Any]:
    """What ``commit.local_state`` gives, of this worker's last update."""
    state = local_state(job)
    buffers = {name: kept for (name, _), kept in zip(job.model.named_buffers(), job.standing.buffers, strict=True)}
    state["shared"] |= job.standing.figures
    state["shared"]["model"] = {name: buffers.get(name, value) for name, value in state["shared"]["model"].items()}
    state["own"]["buffers"] = buffers
    return state

"""The train command: what comes before the loop. Nothing is written before everything that the user gave has been looked at.

A new run's folder alone is made earlier, empty: its name is taken by that.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
from collections.abc import Callable
from functools import partial

import cv2
import torch

from horoyolo import __version__
from horoyolo.config import AUTO_BATCH, AgreedError, Config, check_elastic
from horoyolo.data.cache import Beat, nothing
from horoyolo.data.loader import ending
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import DataSpec, load_data_spec
from horoyolo.distributed.comm import look_up_own_name, open_comm
from horoyolo.elastic.member import Member, open_member
from horoyolo.elastic.state import ElasticComm
from horoyolo.engine.auto_batch import settle_batch
from horoyolo.engine.build import Training, build_model_for, build_training
from horoyolo.engine.device import cycle_time_ms, numerics_for, pick_device
from horoyolo.engine.generations import train_elastic
from horoyolo.engine.state import TrainingError
from horoyolo.engine.stop import stop_on_signals
from horoyolo.engine.synchronise import synchronise
from horoyolo.engine.train import Outcome, is_finished, train, watched, what_is_lost
from horoyolo.engine.unreadable import check_share
from horoyolo.engine.watch import build_hooks
from horoyolo.model.yolo import YOLO
from horoyolo.report.logs import log_to_file, start_logs
from horoyolo.report.monitor import import_writers

log = logging.getLogger("horoyolo")


def start_training(config: Config, on_ready: Callable[[], None], elastic: bool = False) -> bool:
    """Trains as ``config`` says. True: done; False: stopped on request, to be resumed.

    ``on_ready`` is called when signals are understood as requests to stop. ``elastic``: as one worker of an elastic job, started by its agent.
    Raises InputError for what the user should mend, before anything is written; TrainingError where training can't go on, or what it ended with
    could not be written.
    """
    member = open_member(os.environ) if elastic else None
    spec = load_data_spec(config.data, config.input.single_cls)
    model = build_model_for(config, spec.classes)
    cv2.setNumThreads(1)  # images are decoded beside the network's own threads
    if member is not None:
        return start_member(config, spec, model, member, on_ready)
    comm = open_comm(cycle_time_ms(config))
    start_logs(comm.rank(), comm.size())
    if 0 < config.batch < comm.size():
        raise AgreedError(f"batch = {config.batch} over {comm.size()} workers; at least one image for each is wanted")
    numerics = numerics_for(pick_device(config.device, comm.local_rank()), config.precision)
    splits = scan(spec, config)
    if config.batch == AUTO_BATCH:
        config = dataclasses.replace(config, batch=settle_batch(config, comm, numerics, model, len(splits[0])))
    job = build_training(config, comm, numerics, model, *splits, num_local=comm.local_size())
    with ending(job.loader, job.val_loader):
        begins = synchronise(job)
        if is_finished(job):
            log.info("%s: finished already, after %d epochs", job.run.folder, job.sampler.epoch)
            return True
        open_folder(job, begins)
        hooks = build_hooks(job)
        with stop_on_signals() as stop, watched(job, hooks):
            on_ready()
            for hook in hooks:
                hook.before_train()
            outcome = train(job, hooks, stop)
    lost = what_is_lost(job, outcome)
    comm.barrier()  # nobody leaves while rank 0 still writes: a launcher takes the first exit for the end
    comm.close()
    if lost:
        raise TrainingError(lost)
    return outcome is Outcome.DONE


def start_member(config: Config, spec: DataSpec, model: YOLO, member: Member, on_ready: Callable[[], None]) -> bool:
    """As ``start_training``, among workers that come and go. All that takes long is done before the others are asked for a place."""
    check_elastic(config)
    if int(os.environ.get("HOROVOD_CROSS_SIZE", "1")) > 1:
        look_up_own_name(several_hosts=True)  # now: in a generation it would break the others' work
    start_logs(rank=None, size=2)
    numerics = numerics_for(pick_device(config.device, member.slot), config.precision)
    comm = ElasticComm(member, cycle_time_ms(config))
    splits = scan(spec, config, beat=partial(member.enter, "start"))
    job = build_training(config, comm, numerics, model, *splits, num_local=member.slots, member=member)
    import_writers()  # by now, since any worker may become rank 0

    with ending(job.loader, job.val_loader), stop_on_signals() as stop:
        on_ready()
        return train_elastic(job, comm, member, stop, partial(open_folder, job)) is not Outcome.STOPPED


def scan(spec: DataSpec, config: Config, beat: Beat = nothing) -> tuple[Split, Split]:
    """The images and labels that training reads (InputError: too many are bad); ``beat`` is called again and again meanwhile."""
    splits = scan_split(spec, "train", beat=beat), scan_split(spec, "val", beat=beat)
    for split in splits:
        check_share(split.report, config.max_bad_share)
    return splits


def open_folder(job: Training, begins: bool) -> None:
    """The run's folder, made by rank 0, with a log of every worker; every worker calls it.

    Where the run ``begins`` and there can be no folder, all raise AgreedError; later a disk that is full stops nobody.
    """
    comm, run = job.comm, job.run
    failed = ""
    if comm.rank() == 0:
        try:
            run.create(job.config)
            if begins:
                run.clear(anew=job.progress.step == 0)
        except OSError as error:
            failed = f"run folder {run.folder}: {error.strerror} ({error.filename}); a disk with room, and the right to write there, are wanted"
            if begins:
                run.give_up()
    if begins:
        failed = comm.broadcast_object(failed)
        if failed:
            raise AgreedError(failed)
    try:
        log_to_file(run.logs, comm.rank())
    except OSError as error:
        failed = f"no log of this worker: {error}"
    if failed:
        log.error("%s; training goes on", failed)
    log.info("horoyolo %s, torch %s, %s on %s", __version__, torch.__version__, job.numerics.describe(), platform.node())
    log.info("%d workers, %d images in a global batch, run folder %s", comm.size(), job.config.batch, job.run.folder)

"""The train command: what comes before the loop. Nothing is written before everything that the user gave has been looked at."""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Callable
from typing import TypeVar

import cv2
import torch

from horoyolo import __version__
from horoyolo.config import AUTO_BATCH, Config, InputError
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.distributed.comm import Comm, open_comm
from horoyolo.engine.auto_batch import settle_batch
from horoyolo.engine.build import Training, build_model_for, build_training
from horoyolo.engine.device import cycle_time_ms, numerics_for, pick_device
from horoyolo.engine.stop import stop_on_signals
from horoyolo.engine.synchronise import synchronise
from horoyolo.engine.train import train
from horoyolo.engine.unreadable import check_share
from horoyolo.engine.watch import build_hooks
from horoyolo.report.logs import log_to_file, start_logs

log = logging.getLogger("horoyolo")

T = TypeVar("T")


def start_training(config: Config, on_ready: Callable[[], None]) -> bool:
    """Trains as ``config`` says. True: done; False: stopped on request, to be resumed.

    ``on_ready`` is called when signals are understood as requests to stop.
    Raises InputError for what the user should mend, before anything is written.
    """
    spec = load_data_spec(config.data)
    model = build_model_for(config, spec.num_classes, spec.names)
    comm = open_comm(cycle_time_ms(config))
    start_logs(comm.rank(), comm.size())
    if 0 < config.batch < comm.size():
        raise InputError(f"batch = {config.batch} over {comm.size()} workers; at least one image for each is wanted")
    cv2.setNumThreads(1)  # images are decoded beside the network's own threads
    numerics = numerics_for(pick_device(config.device, comm.local_rank()), config.precision)
    splits = once_per_host(comm, lambda: (scan_split(spec, "train"), scan_split(spec, "val")))
    if config.batch == AUTO_BATCH:
        config = dataclasses.replace(config, batch=settle_batch(config, comm, numerics, model, len(splits[0])))
    for split in splits:
        check_share(split.report, config.max_bad_share)
    job = build_training(config, comm, numerics, model, *splits, num_local=comm.local_size())
    synchronise(job)
    if is_finished(job):
        log.info("%s: finished already, after %d epochs", job.run.folder, job.sampler.epoch)
        return True
    open_folder(job)
    for split in splits:
        for line in split.report.lines():
            log.info("%s", line)
    with stop_on_signals() as stop:
        on_ready()
        finished = train(job, build_hooks(job), stop)
    comm.barrier()  # nobody leaves while rank 0 still writes: a launcher takes the first exit for the end
    comm.close()
    return finished


def is_finished(job: Training) -> bool:
    """Whether nothing is left to train: all epochs are done, or scores no longer rose."""
    return job.sampler.epoch >= job.config.epochs or job.progress.out_of_patience(job.config.recipe.patience)


def open_folder(job: Training) -> None:
    """The run's folder, made by rank 0, with a log of every worker."""
    comm = job.comm
    if comm.rank() == 0:
        job.run.create(job.config)
    log_to_file(job.run.logs, comm.rank())
    log.info("horoyolo %s, torch %s, %s on %s", __version__, torch.__version__, job.numerics.describe(), platform.node())
    log.info("%d workers, %d images in a global batch, run folder %s", comm.size(), job.config.batch, job.run.folder)


def once_per_host(comm: Comm, scan: Callable[[], T]) -> T:
    """``scan`` by the first worker of each host, then by the others, which find its cache."""
    result = scan() if comm.local_rank() == 0 else None
    comm.barrier()
    return scan() if result is None else result

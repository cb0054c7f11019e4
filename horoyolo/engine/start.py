"""The train command: what comes before the loop. Nothing is written before everything that the user gave has been looked at."""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import cv2
import torch

from horoyolo import __version__
from horoyolo.config import AUTO_BATCH, Config, InputError
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.distributed.comm import Comm, open_comm
from horoyolo.engine.auto_batch import settle_batch
from horoyolo.engine.build import build_model_for, build_training
from horoyolo.engine.device import cycle_time_ms, numerics_for, pick_device
from horoyolo.engine.runs import open_run
from horoyolo.engine.state import Progress
from horoyolo.engine.stop import stop_on_signals
from horoyolo.engine.train import train
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
    train_split, val_split = once_per_host(comm, lambda: (scan_split(spec, "train"), scan_split(spec, "val")))
    check_agreement(comm, train_split.content_hash + val_split.content_hash)
    if config.batch == AUTO_BATCH:
        config = dataclasses.replace(config, batch=settle_batch(config, comm, numerics, model, len(train_split)))
    run = comm.broadcast_object(open_run(config) if comm.rank() == 0 else None)
    if run.resumed is not None and is_finished(run.resumed, config):
        log.info("%s: finished already, after %d epochs", run.folder, run.resumed["sampler"]["epoch"])
        return True

    job = build_training(config, comm, numerics, run, model, train_split, val_split)
    if comm.rank() == 0:
        run.create(config)
    log_to_file(run.logs, comm.rank())
    for line in (*train_split.report.lines(), *val_split.report.lines()):
        log.info("%s", line)
    log.info("horoyolo %s, torch %s, %s on %s", __version__, torch.__version__, numerics.describe(), platform.node())
    log.info("%d workers, %d images in a global batch, run folder %s", comm.size(), config.batch, run.folder)
    with stop_on_signals() as stop:
        on_ready()
        finished = train(job, build_hooks(job), stop)
    comm.barrier()  # nobody leaves while rank 0 still writes: a launcher takes the first exit for the end
    comm.close()
    return finished


def is_finished(state: dict[str, Any], config: Config) -> bool:
    """Whether a checkpoint's state has nothing left to train: all epochs are done, or scores no longer rose."""
    return state["sampler"]["epoch"] >= config.epochs or Progress(**state["progress"]).out_of_patience(config.recipe.patience)


def once_per_host(comm: Comm, scan: Callable[[], T]) -> T:
    """``scan`` by the first worker of each host, then by the others, which find its cache."""
    result = scan() if comm.local_rank() == 0 else None
    comm.barrier()
    return scan() if result is None else result


def check_agreement(comm: Comm, content_hash: str) -> None:
    """Raises InputError when workers see different data."""
    hashes = comm.allgather_object((platform.node(), content_hash))
    for host, other in hashes:
        if other != hashes[0][1]:
            raise InputError(f"the data set on {host} differs from that on {hashes[0][0]} (images, sizes or labels): copy it again")

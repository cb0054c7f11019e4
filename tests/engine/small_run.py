"""A whole small run inside one process, or one worker of it."""

from __future__ import annotations

from pathlib import Path

from horoyolo.config import Config, override
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.distributed.comm import Comm
from horoyolo.engine.build import Training, build_model_for, build_training
from horoyolo.engine.device import numerics_for, pick_device
from horoyolo.engine.start import open_folder
from horoyolo.engine.synchronise import synchronise


def build_job(data: Path, project: Path, comm: Comm, **values: object) -> Training:
    """A run with an update each step of 2 images, resumed where ``project`` has one of that ``name``; ``values`` are its other settings."""
    config = Config(data=str(data), cfg="yolov5n", img=64, batch=2, epochs=3, workers=0, precision="fp32", project=str(project), resume="auto")
    config = override(config, {"evaluate_every": 9, "optim.nominal_batch": 0, **values}, "test")
    spec = load_data_spec(config.data)
    splits = [scan_split(spec, name) for name in ("train", "val")]
    model = build_model_for(config, spec.classes)
    numerics = numerics_for(pick_device("cpu", 0), config.precision)
    job = build_training(config, comm, numerics, model, *splits, num_local=1)
    open_folder(job, begins=synchronise(job))
    return job

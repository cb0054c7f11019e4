"""A whole small run inside the test's own process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from horoyolo.config import Config, override
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import write_synthetic
from horoyolo.distributed.comm import LocalComm
from horoyolo.engine.build import Training, build_model_for, build_training
from horoyolo.engine.device import numerics_for, pick_device
from horoyolo.engine.start import open_folder
from horoyolo.engine.synchronise import synchronise


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data.yaml of 8 images to train on and 2 to evaluate."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    write_synthetic(folder, 10, seed=0)
    return folder / "data.yaml"


@pytest.fixture
def open_job(tiny: Path, tmp_path: Path) -> Callable[..., Training]:
    """``open_job(key=value, ...)``: one worker's run over ``tiny``, 4 steps of 2 images an epoch, each an update; resumed where it was begun."""

    def build(**values: object) -> Training:
        config = Config(data=str(tiny), cfg="yolov5n", img=64, batch=2, epochs=3, workers=0, precision="fp32", project=str(tmp_path), resume="auto")
        config = override(dataclasses.replace(config, evaluate_every=3), {"optim.nominal_batch": 0, **values}, "test")
        spec = load_data_spec(config.data)
        splits = [scan_split(spec, name) for name in ("train", "val")]
        model = build_model_for(config, spec.num_classes, spec.names)
        numerics = numerics_for(pick_device("cpu", 0), config.precision)
        job = build_training(config, LocalComm(), numerics, model, *splits, num_local=1)
        synchronise(job)
        open_folder(job)
        return job

    return build

"""kill -9 at random moments of checkpoint writing: does every run go on from a whole checkpoint?

    python scripts/kill_while_writing.py [--kills 100] [--seed 0]

A run's process writes checkpoints of a YOLOv5n and its optimizer, one after the other, as training does, and is killed somewhere between the first
byte of one and the deletion of the oldest. Then ``--resume auto`` is asked for the run, in a folder full of what the killed ones left behind. It must
find the last checkpoint that was complete, or the one under way, with the bytes that were written. Exit status 0: all of them did.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from horoyolo.config import Config
from horoyolo.engine.checkpoint import serialised, write_checkpoint
from horoyolo.engine.runs import Run, open_run
from horoyolo.model.yolo import load_layer_table, model_from_table

KEEP = 2
TENSORS = ("model", "ema", "optimizer")
BEGUN, COMPLETE = b"b", b"c"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(parsed.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = Config(data="data.yaml", cfg="yolov5n", project=folder, name="run", resume="auto")
        run = Run(Path(folder) / "run")
        run.create(config)
        state = a_state()
        content = content_of(state, step=1)
        started_s = time.perf_counter()
        write_checkpoint(run.checkpoints, content, 1, KEEP, {})
        whole_s = time.perf_counter() - started_s
        last, resumed, torn, found = 1, 0, 0, Counter[str]()
        for _ in range(parsed.kills):
            last += kill_a_writer(run, state, last, draw.uniform(0, 1.2 * whole_s))
            torn += bool(list(run.checkpoints.glob(".*.tmp")))
            step = step_of(open_run(config).resumed)
            found["the last complete one" if step == last else "the one under way" if step == last + 1 else f"{step} after {last}"] += 1
            resumed += step in (last, last + 1)
            last = step or last
        print(f"{resumed} of {parsed.kills} runs resumed, from {', '.join(f'{what} {count}' for what, count in found.items())}")
        print(f"writing one takes {whole_s * 1e3:.0f} ms; {torn} times a part of a file was left behind")
    return 0 if resumed == parsed.kills else 1


def a_state() -> dict[str, Any]:
    """What a checkpoint of YOLOv5n holds, about: weights, their average, momentum."""
    model = model_from_table(load_layer_table("yolov5n"), 3, {0: "a", 1: "b", 2: "c"})
    weights = model.state_dict()
    return {part: {name: tensor.clone() for name, tensor in weights.items()} for part in TENSORS} | {"progress": {"step": 0}}


def content_of(state: dict[str, Any], step: int) -> memoryview:
    """The bytes of a checkpoint whose every value says which step it is of."""
    state["progress"]["step"] = step
    for part in TENSORS:
        for tensor in state[part].values():
            tensor.fill_(step % 1000)
    return serialised(state)


def step_of(state: dict[str, Any] | None) -> int | None:
    """The step of a resumed state; None where there is none or any value is of another step."""
    if state is None:
        return None
    step = state["progress"]["step"]
    whole = all(bool((tensor == step % 1000).all()) for part in TENSORS for tensor in state[part].values())
    return step if whole else None


def kill_a_writer(run: Run, state: dict[str, Any], last: int, after_s: float) -> int:
    """Starts a process that writes the checkpoints after ``last`` and kills it ``after_s`` into one of them; gives how many it had completed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(last + 1, last + 100):
            content = content_of(state, step)
            os.write(writer, BEGUN)
            write_checkpoint(run.checkpoints, content, step, KEEP, {})
            os.write(writer, COMPLETE)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = b""
    while more := os.read(reader, 100):
        told += more
    os.close(reader)
    return told.count(COMPLETE)


if __name__ == "__main__":
    sys.exit(main())

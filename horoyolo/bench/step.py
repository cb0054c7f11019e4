"""``bench step``: how long a training step takes on this device, by precision and memory layout or by size and batch, in turn and side by side."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from horoyolo.bench.figures import machine, paired_ratio, settings, spread
from horoyolo.bench.links import sent_bytes
from horoyolo.config import Config, Hyper, Optim
from horoyolo.engine.build import build_loss
from horoyolo.engine.device import Numerics, numerics_for, pick_device
from horoyolo.engine.memory import peak_bytes
from horoyolo.engine.optimizer import build_optimizer
from horoyolo.files import write_json
from horoyolo.model.yolo import build_model

WARMUP_STEPS = 3
VARIANTS = {
    "fp32 NCHW": (torch.float32, torch.contiguous_format),
    "fp32 channels_last": (torch.float32, torch.channels_last),
    "bf16 NCHW": (torch.bfloat16, torch.contiguous_format),
    "bf16 channels_last": (torch.bfloat16, torch.channels_last),
}


class Exchange(Protocol):
    """What a step does with its gradients between backward and the optimizer."""

    def arm(self) -> None:
        """The backward that follows is the last of this update."""

    def finish(self) -> object:
        """Gradients are summed when this returns."""

    def measure(self) -> None:
        """The update is over: what it cost is known."""


@dataclass
class Stepper:
    """A model with images and labels of its own, ready to take training steps; ``exchange`` None: gradients stay here."""

    numerics: Numerics
    cfg: str
    img: int
    batch: int
    seed: int = 0
    exchange: Exchange | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        hyper = Hyper()
        self.model = build_model(self.cfg, 80).to(self.numerics.device, memory_format=self.numerics.memory_format).train()  # type: ignore[call-overload]
        self.loss = build_loss(Config(img=self.img, hyp=hyper), self.model)
        # At a rate of zero weights stay as they are: whoever comes later meets the same gradients, and nothing overflows.
        self.optimizer = build_optimizer(self.model, Optim(), 0.0, hyper.momentum, hyper.weight_decay)
        self.images = torch.randint(0, 256, (self.batch, 3, self.img, self.img), dtype=torch.uint8)
        # Eight boxes of a fifth to a half of the image in each, as dense as in common data sets.
        boxes = torch.cat([torch.rand(8 * self.batch, 2) * 0.5 + 0.25, torch.rand(8 * self.batch, 2) * 0.3 + 0.2], 1)
        number = torch.arange(self.batch).repeat_interleave(8)[:, None].float()
        self.targets = torch.cat([number, torch.randint(0, 80, (8 * self.batch, 1)).float(), boxes], 1)
        grids = [(self.img // stride, self.img // stride) for stride in self.model.strides]
        self.positives = self.loss.count_positives(self.targets, grids).to(self.numerics.device)

    def step(self) -> None:
        """Forward, loss, backward, exchange where there is one, optimizer step."""
        self.optimizer.zero_grad()
        with self.numerics.autocast():
            heads = self.model(self.numerics.as_input(self.images))
        losses = self.loss(heads, self.targets.to(self.numerics.device), self.positives, self.batch)
        if self.exchange is not None:
            self.exchange.arm()
        (losses.sum() * self.batch).backward()
        if self.exchange is not None:
            self.exchange.finish()
        self.optimizer.step()
        if self.exchange is not None:
            self.exchange.measure()

    def seconds(self, steps: int) -> list[float]:
        """The time of each of ``steps`` steps."""
        times = []
        for _ in range(steps):
            started_s = time.perf_counter()
            self.step()
            if self.numerics.device.type == "cuda":
                torch.cuda.synchronize(self.numerics.device)
            times.append(time.perf_counter() - started_s)
        return times

    def measure(self, steps: int, barrier: Callable[[], object], nic: str = "") -> dict[str, float]:
        """The median time of ``steps`` steps that all workers begin together, and the bytes of each that this host sent over ``nic``."""
        barrier()
        before = sent_bytes(nic)
        times = self.seconds(steps)
        barrier()  # all has arrived, so all has been sent
        return {"step_s": statistics.median(times), "interface_bytes": (sent_bytes(nic) - before) / steps}


def variant_name(precision: str, layout: str) -> str:
    """Which of VARIANTS a ``--precision`` means on this machine's CPU."""
    dtype = numerics_for(torch.device("cpu"), precision).dtype
    return f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} {layout}"


def bench_step(parsed: argparse.Namespace) -> dict[str, Any]:
    """Times precisions and layouts, or sizes and batches where several are given; prints the table, writes the JSON, and gives what it holds."""
    device = pick_device(parsed.device, 0)
    print(f"{parsed.cfg}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    bench = bench_variants if len(parsed.img) == len(parsed.batch) == 1 else bench_sizes
    report = {"machine": machine(), "settings": settings(parsed), "variants": bench(parsed, device)}
    if parsed.json:
        write_json(parsed.json, report)
    return report


def bench_variants(parsed: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every precision and layout on one size: median seconds and rates."""
    (img,), (batch,) = parsed.img, parsed.batch
    print(f"{img} px, {batch} images a step")
    steppers = {name: Stepper(Numerics(device, dtype, layout), parsed.cfg, img, batch) for name, (dtype, layout) in VARIANTS.items()}
    for stepper in steppers.values():
        stepper.seconds(WARMUP_STEPS)
    return table(alternate(steppers, parsed.repeats, parsed.steps), batch, baseline=next(iter(VARIANTS)))


def bench_sizes(parsed: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Each image size with each batch, as training would compute it: median seconds, images a second, and the memory of a step.

    What a batch costs in accuracy is not measured here; what a size gains is a training's to say.
    """
    numerics = numerics_for(device, parsed.precision)
    sizes = sorted(((img, batch) for img in parsed.img for batch in parsed.batch), key=lambda size: size[0] ** 2 * size[1])
    steppers, memory = {}, {}
    for img, batch in sizes:  # the small ones first: a peak is told apart only from lower ones
        name = f"{img} px, batch {batch}"
        steppers[name] = Stepper(numerics, parsed.cfg, img, batch)
        memory[name] = peak_bytes(device, functools.partial(steppers[name].seconds, WARMUP_STEPS))
    times = alternate(steppers, parsed.repeats, parsed.steps)
    print(f"{numerics.describe()}\n{'':24}{'ms a step':>10}{'min':>8}{'max':>8}{'images/s':>10}{'ms an image':>13}{'peak MB':>9}")
    result: dict[str, Any] = {}
    for (img, batch), (name, values) in zip(sizes, times.items(), strict=True):
        result[name] = {**spread(values), "img": img, "batch": batch, "peak_bytes": memory[name]}
        median_s = result[name]["median_s"]
        figures = f"{median_s * 1e3:10.1f}{min(values) * 1e3:8.1f}{max(values) * 1e3:8.1f}{batch / median_s:10.1f}{median_s / batch * 1e3:13.1f}"
        print(f"{name:24}{figures}{memory[name] / 1e6:9.0f}")
    return result


def alternate(steppers: dict[str, Stepper], repeats: int, steps: int) -> dict[str, list[float]]:
    """The median time of ``steps`` steps of each, in turn, ``repeats`` times."""
    medians: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(repeats):
        for name, stepper in steppers.items():
            medians[name].append(statistics.median(stepper.seconds(steps)))
    return medians


def table(medians: dict[str, list[float]], images: int, baseline: str) -> dict[str, Any]:
    """Prints and gives each variant's median of medians, its spread and its rate against the baseline, paired repeat by repeat."""
    result: dict[str, Any] = {}
    print(f"{'':34}{'ms a step':>10}{'min':>8}{'max':>8}{'images/s':>10}{'  against ' + baseline:>26}")
    for name, values in medians.items():
        ratio = paired_ratio(values, medians[baseline])
        result[name] = {**spread(values), "rate_ratio": ratio}
        median_s = result[name]["median_s"]
        print(f"{name:34}{median_s * 1e3:10.1f}{min(values) * 1e3:8.1f}{max(values) * 1e3:8.1f}{images / median_s:10.1f}{ratio:25.2f}x")
    return result

"""One worker of ``bench compression``: takes training steps with every way to sum gradients in turn, and reports what each cost."""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from horoyolo.bench.step import VARIANTS, WARMUP_STEPS, Stepper
from horoyolo.bench.talk import report
from horoyolo.bench.timing import Costs, TimedCompressor
from horoyolo.compression.base import Compressor
from horoyolo.compression.build import AUTO, build_compressor
from horoyolo.config import Comms, Config
from horoyolo.distributed.comm import Comm, broadcast_tensors, open_comm
from horoyolo.distributed.exchange import Exchange
from horoyolo.engine.device import Numerics, cycle_time_ms

AUTO_STEPS = 50  # in which auto must have made its choice
FEEDBACK_UPDATES = 10  # over which the mean of sums is compared


@dataclass
class Row:
    """A way to sum, when buckets leave, and its compressor, which keeps its state from turn to turn."""

    name: str
    comms: Comms
    overlaps: tuple[bool, ...]
    costs: Costs = field(default_factory=Costs)
    compressor: Compressor = field(init=False)
    is_new: bool = True

    def __post_init__(self) -> None:
        self.compressor = self.build()

    def build(self) -> Compressor:
        """A compressor in its steady state: without its warm-up."""
        return build_compressor(replace(self.comms, warmup_updates=0), self.overlaps)

    def warmup_steps(self, measured: int) -> int:
        """Steps before the clock runs on ``measured`` ones: the first ones, or one or two to come back to the caches.

        So a turn has an odd number of them: what alternates from one update to the next, as powersgd does, begins each turn with the other kind.
        """
        steps = 1 + measured % 2 if not self.is_new else AUTO_STEPS if self.comms.compression == AUTO else WARMUP_STEPS
        self.is_new = False
        return steps


def main() -> None:
    """Parses the words that ``bench compression`` gives its workers, and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True)
    parser.add_argument("--img", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--first-repeat", type=int, default=0, help="its number, where other jobs had those before it")
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--nic", default="", help="count what this interface sends")
    parser.add_argument("--errors", action="store_true", help="measure the error of the sums too")
    parser.add_argument("--rows", required=True, help="JSON: name, Comms and overlaps of each row")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    comm = open_comm(cycle_time_ms(Config(device="cpu")))
    rows = [Row(name, Comms(**comms), tuple(overlaps)) for name, comms, overlaps in json.loads(parsed.rows)]
    stepper = Stepper(Numerics(torch.device("cpu"), *VARIANTS[parsed.variant]), parsed.cfg, parsed.img, parsed.batch, seed=comm.rank())
    broadcast_tensors(stepper.model.state_dict().values(), comm)
    repeats = range(parsed.first_repeat, parsed.first_repeat + parsed.repeats)
    result: dict[str, Any] = {"rows": measure(rows, stepper, comm, repeats, parsed.steps, parsed.nic)}
    if parsed.errors:
        result["errors"] = gradient_errors(rows, stepper, comm)
    if comm.rank() == 0:
        report(result)
    comm.barrier()
    comm.close()


def measure(rows: list[Row], stepper: Stepper, comm: Comm, repeats: Iterable[int], steps: int, nic: str) -> dict[str, dict[str, list[float]]]:
    """Row -> figure -> its value in each repeat: medians of a step, means of its parts, all in turn within each repeat.

    Each time in another order, the same on all workers: what a row leaves behind in caches and in the network would fall on the same one always.
    """
    figures: dict[str, dict[str, list[float]]] = {row.name: defaultdict(list) for row in rows}
    for repeat in repeats:
        for row in random.Random(repeat).sample(rows, len(rows)):
            exchange = _exchange(row.compressor, row.costs, row.comms, stepper, comm)
            stepper.exchange = exchange
            stepper.seconds(row.warmup_steps(steps))
            row.costs.clear()
            measured = {**stepper.measure(steps, comm.barrier, nic), **row.costs.per_update()}
            exchange.close()
            for name, value in measured.items():
                figures[row.name][name].append(value)
    return figures


def gradient_errors(rows: list[Row], stepper: Stepper, comm: Comm) -> dict[str, dict[str, float]]:
    """How far each way's sum is from the true one, as a part of its norm: of one update of a new compressor, and of the mean over several
    updates of the same gradients, where error feedback has sent what the first ones left out. Of auto there is none: it tries others in these."""
    stepper.exchange = None
    stepper.step()
    own = {name: param.grad.clone() for name, param in stepper.model.named_parameters() if param.grad is not None}
    flat = comm.allreduce(torch.cat([grad.flatten() for grad in own.values()]), name="true")
    parts = flat.split([grad.numel() for grad in own.values()])
    true = {name: part.view(own[name].shape) for name, part in zip(own, parts, strict=True)}
    errors: dict[Comms, dict[str, float]] = {}  # when buckets leave makes no difference
    for row in rows:
        if row.comms in errors or row.comms.compression == AUTO:
            continue
        exchange = _exchange(row.build(), Costs(), row.comms, stepper, comm)
        mean = {name: torch.zeros_like(grad) for name, grad in true.items()}
        first = 0.0
        for update in range(FEEDBACK_UPDATES):
            for name, param in stepper.model.named_parameters():
                param.grad = own[name].clone()
            exchange.arm()
            exchange.finish()
            exchange.measure()
            sums = {name: param.grad for name, param in stepper.model.named_parameters() if param.grad is not None}
            first = _distance(sums, true) if update == 0 else first
            for name, grad in sums.items():
                mean[name] += grad / FEEDBACK_UPDATES
        exchange.close()
        errors[row.comms] = {"error": first, "error_with_feedback": _distance(mean, true)}
    return {row.name: errors[row.comms] for row in rows if row.comms in errors}


def _exchange(compressor: Compressor, costs: Costs, comms: Comms, stepper: Stepper, comm: Comm) -> Exchange:
    return Exchange(stepper.model.named_parameters(), TimedCompressor(compressor, costs), comm, comms.bucket_mb)


def _distance(sums: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm of what is true."""
    difference = torch.stack([torch.linalg.vector_norm(sums[name] - true[name]) for name in true])
    whole = torch.stack([torch.linalg.vector_norm(grad) for grad in true.values()])
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(whole))


def row_words(rows: list[tuple[str, Comms, tuple[bool, ...]]]) -> list[str]:
    """The words that tell a worker its rows."""
    return ["--rows", json.dumps([[name, asdict(comms), overlaps] for name, comms, overlaps in rows])]


if __name__ == "__main__":
    main()

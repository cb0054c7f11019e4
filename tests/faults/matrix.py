"""The fault matrix as a command: ``scripts/faults.sh``. Runs rows in a lab of three hosts and prints what happened as a table."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "lab"), str(HERE.parents[1])]

from netlab import Lab, LabError  # noqa: E402
from rig import Control, Failed, Rig, read_rows  # noqa: E402
from rows import ROWS, Result, Row  # noqa: E402
from stock import STOCK, NotStarted  # noqa: E402

from horoyolo.data.synthetic import write_synthetic  # noqa: E402

NUM_IMAGES = 200  # 160 to train on: ten global batches
CONTROL_STEPS = 150  # more than any row makes


def main(words: list[str]) -> int:
    """0: every row held each time."""
    parser = argparse.ArgumentParser(prog="scripts/faults.sh", description="Faults done to an elastic training on three hosts of a lab. Needs root.")
    parser.add_argument("--rows", nargs="+", default=None, metavar="ROW", help=f"some of {' '.join(row.number for row in ROWS)}")
    parser.add_argument("--repeat", type=int, default=1, help="all of it so often")
    parser.add_argument("--control", type=int, default=CONTROL_STEPS, metavar="STEPS", help="of the undisturbed run that all are compared with")
    parser.add_argument("--stock", action="store_true", help="after that, what stock Horovod does in the rows that a plain script shows")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--keep", default="", metavar="DIR", help="leave run folders and logs there; the undisturbed run is used again")
    parsed = parser.parse_args(words)
    unknown = set(parsed.rows or []) - {row.number for row in ROWS}
    if unknown:
        parser.error(f"no row {' '.join(sorted(unknown))}")
    chosen = [row for row in ROWS if parsed.rows is None or row.number in parsed.rows]

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name, Lab.up(3) as lab:
        folder = Path(parsed.keep or name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rig = new_rig(lab, folder, parsed.control)
        for repeat in range(parsed.repeat):
            for row in chosen:
                if not lab.is_up():
                    raise LabError("the lab is gone")
                began_s = time.monotonic()
                found.append({"row": row.number, "fault": row.fault, "expected": row.expected, "repeat": repeat + 1, **outcome(row, rig)})
                found[-1]["took_s"] = round(time.monotonic() - began_s, 1)
                print(line(found[-1]), file=sys.stderr, flush=True)
        stock = stock_results(lab, folder, [row.number for row in chosen]) if parsed.stock else {}
        if parsed.json:
            Path(parsed.json).write_text(json.dumps({"rows": found, "stock": stock}, indent=1))
    print(table(found, stock))
    return 0 if all(each["held"] for each in found) else 1


def new_rig(lab: Lab, folder: Path, control_steps: int) -> Rig:
    """Data and the undisturbed run, in ``folder``."""
    data = folder / "data"
    if not data.exists():
        write_synthetic(data, NUM_IMAGES, seed=0)
    kept = Control(read_rows(folder / "control" / "run" / "steps.csv"))  # by --keep
    (folder / "control").mkdir(exist_ok=True)
    control = kept if len(kept.rows) >= control_steps else Control.run(lab, data / "data.yaml", folder / "control", control_steps)
    return Rig(lab, data / "data.yaml", folder, control)


def outcome(row: Row, rig: Rig) -> dict[str, Any]:
    """What a row's check saw, and whether it held."""
    try:
        result = row.check(rig)
    except Failed as error:
        result, why = Result(str(error)), "failed"
    else:
        why = result.why_not()
    return {**asdict(result), "held": not why, "why_not": why}


def stock_results(lab: Lab, folder: Path, numbers: list[str]) -> dict[str, str]:
    """What stock Horovod did, by row."""
    results = {}
    for number, check in STOCK.items():
        if number in numbers:
            try:
                results[number] = check(lab, folder / f"stock-{number}")
            except NotStarted as error:
                results[number] = str(error)
            print(f"stock Horovod, row {number}: {results[number]}", file=sys.stderr, flush=True)
    return results


def images(account: dict[str, Any] | None) -> str:
    """Images that a ledger says were lost or used twice, as ``lost/repeated``."""
    if account is None:
        return "-"
    lost, double = (sum(span["stop"] - span["first"] for span in account[kind]) for kind in ("missing", "double"))
    return f"{lost}/{double}"


def line(found: dict[str, Any], stock: str = "") -> str:
    """One row of the table."""
    seconds = "-" if found["seconds"] is None else f"{found['seconds']:.2f}"
    weights = "-" if found["deviation"] is None else "yes" if found["deviation"] <= 1e-6 else f"no ({found['deviation']:.1g})"
    verdict = "held" if found["held"] else "FAILED"
    cells = [found["row"], found["fault"], found["expected"], found["happened"], seconds, images(found["account"]), weights]
    return "| " + " | ".join([*cells, " ".join(filter(None, [verdict, found["why_not"]])), stock]) + " |"


def table(found: list[dict[str, Any]], stock: dict[str, str]) -> str:
    """All rows."""
    head = "| row | fault | expected | happened | seconds to the first step | images lost/repeated | weights equal | verdict | stock Horovod |"
    return "\n".join([head, "|---" * 9 + "|", *(line(each, stock.get(each["row"], "")) for each in found)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

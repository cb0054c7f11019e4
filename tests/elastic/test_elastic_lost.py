"""A real run whose only agent is killed, and its worker with it: nobody is left who knows the state."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from elasticjob import wait_until

from horoyolo.data.synthetic import write_synthetic
from horoyolo.report.ledger import read_account

LOST = re.compile(r"ALL WORKERS WERE LOST: .*/run goes on from the checkpoint of step (\d+); (\d+) completed steps are lost and done again")


def agent_of(launcher: int) -> int | None:
    """The child of a launcher that is an agent."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if b"horoyolo.elastic.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    return None


def test_a_run_that_lost_everybody_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "data", 10, seed=0)
    settings = ["--set", "optim.nominal_batch=0", "--set", "workers=0", "--set", "evaluate_every=10000"]
    train = ["train", "--data", str(tmp_path / "data" / "data.yaml"), "--cfg", "yolov5n", "--img", "64", "--batch", "2", "--epochs", "10000"]
    words = [*train, "--project", str(tmp_path), "--name", "run", "--exist-ok", "--device", "cpu", *settings]
    run, log = tmp_path / "run", tmp_path / "log.txt"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "horoyolo", "launch", "--min-np", "1", "--max-np", "1", "--", *words]
        # One thread: where others take the cores, several wait for each other for longer than a step may take.
        launcher = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        manifest = run / "checkpoints" / "manifest.json"
        wait_until(lambda: manifest.exists() and len(json.loads(manifest.read_text())) > 1, 60, "no checkpoint")
        agent = agent_of(launcher.pid)
        assert agent is not None
        os.kill(agent, signal.SIGKILL)
        wait_until(lambda: LOST.search(log.read_text()), 60, "nobody went on")
        step, lost = map(int, LOST.findall(log.read_text())[0])
        wait_until(lambda: max(entry["step"] for entry in json.loads(manifest.read_text()).values()) > step + lost, 60, "no step after that")
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == 75, log.read_text()
    finally:
        launcher.kill()
        launcher.wait()
        print(log.read_text())  # shown when something did not happen
    assert step >= 8
    assert step % 4 == 0
    assert not list(tmp_path.glob("run?"))
    steps = [int(row["step"]) for row in csv.DictReader((run / "steps.csv").open())]
    assert steps == list(range(1, len(steps) + 1))
    account = read_account(run / "ledger.csv")
    assert account.exact
    assert account.redone_updates == (lost + 1 if lost else 0)  # the checkpoint's own update is said once more

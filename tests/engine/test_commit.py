"""Copies of a run's state: the newest whole one comes back, changed by nothing that happened since."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from horoyolo.engine.commit import Commits, copied, first_bad, restore
from horoyolo.engine.state import Progress, TrainState

Limit = Callable[[int], AbstractContextManager[None]]


def state_at(update: int) -> dict[str, Any]:
    return {"weights": torch.full((100, 3, 2, 2), float(update)).contiguous(memory_format=torch.channels_last), "list": [update, "x"]}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.stride() == right.stride()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
    return left == right


@pytest.mark.parametrize("on_files", [False, True])
def test_the_last_state_comes_back_as_it_was(tmp_path: Path, on_files: bool) -> None:
    commits = Commits(tmp_path / "memory" if on_files else None)
    assert commits.latest() is None
    for update in (5, 6, 7, 3):  # 3: a run that went back
        state = state_at(update)
        commits.save(state, update)
        state["weights"].zero_()
        state["list"].append("changed later")
        for _ in range(2):
            found = commits.latest()
            assert found is not None
            assert found[0] == update
            assert same(found[1], state_at(update))
            found[1]["weights"].zero_()  # the caller's own


def test_files_outlive_the_process_and_two_are_kept(tmp_path: Path) -> None:
    for update in range(5):
        Commits(tmp_path).save(state_at(update), update)
    assert len(list(tmp_path.iterdir())) == 2
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    found = Commits(tmp_path).latest()
    assert found is not None
    assert found[0] == 3
    assert same(found[1], state_at(3))


def test_whoever_is_killed_while_copying_leaves_a_whole_state(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from horoyolo.engine.commit import Commits\n"
        "commits = Commits(Path(sys.argv[1]))\n"
        "for update in range(10**6): commits.save({'weights': torch.full((300_000,), float(update))}, update); print(update, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        line = process.stdout.readline()
    time.sleep(0.0137)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].splitlines()
    said = int(rest[-1] if rest else line)
    found = Commits(tmp_path).latest()
    assert found is not None
    assert found[0] in (said, said + 1)
    assert torch.equal(found[1]["weights"], torch.full((300_000,), float(found[0])))


def test_a_full_folder_costs_the_copy_alone(tmp_path: Path, file_limit: Limit) -> None:
    commits = Commits(tmp_path)
    commits.save(state_at(1), 1)
    with file_limit(1000):
        commits.save(state_at(2), 2)
    found = commits.latest()
    assert found is not None
    assert found[0] == 1
    assert len(os.listdir(tmp_path)) == 1


def test_a_small_folder_is_left_to_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Copies leave a quarter of it free, or a gigabyte where it is large; else they are kept in the process."""
    mega, disk = 2**20, SimpleNamespace(total=0, free=0)
    monkeypatch.setattr("horoyolo.engine.commit.shutil.disk_usage", lambda folder: disk)
    state = {"weights": torch.zeros(mega)}
    for disk.total, least in ((64 * mega, 16 * mega), (2**40, 2**30)):
        disk.free, commits = least + 4 * mega, Commits(tmp_path)
        commits.save(state, 1)
        assert len(list(tmp_path.glob("commit-*.pt"))) == 1
        disk.free -= 1
        for update in (2, 3):
            commits.save(state, update)
        found = commits.latest()
        assert found is not None
        assert found[0] == 3
        assert not list(tmp_path.iterdir())
        assert Commits(tmp_path).latest() is None  # for whoever takes its place: nothing rather than what is long past
    assert [record.message.partition("; ")[0] for record in caplog.records] == [f"{tmp_path}: too little room for copies of the state"] * 2


def test_half_a_copy_of_one_that_was_killed_is_removed(tmp_path: Path) -> None:
    Commits(tmp_path).save(state_at(1), 1)
    (tmp_path / ".commit-00000001.pt.abc.tmp").write_bytes(b"half")
    found = Commits(tmp_path).latest()
    assert found is not None
    assert found[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["commit-00000000.pt"]


class Job:
    """The parts of a run that are copied, small."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.progress = Progress()
        self.state = TrainState(model=self.model, optimizer=self.optimizer, progress=self.progress)
        self.residual = torch.zeros(3)

    def rank_state(self) -> dict[str, Any]:
        return {"residual": self.residual}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        self.residual = state["residual"]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        self.residual.add_(1)
        self.progress.update += 1


def test_a_job_goes_back_to_its_commit_and_on_from_there() -> None:
    job, commits = Job(), Commits()
    job.step()
    commits.offer(job)
    for _ in range(2):  # what it goes on with is not what was kept
        for _ in range(3):
            job.step()
        after = copied(job.state.state_dict()), job.residual.clone()
        found = commits.latest()
        assert found is not None
        restore(job, found[1])
        assert job.progress.update == found[0] == 1
    for _ in range(3):
        job.step()
    assert first_difference(after[0], job.state.state_dict()) == ""
    assert torch.equal(after[1], job.residual)


def first_difference(left: Any, right: Any) -> str:
    if isinstance(left, dict):
        return next((f"{name}.{found}" for name in left if (found := first_difference(left[name], right[name]))), "")
    if isinstance(left, list):
        return next((f"{found}" for pair in zip(left, right, strict=True) if (found := first_difference(*pair))), "")
    equal = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return "" if equal else f"{left} != {right}"


def test_only_sound_states_are_kept_and_only_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0, perf_counter=lambda: clock.now_s)
    monkeypatch.setattr("horoyolo.engine.commit.time", clock)
    job, commits = Job(), Commits()
    monkeypatch.setattr(commits, "save", slow_save := SlowSave())
    commits.offer(job)
    assert slow_save.updates == [0]
    commits._due_s = 100 * 0.25  # a copy that took a quarter of a second
    for job.progress.update, clock.now_s in ((1, 24.9), (2, 25.1)):
        commits.offer(job)
    assert slow_save.updates == [0, 2]
    job.progress.skipped_updates, clock.now_s = 1, 1e6
    commits.offer(job)
    job.progress.skipped_updates = 0
    with torch.no_grad():
        job.model.bias[1] = float("nan")
    commits.offer(job)
    assert slow_save.updates == [0, 2]


class SlowSave:
    def __init__(self) -> None:
        self.updates: list[int] = []

    def __call__(self, state: dict[str, Any], update: int) -> None:
        self.updates.append(update)


def test_the_first_bad_tensor_is_named() -> None:
    tree = {"a": [torch.ones(2), torch.arange(3)], "b": {"c": torch.tensor([1.0, float("inf")]), "d": torch.tensor(float("nan"))}}
    assert first_bad(tree) == "b.c"
    assert first_bad(tree["a"]) == ""
    assert first_bad({"huge": torch.tensor([3e38, 3e38])}) == ""

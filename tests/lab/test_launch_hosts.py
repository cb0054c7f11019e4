"""``horoyolo launch`` on three hosts: the same run as on one, what the dry run says, and an end on every host whatever ends the job."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from netlab import HostProcess, Lab
from training import ENV, HOROYOLO, TIMEOUT_S, check_same_run, cmdline, steps, train_words, wait_until, workers

WAYS = {
    "horovodrun over Gloo": ["--launcher", "horovodrun", "--transport", "gloo"],
    "horovodrun over MPI": ["--launcher", "horovodrun", "--transport", "mpi"],
    "mpirun": ["--launcher", "mpirun"],
}


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "lab.txt"
    path.write_text("# three hosts, one worker each\nnode1 slots=1\n\nnode2 slots=1\nnode3 slots=1  # the last\n")
    return path


def launch_words(hostfile: Path, way: str, *options: str) -> list[str]:
    return [*HOROYOLO, "launch", "--hostfile", str(hostfile), *WAYS[way], *options]


def environ(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(word.split("=", 1) for word in text.split("\0")[:-1])


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def started_with(lab: Lab, argv: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Name and environment of each program of node1 that has the words of ``argv`` behind its name; a script's name follows its interpreter's.

    What such a program has forked, and will be another in a moment, does not count.
    """
    seen = {pid: words for pid in lab.processes("node1") if (words := cmdline(pid))[-len(argv) + 1 :] == argv[1:] and len(words) >= len(argv)}
    return [(Path(words[-len(argv)]).name, environ(pid)) for pid, words in seen.items() if parent(pid) not in seen]


@pytest.mark.parametrize("way", WAYS)
def test_three_hosts_train_the_same_run_and_the_dry_run_says_how(
    lab: Lab, way: str, dataset: Path, hostfile: Path, alone: list[dict[str, str]], tmp_path: Path
) -> None:
    job = train_words(dataset, tmp_path)
    dry = lab.run("node1", [*launch_words(hostfile, way, "--dry-run"), "--", *job], env=ENV, check=True)
    *_, told_env, told = dry.stdout.splitlines()
    argv = shlex.split(told)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with lab.popen("node1", [*launch_words(hostfile, way), "--", *job], env=ENV, **pipes) as process:
        # Seen before the workers are: horovodrun turns into mpirun.
        wait_until(lambda: started_with(lab, argv), process)
        (found_name, found), *others = started_with(lab, argv)
        wait_until(lambda: all(len(pids) == 1 for pids in workers(lab, job).values()), process)
        output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0, output[-3000:]
    assert found_name == argv[0]
    assert not others
    assert told_env.startswith("env -i ")
    said = dict(word.split("=", 1) for word in shlex.split(told_env.removesuffix("\\"))[2:])
    assert said.pop("HOROYOLO_STATUS_DIR") != found.pop("HOROYOLO_STATUS_DIR")  # each start has its own
    assert found == said

    check_same_run(steps(tmp_path / "run"), alone, num_workers=3)
    assert not [pid for host in lab.hosts for pid in lab.processes(host) if os.readlink(f"/proc/{pid}/exe").startswith(sys.base_prefix)]


@pytest.fixture
def long_job(lab: Lab, dataset: Path, tmp_path: Path) -> Callable[[str], tuple[HostProcess, list[str]]]:
    """``long_job(way)`` starts a job on node1 and node2 that would go on for minutes, and waits until it has made a step."""

    def start(way: str) -> tuple[HostProcess, list[str]]:
        job = train_words(dataset, tmp_path, epochs=1000)
        log = (tmp_path / "log.txt").open("w")
        argv = [*HOROYOLO, "launch", "--hosts", "node1:1,node2:1", *WAYS[way], "--", *job]
        process = lab.popen("node1", argv, env=ENV, stdout=log, stderr=log, text=True)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not steps(tmp_path / "run"):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert [len(pids) for pids in workers(lab, job).values()] == [1, 1, 0]
        return process, job

    return start


def gone(lab: Lab, job: list[str], timeout_s: float) -> bool:
    """Whether no worker is left on any host, within some time."""
    deadline_s = time.monotonic() + timeout_s
    while any(workers(lab, job).values()):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("way", ["horovodrun over Gloo", "mpirun"])
def test_a_request_to_stop_leaves_a_checkpoint(lab: Lab, way: str, long_job, tmp_path: Path) -> None:
    process, job = long_job(way)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (tmp_path / "log.txt").read_text()[-3000:]
    assert gone(lab, job, 0)
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("way", ["horovodrun over Gloo", "mpirun"])
def test_no_worker_outlives_a_killed_launcher(lab: Lab, way: str, long_job) -> None:
    process, job = long_job(way)
    process.kill()
    process.wait()
    assert gone(lab, job, 30)


def test_no_worker_outlives_a_lost_host(lab: Lab, long_job, tmp_path: Path) -> None:
    process, job = long_job("horovodrun over Gloo")
    lab.cut("node2")
    assert process.wait(60) == 1
    assert "node2" in (tmp_path / "log.txt").read_text()
    assert gone(lab, job, 30)  # on the other side of the cut too


@pytest.mark.parametrize("of", ["HOROVOD_RANK", "horoyolo.launch.agent"])
def test_a_dying_ssh_ends_all_workers(lab: Lab, long_job, of: str) -> None:
    """That of horovodrun, and that by which this launcher watches over a host."""
    process, job = long_job("horovodrun over Gloo")
    (ssh,) = [pid for pid in lab.processes("node1") if (words := cmdline(pid)) and words[0] == "ssh" and of in words[-1]]
    os.kill(ssh, signal.SIGKILL)
    assert process.wait(60) == 1
    assert gone(lab, job, 0)


def test_ctrl_c_leaves_a_checkpoint(lab: Lab, long_job, tmp_path: Path) -> None:
    process, job = long_job("horovodrun over Gloo")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # a terminal's user who presses twice at once means it once
    assert process.wait(60) == 75
    assert gone(lab, job, 0)
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_a_worker_that_dies_ends_the_job(lab: Lab, long_job) -> None:
    process, job = long_job("horovodrun over Gloo")
    os.kill(workers(lab, job)["node2"][0], signal.SIGKILL)
    assert process.wait(60) == 1
    assert gone(lab, job, 0)


def test_bad_input_met_on_the_hosts_is_the_jobs_status(lab: Lab, dataset: Path, hostfile: Path, tmp_path: Path) -> None:
    # Only node3 sees another file, so that the check before the start finds nothing.
    (tmp_path / "other.yaml").write_text("path: nowhere\ntrain: images/train\nval: images/val\nnames: [a]\n")
    lab.bind("node3", tmp_path / "other.yaml", dataset)
    argv = [*launch_words(hostfile, "horovodrun over Gloo"), "--", *train_words(dataset, tmp_path)]
    done = lab.run("node1", argv, env=ENV, timeout=TIMEOUT_S)
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(r"worker \d on node3: .*nowhere", done.stderr), done.stderr[-3000:]


def test_a_host_that_refuses_is_named(lab: Lab, dataset: Path, hostfile: Path, tmp_path: Path) -> None:
    lab.stop_sshd("node2")
    done = lab.run("node1", [*launch_words(hostfile, "horovodrun over Gloo"), "--", *train_words(dataset, tmp_path)])
    assert done.returncode == 1
    assert "node2" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


STUB = Path(__file__).parents[1] / "launch" / "stub_worker.py"
LAUNCH = """
import os, sys
from pathlib import Path
from horoyolo.launch.environment import travelling_env
from horoyolo.launch.hosts import parse_host_list
from horoyolo.launch.job import Job
from horoyolo.launch.run import new_status_dir, run_job
from horoyolo.launch.start import with_one_name_here
from horoyolo.launch.status import STATUS_DIR
hosts, out, stub = sys.argv[1:]
env = {**travelling_env(os.environ), "OMP_NUM_THREADS": "1", STATUS_DIR: str(new_status_dir())}
job = Job(2, (sys.executable, stub, "fail", out), env=env, nic="eth0", cwd=str(Path.cwd()))
sys.exit(run_job(job, with_one_name_here(parse_host_list(hosts))))
"""


def test_a_job_may_name_this_machine_by_its_address_and_have_a_tmpdir_that_all_see(lab: Lab, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    argv = [sys.executable, "-c", LAUNCH, f"{lab.address('node1')}:1,node2:1", str(tmp_path), str(STUB)]
    done = lab.run("node1", argv, env={"TMPDIR": str(shared)})
    assert done.returncode == 2, done.stderr  # as the worker of node2 noted, not horovodrun's own 1
    assert len(list(tmp_path.glob("started.*"))) == 2
    assert not list(shared.glob("horoyolo-*"))

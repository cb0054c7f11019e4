"""The fault matrix: what goes wrong, what is expected then, and how it is made to happen. A row gives what happened; ``Failed`` says what did not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rig import SAME, START_S, Failed, Job, Rig, cmdline, kill

from horoyolo.engine.checkpoint import newest_checkpoint

THREE = "node1 slots=1, node2 slots=1, node3 slots=1"
TWO = "node1 slots=1, node2 slots=1"
STORM_EVENTS = 20
WARM = 6  # steps before anything happens
KILL_S, VANISH_S, LEASE_S, HANG_S = 2.5, 20.0, 15.0, 15.0
LOSSY_S = 600.0  # for steps over a link that loses packets
SLACK_S = 5.0  # for processes to go when they have decided to
BACK_S = 60.0  # for a slot or a host to be used again: its cooldown is 10 s, that of a second failure 20
LATE_S = 180.0  # the same after the fourth failure
PAUSE_S = 3.0  # that training may stand still while a host is added


@dataclass
class Result:
    """What a row saw."""

    happened: str
    seconds: float | None = None  # from the fault to the first completed step
    limit_s: float | None = None
    account: dict[str, Any] | None = None  # of the ledger
    deviation: float | None = None  # of losses, from the undisturbed run: the same weights everywhere, or the sums would differ

    def why_not(self) -> str:
        """Why the row does not hold; empty where it does."""
        if self.seconds is not None and self.limit_s is not None and self.seconds > self.limit_s:
            return f"{self.seconds:.1f} s, at most {self.limit_s:.1f} s are wanted"
        if self.account is not None and not self.account["exact"]:
            return f"the ledger is not exact: missing {self.account['missing']}, double {self.account['double']}"
        if self.deviation is not None and self.deviation > SAME:
            return f"losses differ by {self.deviation:.2g} from the undisturbed run's"
        return ""


@dataclass(frozen=True)
class Row:
    """A line of the matrix."""

    number: str
    fault: str
    expected: str
    check: Callable[[Rig], Result]
    quick: bool = False  # in the tests of every change


def finished(job: Job, happened: str, seconds: float | None = None, limit_s: float | None = None, compare: bool = True) -> Result:
    """Ends a job in order and looks at all that it left; ``compare``: it saw the same images as the undisturbed run."""
    status = job.stop()
    if status != 75:
        raise Failed(f"the job ended with {status}, 75 is wanted: {job.last_lines()}")
    leftover = {host: pids for host in job.lab.hosts if (pids := job.of_job(host))}
    if leftover:
        raise Failed(f"processes are left: {leftover}")
    return Result(happened, seconds, limit_s, job.account(), job.deviation() if compare else None)


# -- 1, 2, 8: workers that die


def worker_killed(rig: Rig, hosts: str = THREE) -> Result:
    with rig.job(hosts) as job:
        job.train_until(WARM, 3)
        _, pid = job.follower()
        kill(pid)
        seconds = job.next_step(2, 60)
        job.more_steps(3)
        return finished(job, "the two others went on", seconds, KILL_S)


def worker_of_one_host_killed(rig: Rig) -> Result:
    return worker_killed(rig, "node1 slots=3")


def rank_zero_killed(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(2, 3)
        _, pid = job.rank_zero()
        kill(pid)
        seconds = job.next_step(2, 60)
        job.more_steps(3)
        return finished(job, "the two others went on with their weights; another one writes", seconds, KILL_S)


def killed_again_and_again(rig: Rig) -> Result:
    """A death while the others still form the generation after the last one: Horovod can't leave its start, so that they may have to start again."""
    with rig.job("node1 slots=2, node2 slots=2") as job:
        job.train_until(WARM, 4)
        kill(job.follower()[1])
        time.sleep(0.15)
        kill(job.follower()[1])
        seconds = job.next_step(2, 60)
        job.more_steps(3)
        again = "they started again, with their state" if "is started again" in job.log() else "the two others went on"
        return finished(job, again, seconds, 2 * KILL_S)


def out_of_memory(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        host, pid = job.follower()
        kill(pid, signal.SIGUSR2)
        seconds = job.next_step(2, 60)
        wants(job, "137", "the reason in the log")
        back = job.next_step(3, BACK_S)
        return finished(job, f"status 137 was told; a worker of {host} was back {back:.0f} s later", seconds, KILL_S)


# -- 3 to 7: hosts, links and workers that hang


def host_lost(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        rig.lab.cut("node3")
        began_s = time.monotonic()
        for pid in job.of_job("node3"):
            kill(pid)
        job.next_step(2, 90)
        seconds = time.monotonic() - began_s
        wants(job, "node3", "the host's name in the log")
        job.more_steps(3)
        rig.lab.heal("node3")
        back = job.next_step(3, BACK_S)
        return finished(job, f"the others went on; healed, the host was back within {back:.0f} s", seconds, VANISH_S)


def partition(rig: Rig) -> Result:
    """Cut off is the host of rank 0; its processes live on."""
    with rig.job("node2 slots=1, node3 slots=1") as job:  # the launcher is on node1
        job.train_until(WARM, 2)
        host, _ = job.rank_zero()
        rig.lab.cut(host)
        seconds = job.next_step(1, 90)
        job.until(lambda: not job.workers()[host], f"no worker on {host}", LEASE_S + HANG_S + SLACK_S)
        if len(job.writers()) != 1:
            raise Failed(f"writers: {job.writers()}")
        job.more_steps(3)
        rig.lab.heal(host)
        job.check_one_writer()
        return finished(job, f"the side of the launcher went on, {host} stopped; one writer", seconds, VANISH_S)


def slow_link(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        rig.lab.shape("node3", "10mbit")
        began, before_s = job.step(), time.monotonic()
        warned_s = job.until(lambda: "network" in job.log(), "a warning", 60)
        job.more_steps(2)
        rate = (job.step() - began) / (time.monotonic() - before_s)
        rig.lab.unshape("node3")
        job.more_steps(3)
        return finished(job, f"{rate:.2f} steps/s, warned after {warned_s:.0f} s; nobody was left out")


def lossy_link(rig: Rig) -> Result:
    rule = ["INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random", "--probability", "0.05", "-j", "DROP"]
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        rig.lab.run("node3", ["iptables", "-A", *rule], check=True)
        try:
            began, before_s = job.step(), time.monotonic()
            job.more_steps(15, LOSSY_S)  # 120 small exchanges each, and a lost packet costs 0.2 s
            rate = (job.step() - began) / (time.monotonic() - before_s)
        finally:
            rig.lab.run("node3", ["iptables", "-D", *rule])
        wants_not(job, "died", "a death")
        return finished(job, f"no crash, {rate:.2f} steps/s")


def stopped_worker(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        _, pid = job.follower()
        kill(pid, signal.SIGSTOP)
        seconds = job.next_step(2, 90)
        job.until(lambda: not os.path.exists(f"/proc/{pid}"), "its end", SLACK_S)
        job.more_steps(3)
        return finished(job, "it was found, killed and left out", seconds, HANG_S + 5)


def hung_worker(rig: Rig) -> Result:
    """Its main thread stands still; the one that gives signs of life does not."""
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        _, pid = job.follower()
        kill(pid, signal.SIGRTMIN + 1)
        seconds = job.next_step(2, 90)
        job.more_steps(3)
        return finished(job, "it was found, killed and left out", seconds, HANG_S + 5)


# -- 9 to 13: disks and files


def disk_full(rig: Rig) -> Result:
    """The run folder is on a small disk of its own, on the host of rank 0; the others see the folder beneath. A worker dies meanwhile, too."""
    job = rig.new_job()
    job.run_folder.mkdir()
    rig.lab.mount_tmpfs("node1", job.run_folder, "120m")
    job.seen_folder = rig.lab.inside("node1", str(job.run_folder))
    try:
        with rig.running(job, "node1 slots=2, node2 slots=1", words=["--exist-ok"]):
            job.train_until(12, 3)
            job.until(lambda: list(job.seen_folder.glob("checkpoints/*.pt")), "a checkpoint", 60)
            fill = f"cat /dev/zero > {job.run_folder}/fill"
            rig.lab.run("node1", ["sh", "-c", fill])  # fails when it is full
            began = len(job.log())
            time.sleep(1)
            job.until(lambda: "training goes on" in job.log()[began:], "a line that says so", START_S)
            for change in (lambda: None, lambda: kill(job.workers()["node2"][0])):
                change()
                seen = len(job.log())
                # Steps can't be noted now; ends of epochs are told.
                job.until(lambda seen=seen: job.log()[seen:].count("] epoch ") >= 2, "two epochs on the full disk", START_S)
            if newest_checkpoint(job.seen_folder / "checkpoints") is None:
                raise Failed("no checkpoint is good while the disk is full")
            rig.lab.run("node1", ["rm", f"{job.run_folder}/fill"], check=True)
            job.more_steps(12)
            return finished(job, "it was told, training went on, through a death too; the checkpoint before stayed good")
    finally:
        rig.lab.unmount("node1", job.run_folder)


def killed_while_saving(rig: Rig) -> Result:
    script = Path(__file__).resolve().parents[2] / "scripts" / "kill_while_writing.py"
    done = rig.lab.run("node1", [sys.executable, str(script), "--kills", "100"], timeout=900)
    said = "; ".join(done.stdout.strip().splitlines())
    if done.returncode:
        raise Failed(f"{said} {done.stderr.strip()[-500:]}")
    return Result(said)


def spoilt_checkpoint(rig: Rig) -> Result:
    """The newest checkpoint gets a flipped bit, the one before is cut short: that before them is used."""
    with rig.job(TWO, words=["--set", "keep_checkpoints=3"]) as job:
        job.train_until(25, 2)
        job.stop()
        names = []
        for spoil in (flip_bit, cut_short):
            newest = max(path for path in (job.run_folder / "checkpoints").glob("step-????????.pt") if path.name not in names)
            names.append(newest.name)
            spoil(newest)
        before = job.step()
        mark = len(job.log())
        job.launch("--resume", "auto")
        job.until(lambda: "resumed at step" in job.log()[mark:], "a line that says where it goes on", START_S)
        job.until(lambda: job.step() > before, f"step {before + 1}", START_S)
        said = job.log()[mark:]
        if not all(name in said for name in names):
            raise Failed(f"{names} are not named as bad: {job.last_lines()}")
        return finished(job, f"{' and '.join(names)} were named and left aside; {told(job, 'resumed at step')}")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def bad_files(rig: Rig) -> Result:
    """Images of noise and cut ones, labels of NaN and far outside: left out, named, everybody goes on. A class that is not there: refused."""
    data = own_data(rig, "bad")
    images, labels = sorted(data.glob("images/train/*")), sorted(data.glob("labels/train/*.txt"))
    images[0].write_bytes(b"\0" * 1000)
    cut_short(images[1])
    labels[2].write_text("0 nan 0.5 0.1 0.1\n")
    labels[3].write_text("0 3.5 0.5 0.1 0.1\n")
    wrong = [path.name for path in (*images[:2], *labels[2:4])]
    with rig.job(TWO, data=data / "data.yaml") as job:
        job.train_until(WARM, 2)
        job.more_steps(10)
        named = {path.stem for path in (*images, *labels) if path.stem in job.log()}
        if named != {Path(name).stem for name in wrong}:
            raise Failed(f"{named} are named, {wrong} are bad")
        job.check_agreement("node1 slots=1", 1)
        result = finished(job, "four bad files were named, the rest was trained on", compare=False)
    labels[4].write_text("99 0.5 0.5 0.1 0.1\n")
    with rig.job(TWO, data=data / "data.yaml") as job:
        status = job.wait(START_S)
        wants(job, "class 99", "the class in a line")
        if status != 2 or job.rows():
            raise Failed(f"with a class that is not there the job ended with {status} after {job.step()} steps")
    labels[4].unlink()
    for path in images[: len(images) // 2]:
        path.write_bytes(b"\0" * 1000)
    with rig.job(TWO, data=data / "data.yaml") as job:
        status = job.wait(START_S)
        if status not in (1, 2):
            raise Failed(f"with half of the images bad the job ended with {status}")
    result.happened += f"; with half of them bad the job ended with status {status}"
    return result


def files_vanish(rig: Rig) -> Result:
    data = own_data(rig, "vanish")
    with rig.job(THREE, data=data / "data.yaml") as job:
        job.train_until(WARM, 3)
        gone = sorted(data.glob("images/train/*"))[:3]
        for path in gone:
            path.unlink()
        job.more_steps(22)  # two epochs
        missing = [path.name for path in gone if path.stem not in job.log()]
        if missing:
            raise Failed(f"{missing} are not named: {job.last_lines()}")
        job.check_agreement(TWO, 2)
        return finished(job, "named, replaced on all alike; everybody went on", compare=False)


def own_data(rig: Rig, name: str) -> Path:
    """A copy of the data set that may be spoilt."""
    folder = rig.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(rig.data.parent, folder, ignore=shutil.ignore_patterns("*.cache*", ".horoyolo*"))
    spec = folder / "data.yaml"
    spec.write_text(spec.read_text().replace(str(rig.data.parent), str(folder)))
    return folder


# -- 14 to 16: hosts that come and go


def host_added(rig: Rig) -> Result:
    with rig.job(TWO) as job:
        slow = job.faults / "slow.node3"
        slow.write_text("60")
        job.train_until(WARM, 2)
        began_s = time.monotonic()
        job.edit_hosts(THREE)
        job.until(lambda: not slow.exists(), "a worker on node3, which sleeps", 60)
        before = job.step()
        job.next_step(3, 180)
        seconds = time.monotonic() - began_s
        if job.step() - before < 10:
            raise Failed(f"{job.step() - before} steps while it was waited for")
        pause = largest_pause(job)
        if pause > PAUSE_S:
            raise Failed(f"training stood still for {pause:.1f} s")
        job.more_steps(3)
        return finished(job, f"joined after {seconds:.0f} s (it slept for 60); {job.step() - before} steps meanwhile, longest pause {pause:.1f} s")


def host_removed(rig: Rig) -> Result:
    with rig.job(THREE, min_np=2) as job:
        job.train_until(WARM, 3)
        job.edit_hosts(TWO)
        seconds = job.next_step(2, 60)
        job.until(lambda: not job.workers()["node3"], "no worker on node3", 30)
        wants_not(job, "died", "a death")
        job.edit_hosts("node1 slots=1")
        job.until(lambda: "waiting" in job.log(), "a line that says that it waits", 60)
        stood = job.step()
        job.edit_hosts(TWO)
        back = job.next_step(2, BACK_S, since=stood)
        return finished(job, f"left in order, no step lost; below --min-np it waited, and went on {back:.0f} s after the host was back", seconds, 30)


def discovery_fails(rig: Rig) -> Result:
    answer = rig.folder / "answer.sh"
    good = "#!/bin/sh\necho node1:1\necho node2:1\n"

    def answers(text: str) -> None:
        partial = answer.with_suffix(".partial")
        partial.write_text(text)
        partial.chmod(0o755)
        partial.replace(answer)

    answers(good)
    with rig.job(TWO, where=["--discovery-script", str(answer)]) as job:
        job.train_until(WARM, 2)
        mark = job.log().count("generation ")
        for wrong in ("exit 1", "sleep 60", "echo error", "echo 'WARN: x'", ":"):
            answers(f"#!/bin/sh\n{wrong}\n")
            time.sleep(12 if "sleep" in wrong else 5)
        if job.log().count("generation ") != mark:
            raise Failed(f"the job was reset: {job.last_lines()}")
        answers(good)
        job.more_steps(3)
        return finished(job, "the last good list was kept, no reset")


# -- 17 to 20


def launcher_killed(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(12, 3)  # past the first checkpoint, of an epoch's end
        assert job.process is not None
        job.process.kill()
        job.process.wait()
        began_s = time.monotonic()
        job.until(lambda: not any(job.of_job(host) for host in rig.lab.hosts), "no process left", LEASE_S + SLACK_S, alive=False)
        gone_s = time.monotonic() - began_s
        before, mark = job.step(), len(job.log())
        job.launch("--resume", "auto")
        seconds = job.next_step(3, START_S, since=before)
        if "resumed at step 10" not in job.log()[mark:]:
            raise Failed(f"it did not go on from the checkpoint: {job.last_lines()}")
        return finished(job, f"no process left after {gone_s:.1f} s; started again it went on, at {before + 1} again after {seconds:.0f} s")


def nan_on_one(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        _, pid = job.follower()
        (job.faults / "nan").write_text("2")
        kill(pid, signal.SIGRTMIN)
        job.more_steps(5)
        wants(job, "not finite", "a line on what was left out")
        job.check_agreement(TWO, 2)
        status = job.stop()
        if status != 75:
            raise Failed(f"the job ended with {status}")
        account = job.account()
        if account["skipped_updates"] != 2:
            raise Failed(f"{account['skipped_updates']} updates were left out, 2 had NaN")
        return Result("all left out the same two updates", account=account)


def nan_for_long(rig: Rig) -> Result:
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        _, pid = job.follower()
        (job.faults / "nan").write_text("22")
        kill(pid, signal.SIGRTMIN)
        job.until(lambda: re.search(r"(back|rate).*", told(job, "learning rate")), "a line that says that it goes back", START_S)
        job.more_steps(5)
        job.check_agreement(TWO, 2)
        status = job.stop()
        if status != 75:
            raise Failed(f"the job ended with {status}")
        return Result(f"back to the last good state: {told(job, 'learning rate')}", account=job.account())


def clock_skew(rig: Rig) -> Result:
    with rig.job(TWO) as job:
        (job.faults / "clock.node2").write_text("3600")
        (job.faults / "clock.node3").write_text("-3600")
        job.train_until(WARM, 2)
        (job.faults / "clock.node1").write_text("-600")  # steps back under the launcher
        job.edit_hosts(THREE)
        seconds = job.next_step(3, 120)
        kill(job.follower()[1])
        after = job.next_step(2, 60)
        return finished(job, f"a host joined after {seconds:.0f} s, a death cost {after:.1f} s", after, KILL_S)


def uneven_shares(rig: Rig) -> Result:
    with rig.job("node1 slots=2, node2 slots=2, node3 slots=1") as job:
        job.train_until(WARM, 5)
        kill(job.follower()[1])
        seconds = job.next_step(4, 60)
        job.more_steps(3)
        return finished(job, "16 images over 5 workers, then over 4: every step is the undisturbed run's", seconds, KILL_S)


def ssh_refused(rig: Rig) -> Result:
    rig.lab.stop_sshd("node3")
    try:
        with rig.job(THREE) as job:
            job.train_until(WARM, 2)
            wants(job, "node3", "the host's name")
            line = next(line for line in job.log().splitlines() if "node3" in line)
            refused = job.log().count("Connection refused")
            rig.lab.start_sshd("node3")
            back = job.next_step(3, 180)
            rig.lab.stop_sshd("node3")  # open connections stay
            job.more_steps(5)
            for pid in rig.lab.processes("node3"):
                if any("horoyolo" in word for word in cmdline(pid)):  # the agent too
                    kill(pid)
            seconds = job.next_step(2, 60)
            job.until(lambda: job.log().count("Connection refused") > refused, "another refusal", LATE_S)
            rig.lab.start_sshd("node3")
            again = job.next_step(3, LATE_S)
            happened = f"said {line!r}; with it {back:.0f} s after its sshd was back; lost and refused again, {again:.0f} s"
            return finished(job, happened, seconds, KILL_S)
    finally:
        rig.lab.start_sshd("node3")


def storm(rig: Rig) -> Result:
    """Twenty kills, hosts that come and hosts that go, drawn from a seed."""
    dice = random.Random(0)
    slots = {"node1": 1, "node2": 1, "node3": 1}
    with rig.job(THREE) as job:
        job.train_until(WARM, 3)
        done = []
        while len(done) < STORM_EVENTS:
            done.append(random_event(job, slots, dice))
            time.sleep(dice.uniform(0, 3))
            job.more_steps(2)
        sizes = [int(row["workers"]) for row in job.rows()]
        return finished(job, f"{counts(done)}; {min(sizes)} to {max(sizes)} workers, {len(sizes)} steps")


def random_event(job: Job, slots: dict[str, int], dice: random.Random) -> str:
    """Kills a worker, adds a slot to ``slots`` of the hosts or takes one away, as the dice fall; which of these."""
    while True:
        what = dice.choice(("kill", "join", "leave"))
        pids = [pid for there in job.workers().values() for pid in there]
        grow = [host for host, count in slots.items() if count < 2]
        shrink = [host for host, count in slots.items() if count and sum(slots.values()) > 1]
        if what == "kill" and len(pids) > 1:
            kill(dice.choice(pids))
        elif what == "join" and grow:
            slots[dice.choice(grow)] += 1
        elif what == "leave" and shrink:
            slots[dice.choice(shrink)] -= 1
        else:
            continue
        job.edit_hosts(", ".join(f"{host} slots={count}" for host, count in slots.items() if count))
        return what


def counts(events: list[str]) -> str:
    """How often each event happened."""
    return ", ".join(f"{events.count(what)} {name}" for what, name in (("kill", "kills"), ("join", "joins"), ("leave", "leavings")))


def wants(job: Job, words: str, what: str) -> None:
    """Fails where the log lacks something."""
    if words not in job.log():
        raise Failed(f"{what} ({words!r}) is missing: {job.last_lines()}")


def wants_not(job: Job, words: str, what: str) -> None:
    """Fails where the log has something."""
    if words in job.log():
        raise Failed(f"{what} ({words!r}): {told(job, words)}")


def told(job: Job, words: str) -> str:
    """The first line of the log that has some words."""
    return next((line for line in job.log().splitlines() if words in line), "")


def largest_pause(job: Job) -> float:
    """The longest time that a step waited for the others."""
    return max(float(row["exchange_wait_s"]) for row in job.rows()[1:])


ROWS = [
    Row("1", "kill -9 of a worker", "the rest goes on, nothing lost", worker_killed, quick=True),
    Row("1b", "the same, three workers on one host", "its own slot alone is left out", worker_of_one_host_killed),
    Row("1c", "two kills, the second during recovery", "the rest goes on, nothing lost", killed_again_and_again),
    Row("2", "kill -9 of rank 0, after two steps", "weights are kept", rank_zero_killed),
    Row("3", "host without power", "the host is left out, and comes back", host_lost),
    Row("4", "partition, rank 0 on the other side", "the launcher's side goes on, one writer", partition),
    Row("5", "link of 10 Mbit/s", "goes on, warns within 60 s", slow_link),
    Row("6", "5 % of packets lost", "no crash", lossy_link),
    Row("7", "SIGSTOP", "found within 15 s, killed, left out", stopped_worker),
    Row("7b", "a worker's main thread hangs", "found within 15 s, killed, left out", hung_worker),
    Row("8", "out of memory (status 137)", "as 1; the reason is logged; its slot comes back", out_of_memory),
    Row("9", "disk full", "training goes on, earlier checkpoints stay good", disk_full),
    Row("10", "kill -9 while a checkpoint is written, 100 times", "always one to go on from", killed_while_saving),
    Row("11", "bit flip and cut in checkpoints", "the one before is used, loudly", spoilt_checkpoint),
    Row("12", "bad images and labels", "left out and named; too many: a clean end", bad_files),
    Row("13", "images deleted during an epoch", "replaced alike on all, named", files_vanish),
    Row("14", "host added, which needs 60 s", "joins, the others do not wait", host_added),
    Row("15", "host removed, then below --min-np", "nothing lost; waits, then goes on", host_removed),
    Row("16", "discovery fails, hangs, talks nonsense", "the last good list is kept, no reset", discovery_fails),
    Row("17", "kill -9 of the launcher", "no process left within 20 s; resumes", launcher_killed),
    Row("18", "NaN on one worker", "all leave out the same updates", nan_on_one),
    Row("18b", "NaN for 22 updates", "back to the last good state, lower rate", nan_for_long),
    Row("19", "clocks an hour apart, one steps back", "changes are seen, joins work", clock_skew),
    Row("20", "uneven shares", "equal steps", uneven_shares),
    Row("20b", "ssh refused at the start and later", "the host is named, the others train", ssh_refused),
    Row("21", "20 random kills, joins and leavings", "nothing lost, the same losses", storm),
]

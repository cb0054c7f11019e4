"""What is wrong with this cluster, before a job finds out: every host is asked over ssh, the ways between them are measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from horoyolo.config import InputError
from horoyolo.files import write_json
from horoyolo.launch.command import build_command
from horoyolo.launch.environment import YIELD
from horoyolo.launch.hosts import Host
from horoyolo.launch.interface import interface_to
from horoyolo.launch.job import Job
from horoyolo.launch.judge import ERROR, OPTIONAL, REQUIRED, Cluster, Finding, Link, address_of, judge
from horoyolo.launch.probe import LOAD_LIMIT_S, MARK, MEET_S, RECEIVE_S, RESOLVE_LIMIT_S
from horoyolo.launch.remote import Ssh
from horoyolo.launch.session import Session, Unreachable
from horoyolo.launch.table import render

SPLITS = ("train", "val")
DATA_LIMIT_S = 900.0  # the first scan of a large data set on a slow disk
ANSWER_S = 10.0  # on top of what a request itself may take
CLOCK_READINGS = 5
MAX_SUSPECTS = 8  # slow links that are looked at more closely
MPI_LIMIT_S = 90.0
MPI_BYTES = 4 * 2**20  # of a message
MPI_SECONDS = 1.0  # how long messages are to flow
MPI_PINGS = 50


def run_doctor(hosts: Sequence[Host], data: str = "", nic: str = "", json_file: str | Path | None = None, ssh: Ssh | None = None) -> int:
    """Examine the hosts, print the table and write the JSON; gives the exit status: 0 when there are no errors, else 1."""
    ssh = ssh or Ssh()
    # What launch would choose; horovodrun wants it to have the same name everywhere.
    cluster = examine(hosts, data, nic or interface_to(hosts), ssh)
    findings = judge(cluster)
    print(render(cluster, findings))
    if json_file:
        write_json(json_file, to_json(cluster, findings))
    return 1 if any(finding.severity == ERROR for finding in findings) else 0


def to_json(cluster: Cluster, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything that was found, in plain values."""
    return {
        "ok": not any(finding.severity == ERROR for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "hosts": {host.name: {"slots": host.slots, **cluster.facts.get(host.name, {})} for host in cluster.hosts},
        "links": [dataclasses.asdict(link) for link in cluster.links],
        "mpi": cluster.mpi,
        "workdir": cluster.workdir,
        "data": cluster.data,
        "nic": cluster.nic,
    }


def examine(hosts: Sequence[Host], data: str, nic: str, ssh: Ssh) -> Cluster:
    """Ask all hosts and measure what is between them. Takes as long as the slowest host, at most the limits above."""
    cluster = Cluster(hosts, os.getcwd(), data, nic)
    with ThreadPoolExecutor(max(1, len(hosts))) as pool, contextlib.ExitStack() as stack:
        sessions = {host.name: Session(host, sys.executable, ssh) for host in hosts}
        stack.callback(_close, sessions.values())
        with _progress(f"asking {_count(len(hosts), 'host')}"):
            _ask_all(pool, cluster, sessions, lambda name: _facts(cluster, sessions[name]))
        with _progress("loading torch and Horovod" + (", scanning the data" if data else "")):
            _ask_all(pool, cluster, sessions, lambda name: _more_facts(cluster, sessions[name], cluster.facts[name]))
        _ask_all(pool, cluster, sessions, lambda name: {"own_addresses": sessions[name].ask("owns", addresses=_known_as(cluster, name))["addresses"]})
        if len(cluster.facts) > 1:
            with _progress("measuring links"):
                try:
                    cluster.links = _measure_links(pool, cluster, sessions)
                except Unreachable as failure:
                    print(f"doctor: links could not all be measured: {failure}", file=sys.stderr)
        _close(sessions.values())  # MPI is to have the cores for itself
    if len(hosts) > 1:
        with _progress("measuring over MPI"):
            cluster.mpi = _measure_over_mpi(cluster, ssh)
    return cluster


def _close(sessions: Collection[Session]) -> None:
    for session in sessions:
        session.hang_up()
    for session in sessions:
        session.close()


def _ask_all(pool: ThreadPoolExecutor, cluster: Cluster, sessions: dict[str, Session], ask: Callable[[str], dict[str, Any]]) -> None:
    """Add what each host that can still be reached answers to its facts, all at once; who does not answer is told as unreachable."""

    def answer(name: str) -> None:
        try:
            found = ask(name)
        except Unreachable as failure:
            cluster.facts.pop(name, None)
            cluster.unreachable[name] = Finding(ERROR, name, failure.check, failure.message, failure.remedy)
        else:
            cluster.facts[name] = {**cluster.facts.get(name, {}), **found}

    list(pool.map(answer, [name for name in sessions if name not in cluster.unreachable]))
    cluster.facts = {host.name: cluster.facts[host.name] for host in cluster.hosts if host.name in cluster.facts}  # in the order of the hosts


def _facts(cluster: Cluster, session: Session) -> dict[str, Any]:
    answer = session.ask("facts", workdir=cluster.workdir, packages=[*REQUIRED, *OPTIONAL])
    if "error" in answer:
        raise Unreachable("probe", f"it could not be looked at: {answer['error']}", "see whether /proc, /sys and /dev/shm are mounted there")
    return {"python_wanted": sys.executable, **answer}


def _more_facts(cluster: Cluster, session: Session, facts: dict[str, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys([facts["hostname"], *(host.name for host in cluster.hosts)]))
    found: dict[str, Any] = {
        "clock": _clock(session),
        "resolved": session.ask("resolve", RESOLVE_LIMIT_S + ANSWER_S, names=names),
    }
    if facts["packages"]["torch"]:
        found["load"] = session.ask("load", LOAD_LIMIT_S + ANSWER_S)
    if cluster.data and facts["source"]:
        found["data"] = session.ask("data", DATA_LIMIT_S + ANSWER_S, data=cluster.data, splits=SPLITS, within_s=DATA_LIMIT_S)
    return found


def _clock(session: Session) -> dict[str, float]:
    """How far a host's clock is ahead of this one's, in seconds, and how far that may be off: half a round trip, of the quickest reading."""
    readings = []
    for _ in range(CLOCK_READINGS):
        before = time.time()
        there = session.ask("clock")["time"]
        after = time.time()
        readings.append(((after - before) / 2, there - (before + after) / 2))
    doubt_s, offset_s = min(readings)
    return {"offset_s": offset_s, "doubt_s": doubt_s}


def _known_as(cluster: Cluster, name: str) -> list[str]:
    """The addresses that other hosts take for those of a host."""
    return sorted({address for host, facts in cluster.facts.items() if host != name for address in facts["resolved"].get(name, [])})


# Links


def _measure_links(pool: ThreadPoolExecutor, cluster: Cluster, sessions: dict[str, Session]) -> list[Link]:
    """Every host sends to the next, all at once, as in a ring-allreduce; slow links then again alone, and their ends against a third host."""
    addresses = {name: address_of(facts, cluster.nic, _known_as(cluster, name)) for name, facts in cluster.facts.items()}
    names = [name for name, address in addresses.items() if address]
    if len(names) < 2:
        return []

    def measure(pairs: Sequence[tuple[str, str]]) -> list[Link]:
        return _measure_at_once(pool, sessions, addresses, cluster.nic, pairs)

    links = measure(list(zip(names, [*names[1:], names[0]], strict=True)))
    for at, link in enumerate(links):
        if link.slow and sum(other.slow for other in links[:at]) < MAX_SUSPECTS:
            links[at] = _better(link, measure([(link.source, link.target)])[0])
    ends = {name for link in links if link.slow for name in (link.source, link.target)}
    for link in [link for link in links if link.slow][:MAX_SUSPECTS]:
        others = sorted((name for name in names if name not in (link.source, link.target)), key=lambda name: name in ends)
        for pair in [(link.source, other) for other in others[:1]] + [(other, link.target) for other in others[:1]]:
            if pair not in [(known.source, known.target) for known in links]:
                links += measure([pair])
    return links


def _better(link: Link, again: Link) -> Link:
    """The better of two measurements: what else went on can only make a link look slower."""
    return max(link, again, key=lambda it: (not it.error, it.mbit_s))


def _measure_at_once(
    pool: ThreadPoolExecutor, sessions: dict[str, Session], addresses: dict[str, str], nic: str, pairs: Sequence[tuple[str, str]]
) -> list[Link]:
    """Links between pairs (from, to), in which each host occurs at most once on each side."""
    token = secrets.token_hex(16)  # so that a stranger who finds the port is not taken for the other host
    meeting_s = MEET_S + RECEIVE_S + ANSWER_S

    def listen(pair: tuple[str, str]) -> dict[str, Any]:
        return sessions[pair[1]].ask("listen", address=addresses[pair[1]], device=nic, token=token)

    def send(pair: tuple[str, str], there: dict[str, Any]) -> dict[str, Any]:
        if "error" in there:
            return there
        to = {"to": addresses[pair[1]], "port": there["port"], "token": token}
        return sessions[pair[0]].ask("send", 2 * meeting_s, address=addresses[pair[0]], device=nic, **to)

    def hear(pair: tuple[str, str]) -> dict[str, Any]:
        return sessions[pair[1]].ask("heard", meeting_s)

    listening = list(pool.map(listen, pairs))  # all of them: a host that sends is one that listens too, and is asked one thing at a time
    sent = list(pool.map(send, pairs, listening))
    return [_link(pair, tried, got) for pair, tried, got in zip(pairs, sent, pool.map(hear, pairs), strict=True)]


def _link(pair: tuple[str, str], sent: dict[str, Any], heard: dict[str, Any]) -> Link:
    error = sent.get("error") or heard.get("error")
    if error:
        return Link(*pair, error=error)
    mbit_s = heard["bytes"] * 8 / 1e6 / max(heard["seconds"], 1e-9)
    return Link(*pair, mbit_s=round(mbit_s, 1), round_trip_ms=round(sent["round_trip_s"] * 1e3, 3))


# MPI


def _measure_over_mpi(cluster: Cluster, ssh: Ssh) -> dict[str, Any]:
    """Figures of `measure_mpi` run by mpirun with a process on each host, or why there are none (skipped, or error)."""
    lacking = [host.name for host in cluster.hosts if not cluster.facts.get(host.name, {}).get("packages", {}).get("mpi4py")]
    if shutil.which("mpirun") is None:
        return {"skipped": "mpirun is not installed here"}
    if cluster.unreachable:
        return {"skipped": f"{', '.join(host.name for host in cluster.hosts if host.name in cluster.unreachable)} could not be asked"}
    if lacking:
        return {"skipped": f"mpi4py is not installed on {', '.join(lacking)}"}
    if not all(facts["source"] for facts in cluster.facts.values()):
        return {"skipped": "horoyolo is not installed on every host"}
    try:
        argv = mpi_command(cluster, ssh)
    except InputError as error:
        return {"skipped": str(error)}
    failed = {"host": cluster.hosts[0].name, "command": shlex.join(argv)}
    env = {**os.environ, **YIELD}
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MPI_LIMIT_S, env=env, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {MPI_LIMIT_S:.0f} s", **failed}
    for line in done.stdout.splitlines():
        if done.returncode == 0 and line.startswith(MARK):
            found = json.loads(line[len(MARK) :])
            return {**found, "ranks": [{"host": host.name, **rank} for host, rank in zip(cluster.hosts, found["ranks"], strict=True)]}
    complaint = [line for line in (done.stderr + done.stdout).splitlines() if line.strip(" -")]
    return {"error": complaint[0] if complaint else f"exit status {done.returncode}", **failed}


def mpi_command(cluster: Cluster, ssh: Ssh) -> list[str]:
    """What measures over MPI: one process on each host, started as a job of this launcher would be. Raises InputError as that does."""
    worker = (sys.executable, "-c", "from horoyolo.launch.doctor import measure_mpi; measure_mpi()")
    job = Job(len(cluster.hosts), worker, YIELD, transport="mpi", nic=cluster.nic, ssh=ssh, as_root=os.geteuid() == 0, cwd=cluster.workdir)
    return build_command(job, [dataclasses.replace(host, slots=1, max_slots=None) for host in cluster.hosts], "mpirun")


def measure_mpi() -> None:
    """What each process of an MPI job runs: a ring of messages; the first prints figures for all, those of a rank being of what it sends."""
    import mpi4py
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    size = comm.Get_size()
    right, left = (comm.Get_rank() + 1) % size, (comm.Get_rank() - 1) % size

    def pass_on(num_bytes: int, count: int) -> float:
        """Seconds until everything from the left is there."""
        send, receive = bytearray(num_bytes), [bytearray(num_bytes) for _ in range(count)]
        comm.Barrier()
        start = time.perf_counter()
        receiving = [comm.Irecv(buffer, source=left) for buffer in receive]
        sending = [comm.Isend(send, dest=right) for _ in range(count)]
        MPI.Request.Waitall(receiving)
        seconds = time.perf_counter() - start
        MPI.Request.Waitall(sending)
        return seconds

    pass_on(1, 1)  # connections are made with the first message
    one_way_s = min(pass_on(1, 1) for _ in range(MPI_PINGS))
    slowest_s = comm.allreduce(pass_on(MPI_BYTES, 1), op=MPI.MAX)
    count = max(1, min(16, int(MPI_SECONDS / slowest_s)))
    seconds = pass_on(MPI_BYTES, count)
    received = {"mbit_s": round(MPI_BYTES * count * 8 / 1e6 / seconds, 1), "round_trip_ms": round(2e3 * one_way_s, 3)}
    ranks = comm.gather(received)
    if ranks:
        library = MPI.Get_library_version().split(",")[0]
        # What a rank received is what the one before it sent.
        print(MARK + json.dumps({"mpi4py": mpi4py.__version__, "library": library, "ranks": [*ranks[1:], ranks[0]]}), flush=True)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"doctor: {what}: {time.monotonic() - start:.1f} s", file=sys.stderr)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)

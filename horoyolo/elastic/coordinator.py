"""The launcher of an elastic job: it stays with the job from its beginning to its end, through all generations.

One loop listens to the agents of all hosts (``agent.py``), tells ``Membership`` what happened, asks it what follows, and does that. There is no
other process that decides, and no vote: a worker takes part in the generation that it was given a place in.
"""

from __future__ import annotations

import contextlib
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from horoyolo.elastic.actions import Change, CloseHost, EndWorker, Finish, Form, Interrupt, OpenHost, StartWorker, Tell
from horoyolo.elastic.channel import ALIVE_EVERY_S, HANG_TIMEOUT, HANG_TIMEOUT_S, SLOTS, Lines, Message, encode
from horoyolo.elastic.discovery import Ask, Discovery
from horoyolo.elastic.membership import Limits, Membership
from horoyolo.elastic.rendezvous import Rendezvous
from horoyolo.elastic.screen import Screen
from horoyolo.elastic.watchdog import Watchdog
from horoyolo.launch.environment import python_words
from horoyolo.launch.hosts import Host
from horoyolo.launch.interface import address_of, interface_of, own_address
from horoyolo.launch.job import Job
from horoyolo.launch.remote import is_local, ssh_argv
from horoyolo.launch.run import SignalLog
from horoyolo.launch.session import ssh_to
from horoyolo.launch.status import STATUS_DIR, note_too_few

POLL_S = 0.5
END_S = 20.0  # agents kill what is left of the job, and leave
LOG_IN_S = 15.0  # besides LEASE_S, for an agent to say its first word
GLOO = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
LOOPBACK = ("127.0.0.1", "lo")


@dataclass(frozen=True)
class Elastic:
    """What makes a job elastic."""

    limits: Limits
    ask: Ask  # for the list of hosts
    ask_every_s: float
    by_srun: bool = False  # agents on other hosts are started by srun inside an allocation, not by ssh
    hang_timeout_s: float = HANG_TIMEOUT_S


def run_elastic(job: Job, elastic: Elastic) -> int:
    """Run an elastic job to its end and return its exit status: 0 done, 1 failed, 2 bad input, 75 stopped on request or for want of workers.

    The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP has the workers stop at an agreed step; another one, at least two seconds later, kills them. No
    process of the job outlives this call, on any host that can be reached; on others they end by themselves within LEASE_S. Call it from the main
    thread; ``job.env`` names the status folder, ``job.num_workers`` is of no meaning.
    """
    with SignalLog() as signals:
        coordinator = Coordinator(job, elastic)
        try:
            return coordinator.run(signals)
        finally:
            coordinator.close()


def agent_argv(job: Job, host: Host, by_srun: bool) -> list[str]:
    """The words that start the agent of a host: here, by srun, or by ssh."""
    command = [sys.executable, "-m", "horoyolo.elastic.agent", job.env[STATUS_DIR]]
    tag = f"{STATUS_DIR}={job.env[STATUS_DIR]}"  # by which a later agent of the job finds one that hangs
    if is_local(host.name):
        return ["env", tag, *command]
    if by_srun:
        step = ["--nodes=1", "--ntasks=1", f"--nodelist={host.name}", f"--chdir={job.cwd}"]
        return ["srun", "--overlap", "--mpi=none", "--cpu-bind=none", *step, "env", tag, *command]
    return ssh_argv(host.name, ["env", "-C", job.cwd, *python_words(job.env), tag, *command], ssh_to(host, job.ssh))


def workers_env(job: Job) -> dict[str, str]:
    """The variables that all workers of a job get."""
    return {name: value for name, value in job.env.items() if name != STATUS_DIR} | GLOO


@dataclass
class _Line:
    """The way to the agent of a host."""

    host: str
    process: subprocess.Popen
    said: Lines = field(default_factory=Lines)
    unread: bytes = b""  # of its standard error, behind the last line
    complaint: str = ""  # the last line
    ready: bool = False

    def tell(self, message: Message) -> None:
        """Say something to the agent; one that is gone is noticed by its silence."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(encode(message))
            self.process.stdin.flush()


class Coordinator:
    """The loop and what it holds: lines to agents, the state of the job, the rendezvous of the present generation."""

    def __init__(self, job: Job, elastic: Elastic) -> None:
        self.membership = Membership(elastic.limits)
        self._job = job
        self._elastic = elastic
        self._watchdog = Watchdog(elastic.hang_timeout_s)
        self._screen = Screen()
        self._discovery = Discovery(elastic.ask, elastic.ask_every_s, self._log)
        self._lines: dict[str, _Line] = {}
        self._host_of: dict[str, str] = {}  # worker -> host
        self._rendezvous: Rendezvous | None = None
        self._selector = selectors.DefaultSelector()
        self._alive_s = 0.0
        self._told_to_stop: set[str] = set()
        self._run: Message = {"folder": "", "step": 0}  # as workers told it

    def run(self, signals: SignalLog) -> int:
        """Listen and act until the job is over; its exit status."""
        self._discovery.start()
        while True:
            now = time.monotonic()
            self.membership.found(self._discovery.hosts())
            if signals.first is not None:
                self._stop()
            self._watch(now)
            for action in self.membership.decide(now):
                if isinstance(action, Finish):
                    if action.why:
                        self._log(action.why)
                    if self.membership.too_few and action.status == 75:
                        note_too_few()
                    return action.status
                self._do(action, now)
            if self.membership.is_up():
                self._close_rendezvous()
            if signals.insisted:
                self._log("killed on request")
                return 1
            self._listen(min(POLL_S, self.membership.next_s(now)))

    def close(self) -> None:
        """End whatever is left of the job on all hosts."""
        self._discovery.close()
        if self._rendezvous:
            self._rendezvous.close()
        for line in self._lines.values():
            line.tell({"do": "end"})
        end_s = time.monotonic() + END_S
        while self._lines and time.monotonic() < end_s:
            self._listen(POLL_S)
        for host in list(self._lines):
            self._log(f"{host} does not answer: what is left there ends by itself")
            self._hang_up(host)
        self._selector.close()
        self._screen.close()

    # -- what is heard

    def _listen(self, timeout_s: float) -> None:
        """Take in what agents say, and keep them alive."""
        for key, _ in self._selector.select(timeout_s):
            line: _Line = key.data
            if self._lines.get(line.host) is not line:
                continue
            part = key.fileobj.read1(2**16)  # type: ignore[union-attr]
            if key.fileobj is line.process.stderr:
                self._pass_on(line, part)
            elif part:
                self._hear(line, part)
            else:
                self._lose(line.host, line.complaint if not line.ready and line.complaint else "its agent has ended")
        if time.monotonic() - self._alive_s > ALIVE_EVERY_S:
            self._alive_s = time.monotonic()
            for line in self._lines.values():
                line.tell({"do": "alive"})

    def _pass_on(self, line: _Line, part: bytes) -> None:
        """What agents and workers write to standard error comes out here, whole lines at a time."""
        if not part:
            assert line.process.stderr is not None
            self._selector.unregister(line.process.stderr)
        *lines, line.unread = (line.unread + part).split(b"\n") if part else [line.unread, b""]
        for words in filter(None, lines):
            line.complaint = words.decode(errors="replace").strip()
            self._screen.say(words.decode(errors="replace"))

    def _hear(self, line: _Line, part: bytes) -> None:
        now = time.monotonic()
        self._watchdog.hear_host(line.host, now)
        try:
            messages = line.said.feed(part)
        except ValueError:  # a start-up file of the shell there prints something
            self._lose(line.host, "its log-in shell prints more than it is asked for")
            return
        for message in messages:
            match message["is"]:
                case "ready":
                    line.ready = True
                    self.membership.host_ready(line.host)
                case "said":
                    self._hear_worker(message["worker"], message["message"], now)
                case "ended":
                    self._watchdog.end_worker(message["worker"])
                    self.membership.ended(message["worker"], message["status"], now)

    def _hear_worker(self, name: str, message: Message, now: float) -> None:
        match message.get("say"):
            case "ready":
                self.membership.ready(name, message["generation"], now)
            case "joined":
                self.membership.joined(name, message["generation"])
            case "broken":
                self.membership.broken(name, message["generation"], now)
            case "pulse":
                self._watchdog.pulse(name, message, now)
                self._run["step"] = max(self._run["step"], message.get("step") or 0)
            case "run":
                self._run = {"folder": message["folder"], "step": message["step"]}
            case "left":
                self.membership.left(name, now)
            case "done":
                self.membership.done(name, now)

    def _watch(self, now: float) -> None:
        """Who gives no sign of life is not waited for."""
        for host, why in self._watchdog.overdue_hosts(now).items():
            self._lose(host, why)
        for name, why in self._watchdog.overdue_workers(now).items():
            self._watchdog.end_worker(name)
            for action in self.membership.kill(name, why, now):
                self._do(action, now)

    def _lose(self, host: str, why: str) -> None:
        """There is no way to a host any more."""
        self._hang_up(host)
        for name in [name for name, there in self._host_of.items() if there == host]:
            self._watchdog.end_worker(name)
        self.membership.host_lost(host, why, time.monotonic())

    def _hang_up(self, host: str) -> None:
        line = self._lines.pop(host)
        self._watchdog.forget_host(host)
        for key in [key for key in self._selector.get_map().values() if key.data is line]:
            self._selector.unregister(key.fileobj)
        line.process.kill()
        line.process.wait()
        for stream in (line.process.stdin, line.process.stdout, line.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    # -- what is done

    def _do(self, action: object, now: float) -> None:
        match action:
            case Tell():
                self._log(action.line)
            case OpenHost():
                self._open(action.host, now)
            case CloseHost():
                self._lines[action.host].tell({"do": "end"})
            case StartWorker():
                interface = self._network([host.name for host in self.membership.hosts])[1]
                env = {"HOROVOD_HOSTNAME": action.host, "HOROVOD_GLOO_IFACE": interface, SLOTS: str(action.slots)}
                env |= {HANG_TIMEOUT: str(self._elastic.hang_timeout_s), "HOROVOD_CROSS_SIZE": str(len(self.membership.hosts))}
                self._host_of[action.worker] = action.host
                self._watchdog.begin_worker(action.worker, now)
                self._lines[action.host].tell({"do": "start", "worker": action.worker, "slot": action.slot, "env": env})
            case EndWorker():
                self._signal(action.worker, signal.SIGKILL)
            case Interrupt():
                for name in action.workers:
                    self._watchdog.interrupt(name)
                    self._tell(name, {"tell": "interrupt", "generation": action.generation})
                self._close_rendezvous()
            case Change():
                for name in (*action.staying, *action.leaving):
                    self._tell(name, {"tell": "change", "generation": action.generation, "leaving": name in action.leaving})
            case Form():
                self._form(action)

    def _open(self, host: Host, now: float) -> None:
        argv = agent_argv(self._job, host, self._elastic.by_srun)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            process = subprocess.Popen(argv, start_new_session=True, **pipes)  # type: ignore[call-overload]
        except OSError as error:
            self.membership.host_lost(host.name, f"{shlex.join(argv[:1])} can't be run: {error.strerror}", now)
            return
        line = _Line(host.name, process)
        self._lines[host.name] = line
        self._watchdog.hear_host(host.name, now + LOG_IN_S)
        for stream in (process.stdout, process.stderr):
            self._selector.register(stream, selectors.EVENT_READ, line)
        line.tell({"do": "serve", "argv": list(self._job.argv), "cwd": self._job.cwd, "env": workers_env(self._job)})

    def _form(self, action: Form) -> None:
        self._close_rendezvous()
        address, interface = self._network([place.host for place in action.places])
        self._rendezvous = Rendezvous(address)
        where = {"addr": address, "port": self._rendezvous.port, "iface": interface, "stop": action.stop}
        for place in action.places:
            self._watchdog.place(place.worker)
            numbers = {name: value for name, value in asdict(place).items() if name not in ("worker", "host")}
            self._tell(place.worker, {"tell": "place", "generation": action.generation, **numbers, **where, **self._run})

    def _network(self, hosts: Sequence[str]) -> tuple[str, str]:
        """Where these hosts reach this machine, and the interface that their workers talk over."""
        others = [host for host in hosts if not is_local(host)]
        nic = self._job.nic
        if not others and not nic:
            return LOOPBACK
        numeric = next(filter(None, map(self._discovery.address, others)), "")  # a name server that is asked here would hold up all leases
        address = address_of(nic) or (own_address(numeric) if numeric else "") or LOOPBACK[0]
        return address, nic or interface_of(address)

    def _close_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None

    def _stop(self) -> None:
        """Hand the wish to stop to each worker that has something to save, once."""
        self.membership.stop()
        for worker in self.membership.workers.values():
            if worker.rank >= 0 and worker.name not in self._told_to_stop:
                self._told_to_stop.add(worker.name)
                self._signal(worker.name, signal.SIGTERM)

    def _tell(self, worker: str, message: Message) -> None:
        self._to_agent(worker, {"do": "tell", "worker": worker, "message": message})

    def _signal(self, worker: str, number: int) -> None:
        self._to_agent(worker, {"do": "signal", "worker": worker, "number": number})

    def _to_agent(self, worker: str, message: Message) -> None:
        line = self._lines.get(self._host_of[worker])
        if line is not None:
            line.tell(message)

    def _log(self, line: str) -> None:
        self._screen.say(f"horoyolo: {line}")

"""Where workers run: hostfiles, host lists and the allocations of batch systems all become one list of hosts.

A host that is named without a number has one slot for each time it is named. PBS, MPICH and Slurm mean that too; Open MPI alone takes a bare
host that is named once for all of its cores, which nobody can know here and which no GPU host wants. A host whose slots are given is named
once: launchers disagree on what a second line means (Open MPI 4 adds, refuses or takes the last, Horovod keeps one of them).
"""

from __future__ import annotations

import ipaddress
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from horoyolo.config import InputError

# Names end up on command lines and, inside Horovod and Open MPI, unquoted in shells: nothing that means something there may pass.
# And what no name server can be asked for: nothing between two dots, or more than 63 signs there.
NAME = re.compile(r"(?!.*\.\.)(?!.*[^.]{64})[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")
ADDRESS_6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
MAX_NODES = 65536  # as in Slurm: a slip in a range is not to fill the memory
LEGAL_LINE = "HOST, HOST slots=N max_slots=N port=N, HOST:N and # comments are legal"
LEGAL_LIST = "HOST or HOST:N between commas is legal"


@dataclass(frozen=True)
class Host:
    """A machine and how many workers it takes; raises InputError for a name or a number that can't be."""

    name: str  # IPv6 without brackets
    slots: int
    max_slots: int | None = None  # how far Open MPI may go beyond slots
    port: int | None = None  # of its sshd

    def __post_init__(self) -> None:
        if not (NAME.fullmatch(self.name) or is_address_6(self.name)):
            raise InputError(f"{self.name!r} is no host name: letters, digits, '_', '-' and '.' are, up to 63 between dots, or an IPv6 address")
        if self.slots < 1:
            raise InputError(f"{self.slots} slots; at least 1 is wanted")
        if self.max_slots is not None and self.max_slots < self.slots:
            raise InputError(f"max_slots={self.max_slots} is less than its {self.slots} slots")
        if self.port is not None and not 0 < self.port < 65536:
            raise InputError(f"port={self.port}; 1 to 65535 is wanted")


def is_address_6(name: str) -> bool:
    """Whether a host is named by an IPv6 address."""
    try:
        return bool(ADDRESS_6.fullmatch(name)) and bool(ipaddress.IPv6Address(name))
    except ValueError:
        return False


def local_hosts(num_workers: int) -> list[Host]:
    """This machine, for all workers."""
    return [Host("localhost", num_workers)]


def take_slots(hosts: Sequence[Host], num_workers: int) -> list[Host]:
    """The hosts with the slots that ``num_workers`` fill, one host after the other; raises InputError when there are too few.

    Launchers get no slot too many: horovodrun starts a worker in every slot it is told about, whatever ``-np`` says.
    """
    num_slots = sum(host.slots for host in hosts)
    if num_workers > num_slots:
        raise InputError(f"{num_workers} workers (-np) but {num_slots} slots on {len(hosts)} hosts: fewer workers or more slots are wanted")
    taken: list[Host] = []
    for host in hosts:
        slots = min(host.slots, num_workers - sum(before.slots for before in taken))
        if slots:
            taken.append(replace(host, slots=slots))
    return taken


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of an Open MPI, MPICH, Intel MPI or PBS file, in its order; raises InputError naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"hostfile {str(path)!r} can't be read: {reason}") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str = "hostfile") -> list[Host]:
    """The hosts of a hostfile's text; ``source`` names it in errors. Each line tells its form by itself."""
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        words = re.sub(r"\s*=\s*", "=", line.split("#")[0]).split()
        if words:
            entries.append(_entry(words, f"{source}, line {number}", line.strip(), LEGAL_LINE))
    if not entries:
        raise InputError(f"{source}: no host in it; {LEGAL_LINE}")
    return _merged(entries)


def parse_host_list(text: str, source: str = "--hosts") -> list[Host]:
    """The hosts of a list such as ``a:4,b:4,[fe80::1]:2``."""
    words = text.split(",")
    return _merged([_entry([word.strip()], f"{source}, entry {number}", word, LEGAL_LIST) for number, word in enumerate(words, 1)])


def slurm_hosts(env: Mapping[str, str]) -> list[Host]:
    """The hosts of the Slurm allocation that the environment describes, with a slot for each task; needs no scontrol."""
    names = _slurm_variable(env, "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = expand_nodelist(env[names], names)
    tasks = _slurm_variable(env, "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    slots = expand_counts(env[tasks], tasks)
    if tasks == "SLURM_NTASKS_PER_NODE" and len(slots) == 1:
        slots *= len(nodes)  # what the user asked for, one figure for all
        num_tasks = env.get("SLURM_NTASKS", "")
        if "SLURM_TASKS_PER_NODE" in env and num_tasks.isdigit() and int(num_tasks) < sum(slots):
            tasks = "SLURM_TASKS_PER_NODE"  # beside a number of tasks the other figure is only the most that a node takes
            slots = expand_counts(env[tasks], tasks)
    if len(slots) != len(nodes):
        raise InputError(f"{tasks}={env[tasks]!r} is for {len(slots)} nodes but {names}={env[names]!r} names {len(nodes)}")
    numbered = enumerate(zip(nodes, slots, strict=True), 1)
    return _merged(_Entry(Host(node, number), f"{names}, node {place}", bare=False) for place, (node, number) in numbered)


def expand_nodelist(text: str, source: str = "node list") -> list[str]:
    """The names in a compressed list of Slurm such as ``n[001-003,7],gpu-a`` or ``r[1-2]n[01-16]``."""
    wrong = f"{source}={text!r}: "
    nodes: list[str] = []
    for item in re.split(r",(?![^\[\]]*\])", text):  # at the commas outside of brackets
        pieces = re.split(r"\[([^\[\]]*)\]", item)  # plain, in brackets, plain, ...
        choices = [_expand_range(piece, wrong) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        if math.prod(map(len, choices)) + len(nodes) > MAX_NODES:
            raise InputError(f"{wrong}more than {MAX_NODES} nodes")
        names = ["".join(parts) for parts in itertools.product(*choices)]
        if not all(NAME.fullmatch(name) for name in names):
            raise InputError(f"{wrong}{item!r} names no host; names between commas with ranges in brackets are legal, such as n[001-003,7],gpu-a")
        nodes += names
    return nodes


def expand_counts(text: str, source: str = "tasks per node") -> list[int]:
    """The figures of every node in a compressed list of Slurm such as ``4(x2),2``."""
    counts: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", word.strip())
        if match is None or not int(match[1]) or len(counts) + int(match[2] or 1) > MAX_NODES:
            raise InputError(f"{source}={text!r}: N or N(xREPEATED) between commas is legal, each N at least 1, such as 4(x2),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def render_host_list(hosts: Sequence[Host]) -> str:
    """What ``-H`` takes; max_slots and ports have no place there."""
    return ",".join(f"{bracketed(host.name)}:{host.slots}" for host in hosts)


def bracketed(name: str) -> str:
    """A host name before a colon: IPv6 addresses hold some themselves."""
    return f"[{name}]" if ":" in name else name


@dataclass(frozen=True)
class _Entry:
    host: Host
    where: str
    bare: bool  # no number was given


def _entry(words: Sequence[str], where: str, read: str, legal: str) -> _Entry:
    """The host that the words of one line or list item mean."""
    wrong = f"{where}: read {read!r}: "
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::([^:]*))?", words[0])
    keywords = {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        name = name.replace("-", "_")
        if name not in ("slots", "max_slots", "port") or name in keywords:
            raise InputError(f"{wrong}{word!r} is not understood; {legal}")
        keywords[name] = _number(value, f"{wrong}{word!r}")
    if match is None and "slots" in keywords:
        address, slots = words[0], None  # an IPv6 address without brackets, whose end can't be mistaken for slots
    elif match is None:
        raise InputError(f"{wrong}{words[0]!r} is not understood; {legal}, with an IPv6 address as [ADDRESS]:N")
    else:
        address, slots = match[1] or match[2], match[3]
    if slots is not None and "slots" in keywords:
        raise InputError(f"{wrong}slots are given twice; {legal}")
    if slots is not None:
        keywords["slots"] = _number(slots, f"{wrong}{words[0]!r}")
    try:
        host = Host(address or "", **{"slots": 1, **keywords})
    except InputError as error:
        raise InputError(f"{wrong}{error}; {legal}") from error
    return _Entry(host, where, bare=not keywords)


def _merged(entries: Iterable[_Entry]) -> list[Host]:
    """One host for each name; bare ones add up."""
    first: dict[str, _Entry] = {}
    for entry in entries:
        name = entry.host.name.lower()  # as in DNS
        before = first.setdefault(name, entry)
        if before is not entry:
            if not (before.bare and entry.bare):
                again = f"{entry.where}: host {entry.host.name} is there already ({before.where})"
                raise InputError(f"{again}; once with its slots is wanted, or bare once a slot")
            first[name] = replace(before, host=replace(before.host, slots=before.host.slots + 1))
    return [entry.host for entry in first.values()]


def _number(text: str, wrong: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise InputError(f"{wrong}: a whole number is wanted")
    return int(text)


def _slurm_variable(env: Mapping[str, str], *names: str) -> str:
    for name in names:
        if env.get(name):
            return name
    raise InputError(f"--slurm: no {' or '.join(names)} in the environment: inside an allocation (sbatch, salloc) is where it works")


def _expand_range(text: str, wrong: str) -> list[str]:
    """``001-003,7`` as its numbers; the lower end says how many digits each has."""
    numbers: list[str] = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", word)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or low > high:
            raise InputError(f"{wrong}[{text}] is no range; numbers and LOW-HIGH between commas are legal in brackets, such as [001-003,7]")
        if high - low >= MAX_NODES - len(numbers):
            raise InputError(f"{wrong}more than {MAX_NODES} nodes")
        numbers += [f"{number:0{len(match[1])}d}" for number in range(low, high + 1)]
    return numbers

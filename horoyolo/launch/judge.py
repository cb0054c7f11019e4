"""What is wrong with a cluster, from what its hosts said: pure functions, and the thresholds in one place.

An error would stop a job or spoil its result, or makes the whole job several times slower; a warning may cost something and need not.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from horoyolo.launch.hosts import Host

ERROR, WARNING = "error", "warning"

SLOW_MBIT_S = 500.0  # error: an exchange of YOLOv5s' 28 MB would take longer than most steps; healthy 1 Gbit/s Ethernet gives 940
MODEST_MBIT_S = 900.0  # warning: less than healthy 1 Gbit/s Ethernet
SLOW_ROUND_TRIP_MS = 2.0  # warning: hosts of one room have less than 0.5
CLOCK_ERROR_S, CLOCK_WARNING_S = 60.0, 1.0
SHM_ERROR_BYTES = 100 * 2**20  # loader processes pass batches through it; a container gets 64 MiB unless told otherwise
SHM_SLOT_BYTES = 512 * 2**20  # warning below this much for each slot
DISK_ERROR_BYTES, DISK_WARNING_BYTES = 2**30, 10 * 2**30  # of the working directory: a checkpoint of YOLOv5x takes 1.4 GB while it is written
TMP_ERROR_BYTES, TMP_WARNING_BYTES = 64 * 2**20, 512 * 2**20
FILES_ERROR, FILES_WARNING = 256, 1024  # open files: connections to all workers, loader processes, images

REQUIRED = (  # what setup.cfg asks for, and Horovod
    *("torch", "horovod", "numpy", "pyyaml", "opencv-python-headless", "simplejpeg", "faster-coco-eval"),
    *("matplotlib", "tensorboard", "tqdm"),
)
OPTIONAL = ("horoyolo", "mpi4py", "nvidia-nccl-cu12", "nvidia-nccl-cu13")  # asked for too, missed only where said below


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with the host it is wrong on and what to do."""

    severity: str  # error or warning
    host: str
    check: str  # ssh, names, torch, link, ...
    message: str
    remedy: str


@dataclass(frozen=True)
class Link:
    """The way from one host to another, as the receiver saw it."""

    source: str
    target: str
    mbit_s: float = 0.0
    round_trip_ms: float = 0.0
    error: str = ""  # instead of figures

    @property
    def slow(self) -> bool:
        return bool(self.error) or self.mbit_s < SLOW_MBIT_S


@dataclass
class Cluster:
    """Everything that was asked and answered."""

    hosts: Sequence[Host]
    workdir: str
    data: str = ""  # data.yaml that was asked for
    nic: str = ""
    unreachable: dict[str, Finding] = field(default_factory=dict)  # host -> why
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # host -> answers of its probe
    links: list[Link] = field(default_factory=list)
    mpi: dict[str, Any] = field(default_factory=dict)  # figures of the MPI probe, or why there are none


def judge(cluster: Cluster) -> list[Finding]:
    """All findings: errors first, and in the order of the hosts."""
    findings = [*cluster.unreachable.values()]
    for host in cluster.hosts:
        if host.name in cluster.facts:
            for check in HOST_CHECKS:
                findings += check(cluster, host, cluster.facts[host.name])
    for compare in (_differences, _data_differences, _gpu_differences, _precision_differences, _slow_links, _mpi):
        findings += compare(cluster)
    order = {host.name: at for at, host in enumerate(cluster.hosts)}
    return sorted(findings, key=lambda finding: (finding.severity != ERROR, order.get(finding.host, -1)))


def is_routable(address: str) -> bool:
    """Whether other hosts can reach an address."""
    try:
        found = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    return not (found.is_loopback or found.is_unspecified or found.is_link_local)


def address_of(facts: Mapping[str, Any], nic: str = "", known_as: Container[str] = ()) -> str:
    """The address by which others reach a host: of ``nic`` if it is given; one of those it is known as, else the first; empty for none."""
    interfaces = {nic: facts["interfaces"].get(nic, {})} if nic else facts["interfaces"]
    usable = [address for it in interfaces.values() if it.get("up") for address in it["addresses"] if is_routable(address)]
    return next((address for address in usable if address in known_as), next(iter(usable), ""))


def size_text(size: float) -> str:
    """Bytes in words, such as 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# Checks of one host


def _python(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    if facts["python_wanted"] != facts["python"]["executable"]:
        message = f"there is no {facts['python_wanted']}, which workers run; {facts['python']['executable']} answered instead"
        yield Finding(ERROR, host.name, "python", message, f"set horoyolo up on {host.name} at the same path as here: scripts/setup.sh")
    if not facts["workdir"]:
        remedy = f"make it there (mkdir -p), or start from a folder that all hosts have; horovodrun changes to it on {host.name}"
        yield Finding(ERROR, host.name, "workdir", f"there is no folder {cluster.workdir}", remedy)


def _packages(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    if facts["python_wanted"] != facts["python"]["executable"]:
        return  # another Python has other packages
    for name in REQUIRED:
        if not facts["packages"].get(name):
            versions = Counter(version for it in cluster.facts.values() if (version := it["packages"].get(name)))
            wanted = f"{name}=={versions.most_common(1)[0][0]}" if versions else name
            how = "scripts/setup.sh builds and installs it" if name == "horovod" else f"{facts['python_wanted']} -m pip install {wanted}"
            yield Finding(ERROR, host.name, name, f"package {name} is missing", f"on {host.name}: {how}")
    if not facts["source"]:
        remedy = f"on {host.name}: pip install horoyolo as it is here, or check it out at the same path"
        yield Finding(ERROR, host.name, "horoyolo", "package horoyolo is missing", remedy)


def _horovod(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    load = facts.get("load", {})
    if not all(facts["packages"].get(name) for name in ("torch", "horovod")):
        return  # said already
    built_for, torch = facts["horovod_for_torch"], facts["packages"]["torch"]
    rebuild = f"on {host.name}: scripts/setup.sh builds it anew"
    if built_for and built_for.split("+")[0] != torch.split("+")[0]:
        yield Finding(ERROR, host.name, "horovod", f"Horovod was built for torch {built_for}, but torch is {torch}", rebuild)
    elif load.get("error"):
        yield Finding(ERROR, host.name, "horovod", f"torch or Horovod does not load: {load['error']}", rebuild)
    elif load and not (load["horovod"]["gloo"] or load["horovod"]["mpi"]):
        yield Finding(ERROR, host.name, "horovod", "Horovod was built with neither Gloo nor MPI", rebuild)
    elif load and facts["gpus"] and not load["horovod"]["nccl"]:
        remedy = f"on {host.name}: with nvcc of torch's CUDA release on PATH, scripts/setup.sh builds and installs it with NCCL"
        yield Finding(WARNING, host.name, "horovod", "it has GPUs, but Horovod was built without NCCL: gradients go through the CPU", remedy)


def _names(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    if len(cluster.hosts) < 2:
        return
    resolved, own_name = facts.get("resolved", {}), facts["hostname"]
    own_address = address_of(facts, cluster.nic) or "ADDRESS"
    for name in dict.fromkeys((own_name, host.name)):
        addresses = resolved.get(name, [])
        if not addresses:
            message = f"its own name {name} does not resolve there"
        elif not is_routable(addresses[0]):
            message = f"its own name {name} resolves to {addresses[0]}, where no other host can reach it"
        else:
            continue
        remedy = f"in /etc/hosts of {host.name}: `{own_address} {name}`, and {name} on no line of 127.0.0.1, 127.0.1.1 or ::1"
        yield Finding(ERROR, host.name, "names", message, remedy)
    others = [other.name for other in cluster.hosts if other.name != host.name]
    unknown = [name for name in others if not resolved.get(name)]
    if unknown:
        remedy = f"add {'them' if len(unknown) > 1 else 'it'} to DNS or to /etc/hosts of {host.name}"
        yield Finding(ERROR, host.name, "names", f"it does not resolve {_listed(unknown)}", remedy)
    for name in others:
        address = next(iter(resolved.get(name, [])), "")
        owner = cluster.facts.get(name)
        if address and not is_routable(address):
            remedy = f"in /etc/hosts of {host.name}: the address of {name} instead"
            yield Finding(ERROR, host.name, "names", f"it resolves {name} to {address}, which is itself", remedy)
        elif address and owner and address not in owner.get("own_addresses", [address]):
            right = address_of(owner, cluster.nic)
            remedy = f"correct it in DNS or in /etc/hosts of {host.name}" + (f": {right} {name}" if right else "")
            yield Finding(ERROR, host.name, "names", f"it resolves {name} to {address}, which {name} does not have", remedy)


def _interface(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    interfaces = facts["interfaces"]
    if cluster.nic and cluster.nic not in interfaces:
        remedy = f"give one that all hosts have with --nic; {host.name} has {_listed(list(interfaces)) or 'none'}"
        yield Finding(ERROR, host.name, "interface", f"there is no network interface {cluster.nic}", remedy)
    elif cluster.nic and not interfaces[cluster.nic]["up"]:
        remedy = f"on {host.name}: ip link set {cluster.nic} up; or another interface with --nic"
        yield Finding(ERROR, host.name, "interface", f"network interface {cluster.nic} is down", remedy)
    elif len(cluster.hosts) > 1 and not address_of(facts, cluster.nic):
        which = f"network interface {cluster.nic} has no address" if cluster.nic else "no network interface has an address"
        remedy = f"give {host.name} one, or choose another interface with --nic"
        yield Finding(ERROR, host.name, "interface", f"{which} that other hosts can reach", remedy)


def _room(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    places = (
        ("workdir", cluster.workdir, DISK_ERROR_BYTES, DISK_WARNING_BYTES, "free some, or work in another folder"),
        ("tmp", "/tmp", TMP_ERROR_BYTES, TMP_WARNING_BYTES, "free some"),
        ("shm", "/dev/shm", SHM_ERROR_BYTES, SHM_SLOT_BYTES * host.slots, "mount -o remount,size=8G /dev/shm; of a container: --shm-size=8g"),
    )
    for check, path, error_below, warning_below, remedy in places:
        disk = facts["disks"][check]
        if "error" in disk:
            if check != "workdir" or facts["workdir"]:  # else it was said that the folder is missing
                yield Finding(ERROR, host.name, check, f"{path} can't be looked at: {disk['error']}", f"see to {path} on {host.name}")
            continue
        if not disk["writable"]:
            yield Finding(ERROR, host.name, check, f"{path} can't be written to", f"see to its rights or its mount on {host.name}")
        if disk["free_inodes"] == 0:
            yield Finding(ERROR, host.name, check, f"{path} takes no more files (no free inodes)", f"on {host.name}: delete files there")
        elif disk["free"] < warning_below:
            severity = ERROR if disk["free"] < error_below else WARNING
            wanted = error_below if severity == ERROR else warning_below
            message = f"{path} has {size_text(disk['free'])} free of {size_text(disk['total'])}; {size_text(wanted)} are wanted"
            yield Finding(severity, host.name, check, message, f"on {host.name}: {remedy}")


def _limits(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    files, memlock = facts["limits"]["nofile"], facts["limits"]["memlock"]
    if 0 <= files < FILES_WARNING:
        severity = ERROR if files < FILES_ERROR else WARNING
        remedy = f"on {host.name}, in /etc/security/limits.conf: * soft nofile 65536"
        yield Finding(severity, host.name, "limits", f"a process may open {files} files only", remedy)
    if memlock >= 0 and facts["infiniband"]:
        remedy = f"on {host.name}, in /etc/security/limits.conf: * - memlock unlimited; of a container: --ulimit memlock=-1"
        yield Finding(WARNING, host.name, "limits", f"it has InfiniBand, but a process may lock only {size_text(memlock)} of memory", remedy)


def _slots(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    gpus, cores, slots = len(facts["gpus"]), facts["cores"], host.slots
    if gpus and slots > gpus:
        message, remedy = f"{slots} slots, but only {gpus} GPUs", f"slots={gpus} for {host.name} in the host list"
        yield Finding(ERROR, host.name, "slots", message, remedy)
    elif gpus and slots < gpus:
        message, remedy = f"{slots} slots for {gpus} GPUs: {gpus - slots} stay idle", f"slots={gpus} for {host.name} in the host list"
        yield Finding(WARNING, host.name, "slots", message, remedy)
    if slots > cores:
        severity = WARNING if gpus else ERROR
        message = f"{slots} slots, but only {cores} cores: workers would wait for each other"
        yield Finding(severity, host.name, "slots", message, f"slots={cores} for {host.name} in the host list, or more cores for its container")
    seen = facts.get("load", {}).get("gpus")
    if gpus and seen is not None and seen < gpus:
        cuda = facts["load"].get("cuda") or "(none)"
        remedy = f"on {host.name}: see CUDA_VISIBLE_DEVICES, and whether torch's CUDA {cuda} suits the driver (nvidia-smi)"
        yield Finding(ERROR, host.name, "slots", f"torch sees {seen} of {gpus} GPUs", remedy)


def _clock(cluster: Cluster, host: Host, facts: Mapping[str, Any]) -> Iterator[Finding]:
    offset, doubt = facts["clock"]["offset_s"], facts["clock"]["doubt_s"]
    certain = abs(offset) - doubt
    if certain > CLOCK_WARNING_S:
        side = "ahead of" if offset > 0 else "behind"
        message = f"its clock is {abs(offset):.1f} s {side} this machine's (within {doubt:.1g} s)"
        remedy = f"on {host.name}: have it synchronised (timedatectl set-ntp true, or chrony)"
        yield Finding(ERROR if certain > CLOCK_ERROR_S else WARNING, host.name, "clock", message, remedy)


HOST_CHECKS: tuple[Callable[[Cluster, Host, Mapping[str, Any]], Iterable[Finding]], ...] = (
    *(_python, _packages, _horovod, _names, _interface, _room, _limits, _slots, _clock),
)


# Checks between hosts


def horovod_build(facts: Mapping[str, Any]) -> str:
    """Version and built-in parts of Horovod, such as 0.28.1 (gloo, mpi)."""
    built = facts.get("load", {}).get("horovod", {})
    parts = ", ".join(name for name in ("gloo", "mpi", "nccl") if built.get(name))
    version = facts["packages"].get("horovod")
    return f"{version} ({parts})" if version and parts else ""


def nccl_version(facts: Mapping[str, Any]) -> str:
    """The version of NCCL that torch brings, empty without one."""
    packages = facts["packages"]
    return facts.get("load", {}).get("nccl") or packages.get("nvidia-nccl-cu13") or packages.get("nvidia-nccl-cu12") or ""


def horoyolo_source(facts: Mapping[str, Any]) -> str:
    """Version and hash of the source of horoyolo."""
    return f"{facts['packages'].get('horoyolo') or 'checkout'} source {facts['source'][:12]}" if facts["source"] else ""


# What must be the same everywhere: what it is, how to read it off a host's facts (empty: nothing to compare), and what helps.
SAME: dict[str, tuple[Callable[[Mapping[str, Any]], str], str]] = {
    "python": (lambda facts: facts["python"]["version"], "install Python {common} on {host} and run scripts/setup.sh there"),
    "torch": (
        lambda facts: facts["packages"].get("torch", ""),
        "on {host}: pip install torch=={common}, then scripts/setup.sh builds Horovod for it",
    ),
    "horovod": (horovod_build, "on {host}: scripts/setup.sh builds and installs it as elsewhere; with NCCL where nvcc is on PATH"),
    "cuda": (lambda facts: facts.get("load", {}).get("cuda", ""), "on {host}: install the build of torch that the others have, for CUDA {common}"),
    "nccl": (nccl_version, "on {host}: install the build of torch that the others have, with NCCL {common}"),
    "horoyolo": (horoyolo_source, "bring the checkout on {host} to the same commit as the others"),
}


def _differences(cluster: Cluster) -> Iterator[Finding]:
    comparable = {host: facts for host, facts in cluster.facts.items() if facts["python_wanted"] == facts["python"]["executable"]}
    for check, (read, remedy) in SAME.items():
        for host, value, common, others in _odd_ones({host: read(facts) for host, facts in comparable.items()}):
            message = f"{check} is {value}, but {common} on {_listed(others)}"
            yield Finding(ERROR, host, check, message, remedy.format(host=host, common=common))
    for package in REQUIRED:
        if package in SAME:
            continue
        for host, value, common, others in _odd_ones({host: facts["packages"].get(package, "") for host, facts in comparable.items()}):
            message = f"{package} is {value}, but {common} on {_listed(others)}"
            yield Finding(WARNING, host, package, message, f"on {host}: pip install {package}=={common}")


def _data_differences(cluster: Cluster) -> Iterator[Finding]:
    answers = {host: facts["data"] for host, facts in cluster.facts.items() if "data" in facts}
    for host, answer in answers.items():
        if "error" in answer:
            message = str(answer["error"]).removeprefix("horoyolo: error: ")
            remedy = f"have the data set at the same path on {host}, or let `launch --stage DIR` copy it there"
            yield Finding(ERROR, host, "data", message, remedy)
    for host, _, common, others in _odd_ones({host: answer.get("hash", "") for host, answer in answers.items()}):
        right = next(answer for answer in answers.values() if answer.get("hash") == common)
        message = f"its data set differs: {_data_text(answers[host], right)}, but {_data_text(right, answers[host])} on {_listed(others)}"
        yield Finding(ERROR, host, "data", message, f"copy {cluster.data} to {host} again, or let `launch --stage DIR` do it")


def _data_text(answer: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The splits in which two scans differ, as the first has them."""
    differing = [(name, split) for name, split in answer["splits"].items() if split["hash"] != other["splits"].get(name, {}).get("hash")]
    parts = (f"{name} {split['images']} images, {split['boxes']} boxes, hash {split['hash'][:12]}" for name, split in differing)
    return "; ".join(parts) or "other class names"


def _gpu_differences(cluster: Cluster) -> Iterator[Finding]:
    with_gpus = [host for host, facts in cluster.facts.items() if facts["gpus"]]
    for host, facts in cluster.facts.items():
        if with_gpus and not facts["gpus"]:
            remedy = f"see what nvidia-smi says on {host}, or take it out of the host list"
            yield Finding(ERROR, host, "slots", f"no GPU is found, but {_listed(with_gpus)} have some", remedy)
    for host, value, common, others in _odd_ones({host: facts["gpus"][0] for host, facts in cluster.facts.items() if facts["gpus"]}):
        message = f"its GPUs are {value}, but {common} on {_listed(others)}: every step takes as long as the slowest"
        yield Finding(WARNING, host, "slots", message, f"leave {host} to another job if it is the slower one")


def _precision_differences(cluster: Cluster) -> Iterator[Finding]:
    for host, value, common, others in _odd_ones({host: facts.get("load", {}).get("computes_on", "") for host, facts in cluster.facts.items()}):
        message = f"without --precision and --device it computes on {value}, but {_listed(others)} on {common}: no job would start"
        yield Finding(WARNING, host, "precision", message, "name what all hosts have, such as --precision fp32")


def _slow_links(cluster: Cluster) -> Iterator[Finding]:
    links = cluster.links
    for link in links:
        if link.error:
            remedy = f"let {link.target} take connections from {link.source} on all TCP ports (firewall): Gloo, MPI and NCCL choose theirs freely"
            yield Finding(ERROR, link.target, "link", f"{link.source} can't send to it: {link.error}", remedy)
    told: set[tuple[str, str]] = set()
    for link in links:
        if link.error or link.mbit_s >= MODEST_MBIT_S:
            continue
        severity = ERROR if link.slow else WARNING
        for host, says in _culprits(links, link):
            if (host, says) not in told:
                told.add((host, says))
                message = f"{says}: {link.mbit_s:.0f} Mbit/s, round trip {link.round_trip_ms:.2f} ms"
                remedy = f"see to cable, switch port and limits (ethtool, tc qdisc) of {host}, or choose a faster interface with --nic"
                yield Finding(severity, host, "link", message, remedy)
    for link in links:
        if not link.error and link.round_trip_ms > SLOW_ROUND_TRIP_MS and not link.slow:
            message = f"a round trip from it to {link.target} takes {link.round_trip_ms:.1f} ms"
            remedy = f"put {link.source} and {link.target} on one switch, or choose a better interface with --nic"
            yield Finding(WARNING, link.source, "link", message, remedy)


def _culprits(links: Sequence[Link], link: Link) -> list[tuple[str, str]]:
    """Whose fault a slow link is, and what to say: of the end that does well with nobody else; of both where that can't be told."""
    sends_well = any(not other.slow for other in links if other.source == link.source)
    receives_well = any(not other.slow for other in links if other.target == link.target)
    if sends_well != receives_well:
        return [(link.target, f"it receives slowly from {link.source}")] if sends_well else [(link.source, f"it sends slowly to {link.target}")]
    return [(link.source, f"slow link between it and {link.target}"), (link.target, f"slow link between it and {link.source}")]


def _mpi(cluster: Cluster) -> Iterator[Finding]:
    if cluster.mpi.get("error"):
        remedy = f"needed for mpirun and --transport mpi only; by hand: {cluster.mpi['command']}"
        yield Finding(WARNING, cluster.mpi["host"], "mpi", f"MPI did not start on all hosts: {cluster.mpi['error']}", remedy)
    slow_anyway = {name for link in cluster.links if link.slow for name in (link.source, link.target)}
    for rank in cluster.mpi.get("ranks", []):
        if rank["mbit_s"] < SLOW_MBIT_S and rank["host"] not in slow_anyway:
            remedy = "give MPI the right interface with --nic, and see btl and pml in `ompi_info`"
            yield Finding(WARNING, rank["host"], "mpi", f"it sends only {rank['mbit_s']:.0f} Mbit/s over MPI, but more over TCP", remedy)


def _odd_ones(values: Mapping[str, str]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Hosts whose value is not the most common one: host, value, most common value, hosts that have it. Of equals the first is taken."""
    known = {host: value for host, value in values.items() if value}
    if not known:
        return
    common = Counter(known.values()).most_common(1)[0][0]
    others = [host for host, value in known.items() if value == common]
    for host, value in known.items():
        if value != common:
            yield host, value, common, others


def _listed(names: Sequence[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")

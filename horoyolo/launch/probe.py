"""What a host says about itself: a program sent through ssh's standard input, of the standard library alone: it runs where nothing is installed.

It reads requests, one JSON object a line, and answers each with one line that starts with `MARK` (login scripts print things too). It ends
when its input does, which is when the doctor or the connection does. Written for Python 3.8 and later.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MARK = "horoyolo-probe:"
CHUNK = 2**18
SEND_S = 1.0  # how long a link is measured,
SEND_BYTES = 2**28  # or how much is sent over it
RECEIVE_S = 3.0  # after this much time a slow link has told enough
MEET_S = 10.0  # for the other host to turn up
PINGS = 50
LOAD_LIMIT_S = 120.0
RESOLVE_LIMIT_S = 20.0
SIOCGIFADDR = 0x8915  # from linux/sockios.h
SO_BINDTODEVICE = 25  # from asm-generic/socket.h

# What loads the compiled parts the way a worker does: files that are there may still lack a library.
LOAD = """
import json
import torch
found = {"cuda": torch.version.cuda or "", "gpus": torch.cuda.device_count(), "nccl": "", "horovod": {}}
if found["gpus"]:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
try:
    import horovod.torch as hvd
    found["horovod"] = {"gloo": hvd.gloo_built(), "mpi": hvd.mpi_built(), "nccl": bool(hvd.nccl_built())}
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
try:
    from horoyolo.engine.device import numerics_for, pick_device
    found["computes_on"] = numerics_for(pick_device("", 0), "auto").kind
except Exception:
    pass  # what is missing is told by other checks
print(json.dumps(found))
"""


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Versions, addresses, room and limits; takes well under a second."""
    workdir = request["workdir"]
    with contextlib.suppress(OSError):
        os.chdir(workdir)  # as workers do: a checkout there counts as installed
    return {
        "hostname": socket.gethostname(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: _version(name) for name in request["packages"]},
        "horovod_for_torch": _horovod_for_torch(),
        "source": _source_hash("horoyolo"),
        "interfaces": _interfaces(),
        "workdir": os.path.isdir(workdir),
        "disks": {name: _disk(path) for name, path in (("workdir", workdir), ("tmp", "/tmp"), ("shm", "/dev/shm"))},
        "limits": {"nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]},
        "cores": _cores(),
        "gpus": _gpus(),
        "infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
    }


def resolve(request: dict[str, Any]) -> dict[str, Any]:
    """Host names as this host resolves them: the addresses, or none."""
    pool = ThreadPoolExecutor(16)
    asked = {name: pool.submit(_addresses_of, name) for name in request["names"]}
    deadline = time.monotonic() + RESOLVE_LIMIT_S
    found: dict[str, list[str]] = {}
    for name, answer in asked.items():
        try:
            found[name] = answer.result(max(0.0, deadline - time.monotonic()))
        except Exception:  # of two kinds, depending on the version of Python: it took too long
            found[name] = []
    pool.shutdown(wait=False)
    return found


def owns(request: dict[str, Any]) -> dict[str, Any]:
    """Which of some addresses are this host's own."""
    own = []
    for address in request["addresses"]:
        with contextlib.suppress(OSError):
            _bound_socket(address, "").close()
            own.append(address)
    return {"addresses": own}


def clock(request: dict[str, Any]) -> dict[str, Any]:
    """The time here, in seconds since the epoch."""
    return {"time": time.time()}


def load(request: dict[str, Any]) -> dict[str, Any]:
    """What torch and Horovod say when they are loaded, or the error."""
    return _run([sys.executable, "-c", LOAD], LOAD_LIMIT_S)


def data(request: dict[str, Any]) -> dict[str, Any]:
    """The report of the label scan, or the error."""
    command = [sys.executable, "-m", "horoyolo", "data", "check", "--data", request["data"], "--splits", *request["splits"], "--json", "-"]
    return _run(command, request["within_s"])


class Listener:
    """Waits for one other host and measures what comes from it."""

    def __init__(self, address: str, device: str, token: str) -> None:
        self.heard: dict[str, Any] = {"error": "nobody connected"}
        self._token = token.encode()
        self._socket = _bound_socket(address, device)
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def port(self) -> int:
        return self._socket.getsockname()[1]

    def wait(self) -> dict[str, Any]:
        """Bytes received and the seconds they took, or the error."""
        self._thread.join(MEET_S + RECEIVE_S + 2)
        return self.heard

    def _listen(self) -> None:
        deadline = time.monotonic() + MEET_S
        with self._socket:
            while time.monotonic() < deadline:
                self._socket.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    peer, _ = self._socket.accept()
                    with peer:
                        peer.settimeout(RECEIVE_S)
                        if hmac.compare_digest(_receive(peer, len(self._token)), self._token):
                            self.heard = _take(peer)
                            return
                except OSError as error:
                    self.heard = {"error": str(error)}


_listener: Listener | None = None


def listen(request: dict[str, Any]) -> dict[str, Any]:
    """Wait for another host in the background; gives the port. `heard` gives the result."""
    global _listener
    _listener = Listener(request["address"], request["device"], request["token"])
    return {"port": _listener.port()}


def heard(request: dict[str, Any]) -> dict[str, Any]:
    """What came from the other host: bytes and seconds, or the error."""
    return _listener.wait() if _listener else {"error": "not listening"}


def send(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the way to another host: the least round trip in seconds; it knows the bandwidth."""
    with _bound_socket(request["address"], request["device"]) as connection:
        connection.settimeout(MEET_S)
        connection.connect((request["to"], request["port"]))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request["token"].encode())
        trips = []
        for _ in range(PINGS):
            start = time.perf_counter()
            connection.sendall(b"p")
            _receive(connection, 1)
            trips.append(time.perf_counter() - start)
        connection.sendall(b"e")
        block, sent, start = bytes(CHUNK), 0, time.perf_counter()
        with contextlib.suppress(ConnectionError):  # the other host has heard enough
            while time.perf_counter() - start < SEND_S and sent < SEND_BYTES:
                connection.sendall(block)
                sent += CHUNK
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
    return {"round_trip_s": min(trips)}


def _take(peer: socket.socket) -> dict[str, Any]:
    """The receiving side of `send`."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while _receive(peer, 1) == b"p":
        peer.sendall(b"p")
    block, received, start = bytearray(CHUNK), len(_receive(peer, 1)), time.perf_counter()
    while time.perf_counter() - start < RECEIVE_S:
        count = peer.recv_into(block)
        if not count:
            break
        received += count
    return {"bytes": received, "seconds": time.perf_counter() - start}


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the other host hung up")
        received += part
    return received


def _bound_socket(address: str, device: str) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if device:
        with contextlib.suppress(OSError):  # older kernels want root for it; the address then has to do
            bound.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode())
    try:
        bound.bind((address, 0))
    except OSError:
        bound.close()
        raise
    return bound


def _run(command: list[str], limit_s: float) -> dict[str, Any]:
    """The JSON object that a command prints, or its last line of complaint as `error`."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {limit_s:.0f} s"}
    except OSError as error:
        return {"error": str(error)}
    if done.returncode == 0:
        with contextlib.suppress(ValueError):
            return json.loads(done.stdout.decode("utf-8", "replace").strip())
    complaint = done.stderr.decode("utf-8", "replace").strip() or f"exit status {done.returncode}"
    return {"error": complaint.splitlines()[-1]}


def _version(package: str) -> str:
    """The installed version, empty where it is not installed."""
    try:
        return importlib.metadata.version(package) or ""
    except Exception:  # not installed, or its files are damaged, which is no better
        return ""


def _package_folder(package: str) -> Path | None:
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec(package)  # finds it without importing it
        if spec and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    return None


def _horovod_for_torch() -> str:
    """The version of torch that Horovod was compiled for."""
    folder = _package_folder("horovod")
    try:
        return json.loads((folder / "metadata.json").read_text())["pytorch"] if folder else ""
    except (OSError, ValueError, KeyError):
        return ""


def _source_hash(package: str) -> str:
    """SHA-256 over names and contents of a package's files, empty where it is not installed."""
    folder = _package_folder(package)
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".yaml")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _interfaces() -> dict[str, dict[str, Any]]:
    """Network interfaces: whether each is up, its addresses, and its nominal speed in Mbit/s (0: not known)."""
    found = {}
    for folder in sorted(Path("/sys/class/net").iterdir()) if os.path.isdir("/sys/class/net") else []:
        name = folder.name
        up = _read(folder / "operstate") in ("up", "unknown")  # loopback and some tunnels never say more
        flags = int(_read(folder / "flags") or "0", 16)
        speed = _read(folder / "speed")
        found[name] = {
            "up": up and bool(flags & 1),
            "addresses": _ipv4_addresses(name) + _ipv6_addresses(name),
            "speed_mbit_s": int(speed) if speed.isdigit() else 0,
        }
    return found


def _ipv4_addresses(interface: str) -> list[str]:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, interface.encode()[:15].ljust(256, b"\0"))
        except OSError:
            return []
    return [socket.inet_ntoa(answer[20:24])]


def _ipv6_addresses(interface: str) -> list[str]:
    """Without the link-local ones, which need the interface's name to be of use."""
    lines = (line.split() for line in _read(Path("/proc/net/if_inet6")).splitlines())
    found = (socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line[0])) for line in lines if line[-1] == interface)
    return [address for address in found if not address.startswith("fe80")]


def _addresses_of(name: str) -> list[str]:
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(found))


def _disk(path: str) -> dict[str, Any]:
    try:
        size = shutil.disk_usage(path)
        inodes = os.statvfs(path)
    except OSError as error:
        return {"error": str(error)}
    return {
        "total": size.total,
        "free": size.free,
        "free_inodes": inodes.f_favail if inodes.f_files else -1,  # some file systems have no fixed number
        "writable": os.access(path, os.W_OK),
    }


def _cores() -> int:
    """The cores that processes here may use: fewer than the machine has in a container or an allocation."""
    cores = len(os.sched_getaffinity(0))
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _gpus() -> list[str]:
    """The name of each GPU."""
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    try:
        done = subprocess.run([command, "--query-gpu=name", "--format=csv,noheader"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.decode().splitlines() if line.strip()] if done.returncode == 0 else []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


REQUESTS = {
    "facts": facts,
    "resolve": resolve,
    "owns": owns,
    "clock": clock,
    "load": load,
    "data": data,
    "listen": listen,
    "heard": heard,
    "send": send,
}


def serve() -> None:
    """Answer requests until there are no more."""
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        try:
            answer = REQUESTS[request["do"]](request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(MARK + json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
    os._exit(0)  # a look-up of a name may still hang

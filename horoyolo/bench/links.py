"""The link between hosts: made slower for a while, and how many bytes a host has sent over it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from horoyolo.bench.processes import Place
from horoyolo.config import InputError
from horoyolo.launch.hosts import Host
from horoyolo.launch.remote import LaunchError

AS_IT_IS = "0"
RATE = re.compile(r"[0-9]+(\.[0-9]+)?[kmg]?(bit|bps)", re.IGNORECASE)
GRACE_S = 15.0

# The limit lives as long as the script's standard input: whatever ends the bench, or the line to the host, ends it too.
SHAPE = """
PATH=$PATH:/usr/sbin:/sbin
tc qdisc replace dev "$1" root tbf rate "$2" burst 256kb latency 50ms
trap : HUP INT TERM
echo shaped
read -r line || true
tc qdisc del dev "$1" root
"""


def check_rate(rate: str, place: Place) -> str:
    """Gives the rate back; raises InputError when tc would not know it, or when there is no link to make slower."""
    if rate != AS_IT_IS and not RATE.fullmatch(rate):
        raise InputError(f"--links {rate}: a rate as tc writes it is wanted, such as 200mbit, or 0 for the link as it is")
    if rate != AS_IT_IS and not place.nic:
        raise InputError(f"--links {rate}: only a link between hosts can be made slower; --hosts names some, --nic their interface")
    return rate


@contextlib.contextmanager
def shaped(place: Place, rate: str) -> Iterator[None]:
    """While it is open, each host sends no faster than ``rate``, as tc writes it (``200mbit``); AS_IT_IS changes nothing. Needs root.

    Whatever rule the interfaces had is replaced, and the kernel's default is back afterwards. Raises LaunchError where a host refuses.
    """
    with contextlib.ExitStack() as stack:
        for host in place.hosts if rate != AS_IT_IS else ():
            stack.enter_context(_shaped_host(place, host, rate))
        yield


@contextlib.contextmanager
def _shaped_host(place: Place, host: Host, rate: str) -> Iterator[None]:
    argv = place.argv_on(host, ["sh", "-ec", SHAPE, "sh", place.nic, rate])
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        try:
            if process.stdout.readline().strip() != "shaped":
                raise LaunchError(f"{host.name}: {place.nic} can't be limited to {rate}: {process.stderr.read().strip()}")
            yield
        finally:
            process.stdin.close()
            process.wait(GRACE_S)
    if process.returncode:
        raise LaunchError(f"{host.name}: the limit of {place.nic} could not be removed: tc qdisc del dev {place.nic} root")


def sent_bytes(nic: str) -> int:
    """Bytes that an interface of this host has sent, headers included; 0 without an interface."""
    return int(Path(f"/sys/class/net/{os.path.basename(nic)}/statistics/tx_bytes").read_text()) if nic else 0

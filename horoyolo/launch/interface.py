"""Which network interface leads to the other hosts."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Sequence

from horoyolo.launch.hosts import Host
from horoyolo.launch.remote import is_local

SIOCGIFADDR = 0x8915  # from linux/sockios.h: the IPv4 address of an interface


def interface_to(hosts: Sequence[Host]) -> str:
    """The interface of this machine that leads to the first of the other hosts; '' when there is none or it can't be told.

    Nothing is sent: the kernel says which address it would send from.
    """
    for host in hosts:
        if not is_local(host.name):
            return _interface_of(_own_address(host.name))
    return ""


def _own_address(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # an unknown name, or no route
            return ""
        return probe.getsockname()[0]


def _interface_of(address: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(control, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""

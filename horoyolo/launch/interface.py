"""Which network interface leads to the other hosts."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Sequence

from horoyolo.launch.hosts import Host
from horoyolo.launch.remote import is_this_machine

SIOCGIFADDR = 0x8915  # from linux/sockios.h: the IPv4 address of an interface


def interface_to(hosts: Sequence[Host]) -> str:
    """The interface of this machine that leads to the first of the other hosts; '' when there is none or it can't be told.

    Nothing is sent: the kernel says which address it would send from.
    """
    for host in hosts:
        if not is_this_machine(host.name):
            return interface_of(own_address(host.name))
    return ""


def own_address(host: str) -> str:
    """The IPv4 address from which this machine would send to a host; '' when its name is unknown or there is no route. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)[0][4])
        except (OSError, UnicodeError):  # an unknown name, none at all, or no route
            return ""
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The interface of this machine that has an IPv4 address; '' when none has it."""
    return next((name for _, name in socket.if_nameindex() if address and address_of(name) == address), "")


def address_of(interface: str) -> str:
    """The IPv4 address of an interface of this machine; '' when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            answer = fcntl.ioctl(control, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])

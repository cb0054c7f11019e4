"""The signals that ask a program to stop. A terminal that goes away, because a log-in broke off, asks as well."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import suppress

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def heeded_requests() -> list[signal.Signals]:
    """The signals to be handled: who was started to outlive its terminal (``nohup``) ignores SIGHUP, and goes on doing so."""
    return [number for number in REQUESTS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def leave_lost_terminal() -> None:
    """Has the output of this process go nowhere where it was a terminal that is gone: to write there is an error, which would end the program."""
    with open(os.devnull, "wb") as nowhere:
        for stream in (1, 2):
            with suppress(OSError):  # it was closed
                if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                    os.dup2(nowhere.fileno(), stream)

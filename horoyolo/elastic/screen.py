"""Standard error for a loop that must never wait: a pipe that nobody reads or a stopped terminal holds up whoever writes to it."""

from __future__ import annotations

import os
import queue
import threading
import time

MOST_LINES = 10_000
LAST_WORDS_S = 2.0


class Screen:
    """Lines on their way to a descriptor, written by a thread. Those that find ``MOST_LINES`` before them are dropped, and counted."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(MOST_LINES)
        self._dropped = 0
        threading.Thread(target=self._write_all, daemon=True).start()

    def say(self, line: str) -> None:
        """Have a line written some time; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait until all is written, LAST_WORDS_S at most."""
        end_s = time.monotonic() + LAST_WORDS_S
        while self._lines.unfinished_tasks and time.monotonic() < end_s:
            time.sleep(0.01)

    def _write_all(self) -> None:
        while True:
            self._write(self._lines.get())
            if self._dropped and self._lines.empty():
                dropped, self._dropped = self._dropped, 0
                self._write(f"horoyolo: {dropped} lines are missing here: standard error took no more for a while")
            self._lines.task_done()

    def _write(self, line: str) -> None:
        # Not by sys.stderr: a thread that waits holds its lock, and an interpreter that ends meanwhile aborts.
        left = f"{line}\n".encode()
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # nobody will ever read it
                return

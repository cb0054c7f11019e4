"""A worker that says and does what a real one would, without torch and Horovod: its collectives are always well, until it is told otherwise.

``stub_worker.py OUT [PLAN]``: in OUT it leaves a file for each of its places, and reads what it is to do (``OUT/<what>.<slot>``).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from horoyolo.elastic.channel import FD, HANG_TIMEOUT, LEASE_S, MEMORY, SLOT, Lines, encode
from horoyolo.launch.status import report_status


class Stub:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.slot = os.environ[SLOT]
        self.me = f"{os.environ['HOROVOD_HOSTNAME']}.{self.slot}"
        self.channel = socket.socket(fileno=int(os.environ[FD]))
        self.channel.settimeout(LEASE_S)
        self.lines = Lines()
        self.generation = 0
        self.told: list[dict[str, Any]] = []
        self.news = threading.Condition()
        self.stop = False
        self.lock = threading.Lock()

    def say(self, **message: Any) -> None:
        with self.lock:
            self.channel.sendall(encode(message))

    def listen(self) -> None:
        try:
            while part := self.channel.recv(4096):
                with self.news:
                    self.told += [message for message in self.lines.feed(part) if message["tell"] != "alive"]
                    self.news.notify_all()
        except OSError:
            pass
        os._exit(9)

    def pulse(self) -> None:
        while True:
            phase, age_s, limit_s = ("step", 60, 15) if self.wish("hang") else ("wait", 0, None)
            self.say(say="pulse", step=1, phase=phase, age_s=age_s, limit_s=limit_s)
            time.sleep(0.2)

    def wish(self, what: str) -> bool:
        return (self.out / f"{what}.{self.slot}").exists()

    def run(self, plan: str) -> int:
        threading.Thread(target=self.listen, daemon=True).start()
        threading.Thread(target=self.pulse, daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        (self.out / f"started.{os.getpid()}").write_text(f"{self.me} {os.environ[MEMORY]}")
        (Path(os.environ[MEMORY]) / "state").write_text("kept")
        if plan == "bad":
            return report_status(2)
        time.sleep(0.1)
        while True:
            self.say(say="ready", generation=self.generation)
            place = self.wait_for("place")
            self.generation = place["generation"]
            self.say(say="joined", generation=self.generation)
            note = {**place, "worker": self.me, "pid": os.getpid(), "hang_timeout": os.environ[HANG_TIMEOUT]}
            (self.out / f"place.{self.generation}.{place['rank']}").write_text(json.dumps(note))
            if place["stop"]:
                return report_status(75)
            if (message := self.train(plan)) is None:
                return report_status(75)
            if message == {}:
                self.say(say="done")
                return report_status(0)
            if message["tell"] == "interrupt":
                self.say(say="broken", generation=self.generation)
            elif message["leaving"]:
                self.say(say="left")
                return report_status(0)

    def train(self, plan: str) -> dict[str, Any] | None:
        """What ended the generation: a message, nothing (a signal), or {} for the end of the run."""
        while not self.stop:
            if plan == "done" or self.wish("finish"):
                return {}
            if self.wish("fail"):
                (self.out / f"fail.{self.slot}").unlink(missing_ok=True)
                sys.exit(1)
            with self.news:
                for message in self.told:
                    if message.get("generation") == self.generation:
                        self.told.remove(message)
                        return message
                self.news.wait(0.02)
        return None

    def wait_for(self, what: str) -> dict[str, Any]:
        with self.news:
            while True:
                for message in self.told:
                    if message["tell"] == what:
                        self.told.remove(message)
                        return message
                self.news.wait()


if __name__ == "__main__":
    sys.exit(Stub(Path(sys.argv[1])).run((sys.argv[2:] or [""])[0]))

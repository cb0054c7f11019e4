"""A worker with real collectives: it sums a vector again and again, and notes each sum with its time. No more of the project than the channel.

``horovod_worker.py OUT``: like ``stub_worker.py``, with steps in ``OUT/steps.<pid>`` (time, generation, size).
"""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

from stub_worker import Stub

from horoyolo.launch.status import report_status

NUMBERS = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")


def open_sockets() -> list[int]:
    """Descriptors of this process's connected TCP sockets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM and copy.getpeername():
                        found.append(int(name))
        except OSError:
            pass
    return found


class Worker(Stub):
    def listen(self) -> None:
        import threading

        threading.Thread(target=self.interrupt, daemon=True).start()
        super().listen()

    def interrupt(self) -> None:
        """End the sockets of a generation that is broken, unless this worker has left it already: they are the next one's then."""
        while True:
            with self.news:
                self.news.wait_for(lambda: any(message["tell"] == "interrupt" for message in self.told))
                meant = {message["generation"] for message in self.told if message["tell"] == "interrupt"}
                self.told = [message for message in self.told if message["tell"] != "interrupt"]
                for descriptor in open_sockets() if self.generation in meant else []:
                    try:
                        with socket.socket(fileno=os.dup(descriptor)) as copy:
                            copy.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass

    def train(self, plan: str) -> dict[str, Any] | None:
        raise NotImplementedError

    def run(self, plan: str) -> int:
        import threading

        import horovod.torch as hvd
        import torch
        from horovod.common.exceptions import HorovodInternalError

        torch.set_num_threads(1)
        threading.Thread(target=self.listen, daemon=True).start()
        threading.Thread(target=self.pulse, daemon=True).start()
        (self.out / f"started.{os.getpid()}").write_text(self.me)
        vector = torch.ones(100_000)
        steps = (self.out / f"steps.{os.getpid()}").open("w", buffering=1)
        while True:
            self.say(say="ready", generation=self.generation)
            place = self.wait_for("place")
            with self.news:
                self.generation = place["generation"]
            os.environ.update({f"HOROVOD_{name.upper()}": str(place[name]) for name in NUMBERS})
            os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = place["addr"], str(place["port"])
            os.environ["HOROVOD_GLOO_IFACE"] = place["iface"]
            hvd.init()
            self.say(say="joined", generation=self.generation)
            note = {**place, "worker": self.me, "pid": os.getpid()}
            (self.out / f"place.{self.generation}.{place['rank']}").write_text(json.dumps(note))
            change: dict[str, Any] | None = None
            try:
                while change is None:
                    wish = any(message["tell"] == "change" and message["generation"] == self.generation for message in self.told)
                    vector[:] = 1
                    vector[0] = wish or self.wish("finish")
                    total = hvd.allreduce(vector, op=hvd.Sum, name="vector")
                    assert int(total[-1]) == place["size"], (total[-1], hvd.rank(), hvd.size())
                    steps.write(f"{time.time()} {self.generation} {place['size']}\n")
                    if total[0]:  # somebody knows already: all leave after this step, and the rest hear of it soon
                        change = {} if self.wish("finish") else self.wait_for("change")
                    time.sleep(0.005)
            except HorovodInternalError:
                self.say(say="broken", generation=self.generation)
            hvd.shutdown()
            if change == {}:
                self.say(say="done")
                return report_status(0)
            if change and change["leaving"]:
                self.say(say="left")
                return report_status(0)


if __name__ == "__main__":
    sys.exit(Worker(Path(sys.argv[1])).run(""))

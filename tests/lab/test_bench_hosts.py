"""Benches on several hosts: bytes that the interface counts are those declared, links are shaped while they are measured and no longer."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from netlab import INTERFACE, Lab
from training import ENV, HOROYOLO, TIMEOUT_S, wait_until

from horoyolo.compression.build import COMPRESSORS

BENCH = [*HOROYOLO, "bench"]
SMALL = ["--hosts", "node1:1,node2:1", "--cfg", "yolov5n", "--img", "64", "--batch", "2"]
HOSTS = ("node1", "node2")
MEGABIT = 1e6 / 8
NEGOTIATION_BYTES = 60_000  # of Horovod, a step; it grows with the time that a step takes


def shape_of(lab: Lab, host: str) -> str:
    return lab.run(host, ["tc", "qdisc", "show", "dev", INTERFACE], check=True).stdout


def test_bytes_on_the_interface_are_those_declared(lab: Lab, tmp_path: Path) -> None:
    path, plot = tmp_path / "report.json", tmp_path / "plot.png"
    words = ["--entries", *COMPRESSORS, "--overlap", "no", "--steps", "8", "--repeats", "1", "--links", "100mbit"]
    argv = [*BENCH, "compression", *SMALL, *words, "--json", str(path), "--plot", str(plot)]
    lab.run("node1", argv, env=ENV, timeout=TIMEOUT_S, check=True)
    rows = json.loads(path.read_text())["links"]["100mbit"]["rows"]
    assert list(rows) == list(COMPRESSORS)
    for row in rows.values():
        assert row["wire_bytes"] <= row["interface_bytes"] <= 1.06 * row["wire_bytes"] + NEGOTIATION_BYTES
    assert rows["none"]["median_s"] > 0.9 * rows["none"]["wire_bytes"] / (100 * MEGABIT)  # so it was slow
    assert plot.stat().st_size
    assert not [host for host in HOSTS if "tbf" in shape_of(lab, host)]


def test_whatever_ends_a_bench_leaves_links_as_they_were_and_no_worker(lab: Lab) -> None:
    argv = [*BENCH, "compression", *SMALL, "--entries", "none", "--steps", "100000", "--links", "10mbit"]
    before = {host: lab.processes(host) for host in HOSTS}
    for end in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with lab.popen("node1", argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            wait_until(lambda: all("tbf" in shape_of(lab, host) for host in HOSTS), process)
            process.send_signal(end)
            process.communicate(timeout=60)
        wait_until(lambda: not any("tbf" in shape_of(lab, host) for host in HOSTS), timeout_s=20)
        wait_until(lambda: {host: lab.processes(host) for host in HOSTS} == before, timeout_s=20)


def test_peers_and_sockets_run_between_hosts(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ["--entries", "none", "--overlap", "no", "--steps", "1", "--repeats", "1", "--link-ratio", "2", "--peers", "ddp-fp16"]
    lab.run("node1", [*BENCH, "compression", *SMALL, *words, "--json", str(path)], env=ENV, timeout=TIMEOUT_S, check=True)
    report = json.loads(path.read_text())
    link = report["links"]["ratio 2"]
    assert list(link["rows"]) == ["none", "DDP fp16, channels_last"]
    sent_bits = 8 * link["compute"]["gradient_bytes"]  # of each of two
    assert sent_bits / (float(link["rate"].removesuffix("kbit")) * 1e3) / link["compute"]["median_s"] > 1.99
    assert link["rows"]["none"]["interface_bytes"] > link["compute"]["gradient_bytes"]
    assert 0.5 < link["rows"]["DDP fp16, channels_last"]["interface_bytes"] / link["compute"]["gradient_bytes"] < 0.6

"""The benches run, and report what they print. How fast anything is, is not a test's to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from horoyolo import cli
from horoyolo.bench.compression import chosen_rows
from horoyolo.bench.step import VARIANTS
from horoyolo.compression.build import COMPRESSORS

SMALL = ["--cfg", "yolov5n", "--img", "64", "--batch", "2"]
SMALLEST = ["--cfg", "yolov5n", "--img", "32", "--batch", "2"]
PEERS = Path(__file__).parents[2] / "scripts" / "peers"


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    """What a bench wrote as JSON."""
    path = tmp_path / "report.json"
    assert cli.main(["bench", *words, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def check_spread(figures: dict[str, Any], repeats: int) -> None:
    assert 0 < figures["min_s"] <= figures["median_s"] <= figures["max_s"]
    assert len(figures["repeats_s"]) == repeats


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_step_reports_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "step", *SMALL, "--steps", "2", "--repeats", "2", "--device", "cpu")
    printed = capsys.readouterr().out
    assert list(report["variants"]) == list(VARIANTS)
    assert report["variants"]["fp32 NCHW"]["rate_ratio"] == 1
    for name, figures in report["variants"].items():
        check_spread(figures, 2)
        assert name in printed


def test_step_weighs_sizes_against_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path, "step", "--cfg", "yolov5n", "--img", "96,64", "--batch", "1,2", "--steps", "1", "--repeats", "2", "--device", "cpu")
    printed = capsys.readouterr().out
    assert list(report["variants"]) == ["64 px, batch 1", "64 px, batch 2", "96 px, batch 1", "96 px, batch 2"]
    for name, figures in report["variants"].items():
        check_spread(figures, 2)
        assert figures["peak_bytes"] > 0
        assert name in printed


def test_step_takes_no_other_words_for_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--img", "320,big"]) == 2
    assert "320,big: numbers from 1 up are wanted" in capsys.readouterr().err


def test_scaling_compares_workers_with_plain_processes_and_raw_sockets(tmp_path: Path) -> None:
    sizes = [*SMALLEST, "--steps", "2", "--repeats", "1", "--precision", "fp32", "--layouts", "NCHW"]
    report = run(tmp_path, "scaling", *sizes, "-np", "2", "--launchers", "horovodrun", "--peer", str(PEERS / "stock_horovod.py"))
    assert set(report["variants"]) == {
        "fp32 NCHW, no exchange",
        "fp32 NCHW, raw socket",
        "fp32 NCHW, Gloo",
        "fp32 NCHW, Gloo, stock optimizer",
    }
    assert report["variants"]["fp32 NCHW, Gloo"]["rate_against_raw_socket"] > 0
    assert report["variants"]["fp32 NCHW, Gloo"]["rate_against_stock"] > 0


def test_allreduce_compares_sums_by_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    report = run(tmp_path, "allreduce", "-np", "2", "--sizes", "4", "65536", "--repeats", "1", "--plot", str(plot))
    printed = capsys.readouterr().out
    assert list(report["variants"]) == ["horoyolo, Gloo", "stock Horovod, Gloo", "plain sockets"]
    for name, of_run in report["variants"].items():
        assert name in printed
        assert list(of_run) == ["4", "65536"]
        for size, figures in of_run.items():
            check_spread(figures, 1)
            assert figures["bytes_per_s"] == pytest.approx(int(size) / figures["median_s"])
    assert report["variants"]["plain sockets"]["4"]["rate_against_sockets"] == 1
    assert is_picture(plot)


def test_compression_reports_every_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    report = run(tmp_path, "compression", *SMALLEST, "-np", "2", "--steps", "1", "--repeats", "1", "--plot", str(plot))
    printed = capsys.readouterr().out
    (link,) = report["links"].values()
    assert list(link["rows"]) == [name for entry in COMPRESSORS for name in (entry, f"{entry}, overlapped")]
    assert link["plain"] in ("none", "none, overlapped")
    for name, row in link["rows"].items():
        assert name in printed
        check_spread(row, 1)
        assert min(row["encode_s"], row["wait_s"], row["decode_s"]) >= 0
        assert row["interface_bytes"] == 0  # one host
    none = link["rows"]["none"]
    assert none["error"] == 0
    assert none["error_with_feedback"] < 1e-6  # the mean is rounded
    for name, row in link["rows"].items():
        if not name.startswith("none"):
            assert row["wire_bytes"] < 0.6 * none["wire_bytes"]
            assert 0 < row["error_with_feedback"] < row["error"]
    assert is_picture(plot)


def test_compression_runs_peers_in_the_same_repeats(tmp_path: Path) -> None:
    words = ["-np", "2", "--steps", "1", "--repeats", "1", "--overlap", "no", "--entries", "none", "powersgd:powersgd_rank=2"]
    report = run(tmp_path, "compression", *SMALLEST, *words, "--peers", "stock-fp16", "ddp-powersgd")
    rows = report["links"]["0"]["rows"]
    ours, peers = ["none", "powersgd:powersgd_rank=2"], ["stock Horovod fp16, NCHW", "DDP powersgd rank 2, NCHW"]
    assert list(rows) == [*ours, *peers]
    for row in rows.values():
        check_spread(row, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compression", "--entries", "zip"], "--entries zip: comms.compression = 'zip'; known: auto, bf16"),
        (["compression", "--entries", "none:compression=int8"], "NAME:KEY=VALUE"),
        (["compression", "--entries", "int8:int8_block=0"], "--entries int8:int8_block=0: comms.int8_block = 0; at least 8"),
        (["compression", "--entries", "topk:topk_ratio=5"], "above 0 and up to 1"),
        (["compression", "--link-ratio", "0"], "above 0"),
        (["compression", "--steps", "0"], "at least 1"),
        (["allreduce", "--repeats", "0"], "at least 1"),
        (["allreduce", "--sizes", "0"], "at least 1"),
        (["allreduce", "--json", "."], "argument --json: . is a folder"),
        (["compression", "--entries", "topk:topk_ration=0.1"], "topk_ratio"),
        (["compression", "--entries", "topk:0.1"], "NAME:KEY=VALUE"),
        (["compression", "--entries", "none:overlap=yes"], "overlap is no setting of none here; it has bucket_mb"),
        (["compression", "--entries", "onebit:warmup_updates=9"], "warmup_updates is no setting of onebit here; it has bucket_mb, int8"),
        (["compression", "--links", "fast"], "200mbit"),
        (["compression", "--links", "50mbit"], "between hosts"),
        (["compression", "--link-ratio", "4"], "between hosts"),
        (["allreduce", "-np", "1"], "at least two"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_starts(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_what_is_named_twice_is_one_row() -> None:
    assert [name for name, _, _ in chosen_rows(["none", "int8", "none"], ["no", "no"])] == ["none", "int8"]

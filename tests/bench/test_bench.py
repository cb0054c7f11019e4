"""The benches run, and report what they print. How fast anything is, is not a test's to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from horoyolo import cli
from horoyolo.bench.step import VARIANTS

SMALL = ["--cfg", "yolov5n", "--img", "64", "--batch", "2", "--steps", "2", "--repeats", "2"]


def test_step_reports_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", *SMALL, "--device", "cpu", "--json", str(tmp_path / "step.json")]) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    assert list(report["variants"]) == list(VARIANTS)
    assert report["variants"]["fp32 NCHW"]["rate_ratio"] == 1
    for name, figures in report["variants"].items():
        assert 0 < figures["min_s"] <= figures["median_s"] <= figures["max_s"]
        assert len(figures["repeats_s"]) == 2
        assert name in capsys.readouterr().out or name != "fp32 NCHW"


def test_scaling_compares_workers_with_plain_processes(tmp_path: Path) -> None:
    peer = Path(__file__).parents[2] / "scripts" / "peers" / "stock_horovod.py"
    words = [*SMALL, "-np", "2", "--launchers", "horovodrun", "--peer", str(peer), "--json", str(tmp_path / "scaling.json")]
    words[words.index("--repeats") + 1] = "1"
    assert cli.main(["bench", "scaling", *words]) == 0
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert set(report["variants"]) == {
        "bf16 channels_last, no exchange",
        "bf16 NCHW, no exchange",
        "bf16 channels_last, Gloo",
        "bf16 NCHW, Gloo",
        "bf16 NCHW, Gloo, stock optimizer",
    }
    assert report["variants"]["bf16 NCHW, Gloo"]["rate_against_stock"] > 0

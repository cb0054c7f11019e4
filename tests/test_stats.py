"""data stats: figures by plain loops, and the pictures and files that are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from horoyolo import cli
from horoyolo.data.synthetic import write_synthetic
from horoyolo.model.yolo import load_layer_table
from horoyolo.stats import QUANTILES, describe


def test_figures_agree_with_plain_loops() -> None:
    rng = np.random.default_rng(0)
    labels = [np.column_stack([rng.integers(0, 3, n), rng.uniform(0.05, 0.9, (n, 4))]) for n in (4, 0, 1, 7)]
    shapes_hw = np.array([(320, 240), (100, 320), (320, 320), (200, 320)])
    anchors = np.array([(10.0, 13.0), (60.0, 50.0), (200.0, 300.0)])
    names = {0: "a", 1: "b", 2: "c", 3: "never"}
    found = describe("train", labels, shapes_hw, names, anchors, 2.0)

    boxes = [(c, w * hw[1], h * hw[0]) for rows, hw in zip(labels, shapes_hw.tolist(), strict=True) for c, _, _, w, h in rows.tolist()]
    worst = [[max(w / a, a / w, h / b, b / h) for a, b in anchors.tolist()] for _, w, h in boxes]
    assert (found.images, found.without_boxes, found.boxes) == (4, 1, 12)
    assert found.boxes_of_class == {name: sum(c == index for c, *_ in boxes) for index, name in names.items()}
    assert found.images_of_class == {name: sum(index in rows[:, 0] for rows in labels) for index, name in names.items()}
    assert found.side_px == pytest.approx(np.quantile([(w * h) ** 0.5 for _, w, h in boxes], QUANTILES))
    assert found.aspect == pytest.approx(np.quantile([w / h for _, w, h in boxes], QUANTILES))
    assert found.anchor_recall == pytest.approx(sum(min(ratios) < 2 for ratios in worst) / 12)
    nearest = [ratios.index(min(ratios)) for ratios in worst]
    assert list(found.nearest_anchor.values()) == pytest.approx([nearest.count(k) / 12 for k in range(3)])


def test_without_any_box_there_are_figures_too() -> None:
    found = describe("val", [np.zeros((0, 5))], np.array([(64, 64)]), {0: "a"}, np.array([(8.0, 8.0)]), 4.0)
    assert (found.boxes, found.anchor_recall, found.side_px) == (0, 1.0, [0.0, 0.0, 0.0])
    assert found.lines()


def test_the_command_prints_each_split_and_what_the_model_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic(tmp_path / "set", 12)
    words = ["data", "stats", "--data", str(tmp_path / "set" / "data.yaml"), "--img", "128", "--batch", "4", "--rect", "--augmented"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "stats.json")]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "stats.json").read_text())
    assert [found["what"] for found in figures] == ["train", "val", "train, augmented"]
    assert all(f"{found['what']}: {found['images']} images" in printed for found in figures)
    assert figures[2]["image_aspect"] == pytest.approx([4 / 3] * 3)  # 96 x 128
    names = {"train.png", "val.png", "train-augmented.png", "samples.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert all(cv2.imread(str(tmp_path / "out" / name)) is not None for name in names)
    assert cli.main([*words, "--set", "hyp.mosaik=1"]) == 2


def test_anchors_that_a_table_only_counts_are_fitted_to_the_boxes(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", 40)
    (tmp_path / "counted.yaml").write_text(yaml.safe_dump({**load_layer_table("yolov5n"), "anchors": 3}))
    words = ["data", "stats", "--data", str(tmp_path / "set" / "data.yaml"), "--cfg", str(tmp_path / "counted.yaml"), "--img", "128"]
    assert cli.main([*words, "--json", str(tmp_path / "stats.json")]) == 0
    figures = json.loads((tmp_path / "stats.json").read_text())
    assert len(figures[0]["nearest_anchor"]) == 9
    assert figures[0]["anchor_recall"] > 0.9

"""The thorough look at a data set: exactly what was broken on purpose is told, and what training makes of it is as stated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from horoyolo import cli
from horoyolo.data.check import SplitCheck, check_splits
from horoyolo.data.labels import label_path
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import draw_scene

EACH = 5
GOOD = "0 0.5 0.5 0.2 0.2\n"
EXIF_TURNED = b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def scene(number: int) -> np.ndarray:
    return draw_scene(np.random.default_rng(number), (48, 64))[0]


def jpeg(number: int) -> bytes:
    return simplejpeg.encode_jpeg(scene(number), quality=90)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def damaged(number: int) -> bytes:
    """A JPEG whose pixels are cut short and then ended as they should be."""
    whole = jpeg(number)
    return whole[: len(whole) // 2] + b"\xff\xd9"


def damaged_png(number: int) -> bytes:
    """Pixels that do not unpack, between a good header and a good end."""
    whole = bytearray(png(scene(number)))
    at = whole.index(b"IDAT") + 4
    whole[at : at + 40] = bytes(40)
    return bytes(whole)


# kind of finding -> what makes an image's bytes from its number
BROKEN_IMAGES: dict[str, Callable[[int], bytes]] = {
    "empty": lambda number: b"",
    "text": lambda number: b"<html>404</html>",
    "cut jpeg": lambda number: jpeg(number)[:-200],
    "headless": lambda number: jpeg(number)[300:],
    "cut png": lambda number: png(scene(number))[:-40],
    "damaged png": damaged_png,
    "damaged": damaged,
}
BROKEN_LABELS = {
    "corrupt": ("0 0.5 0.5 0.2\n", "0 0.5 half 0.2 0.2\n", "0 nan 0.5 0.2 0.2\n", "-1 0.5 0.5 0.2 0.2\n", "0.5 0.5 0.5 0.2 0.2\n"),
    "out_of_range": ("0 1.2 0.5 0.2 0.2\n", "0 0.5 -0.5 0.2 0.2\n", "0 320 240 64 48\n", "0 0.5 0.5 -0.2 0.2\n", "0 0.5 0.5 7 0.2\n"),
    "zero_area": ("0 0.5 0.5 0 0.2\n", "0 0.5 0.5 0.2 0\n", "0 0.5 0.5 0 0\n", "1 0.2 0.2 0 0\n", "0 0.1 0.1 0.1 0.2 0.1 0.3\n"),
    "duplicate": (GOOD,) * EACH,
    "empty_labels": ("", "\n", " \n", "\n\n", "\t\n"),
}
FINE = {
    "rotated": lambda number: jpeg(number)[:2] + EXIF_TURNED + jpeg(number)[2:],
    "grey": lambda number: simplejpeg.encode_jpeg(scene(number)[:, :, :1].copy(), colorspace="GRAY", quality=90),
    "alpha": lambda number: png(np.dstack([scene(number), np.full((48, 64), 200, np.uint8)])),
    "sixteen_bit": lambda number: png(scene(number).astype(np.uint16) * 257),
}
KINDS = [name for name in SplitCheck.__dataclass_fields__ if name != "scan"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]]]:
    """A data set of 40 good files and 100 broken ones or broken labels; with it, the files that each kind of finding must name."""
    root = tmp_path_factory.mktemp("broken")
    expected: dict[str, set[str]] = {}
    number = 0

    def add(content: bytes, label: str | None, suffix: str = ".jpg") -> str:
        nonlocal number
        number += 1
        image = root / "images" / "train" / f"{number:03d}{suffix}"
        for path in (image, label_path(image)):
            path.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(content)
        if label is not None:
            label_path(image).write_text(label)
        return image.relative_to(root).as_posix()

    def expect(kind: str, name: str) -> None:
        expected.setdefault(kind, set()).add(name)

    goods = [add(jpeg(i), GOOD + "1 0.2 0.2 0.1 0.1\n") for i in range(40)]
    for name, make in BROKEN_IMAGES.items():  # 35
        for _ in range(EACH):
            expect("damaged" if name == "damaged" else "corrupt_images", add(make(1000 + number), GOOD, ".png" if "png" in name else ".jpg"))
    for kind, texts in BROKEN_LABELS.items():  # 25
        for text in texts:
            image = add(jpeg(2000 + number), text if kind == "empty_labels" else GOOD + text)
            expect(kind, image if kind == "empty_labels" else label_path(Path(image)).as_posix() + ":2")
    for kind, make in FINE.items():  # 20
        for _ in range(EACH):
            expect(kind, add(make(3000 + number), GOOD, ".png" if kind in ("alpha", "sixteen_bit") else ".jpg"))
    for i in range(EACH):
        expect("missing_labels", add(jpeg(4000 + number), None))
        expect("same_pixels", f"{add(jpeg(i), GOOD)} = {goods[i]}")
        (root / "labels" / "train" / f"stray{i}.txt").write_text(GOOD)
        expect("stray_labels", f"labels/train/stray{i}.txt")
        val = root / "images" / "val" / f"leak{i}.jpg"
        for path in (val, label_path(val)):
            path.parent.mkdir(parents=True, exist_ok=True)
        val.write_bytes(jpeg(20 + i))
        label_path(val).write_text(GOOD)
        expect("also_elsewhere", f"images/val/leak{i}.jpg = {goods[20 + i]} of train")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [x, y, z]\n")
    assert sum(map(len, expected.values())) == 100
    return root / "data.yaml", expected


def found_in(check: SplitCheck) -> dict[str, set[str]]:
    """Files that a check names, by kind; a line's reason is left out."""
    lists = {name: value for name, value in vars(check.scan).items() if isinstance(value, list)} | {name: getattr(check, name) for name in KINDS}
    return {kind: {name.split(" (")[0] for name in names} for kind, names in lists.items() if names}


def test_the_report_lists_exactly_what_was_broken(broken: tuple[Path, dict[str, set[str]]]) -> None:
    train, val = check_splits(load_data_spec(broken[0]), ["train", "val"])
    found = found_in(train)
    assert found.pop("unseen_classes") == {"z"}
    leaks = found_in(val)
    assert leaks.pop("unseen_classes") == {"y", "z"}
    assert found | leaks == broken[1]


def test_training_stops_at_too_much_and_goes_on_with_what_is_usable_where_told_to(
    broken: tuple[Path, dict[str, set[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", broken[0], "--cfg", "yolov5n", "--img", 64, "--batch", 64, "--epochs", 1, "--workers", 0, "--project", tmp_path]
    words += ["--noautoanchor", "--precision", "fp32"]
    assert cli.main([*map(str, words)]) == 2
    assert "40 of 130 images or their labels are corrupt" in capsys.readouterr().err
    assert not (tmp_path / "exp").exists()
    words += ["--set", "max_bad_share=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "horoyolo", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("30 corrupt images left out", "5 corrupt label lines dropped", "5 boxes without area dropped", "5 duplicate label lines dropped"):
        assert line in done.stderr
    assert (tmp_path / "exp" / "weights" / "last.pt").is_file()


def test_an_unknown_class_stops_training_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        image = tmp_path / "images" / split / "a.jpg"
        for path in (image, label_path(image)):
            path.parent.mkdir(parents=True)
        image.write_bytes(jpeg(len(split)))
        label_path(image).write_text(GOOD + "4 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [x]\n")
    words = ["--data", str(tmp_path / "data.yaml")]
    assert cli.main(["data", "check", *words, "--json", str(tmp_path / "found.json")]) == 2
    captured = capsys.readouterr()
    assert "train: 2 label lines with an unknown class: labels/train/a.txt:2 (class 4), labels/train/a.txt:3 (class 7)" in captured.out
    assert "labels/train/a.txt:2: class 4 is beyond the classes" in captured.err
    assert len(json.loads((tmp_path / "found.json").read_text())["found"]["val"]["scan"]["unknown_class"]) == 2
    assert cli.main(["train", *words, "--cfg", "yolov5n", "--img", "64", "--project", str(tmp_path / "runs")]) == 2
    assert not (tmp_path / "runs").exists()

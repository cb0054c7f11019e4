"""The law of size, over every option that touches samples: 1, 2 and 4 workers see the same pixels and the same targets, in the same batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from horoyolo.config import Config, override
from horoyolo.data.build import build_sampler, build_train_data
from horoyolo.data.loader import Batch, build_train_loader
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import write_synthetic

OPTIONS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "no augmentation": {"hyp.mosaic": 0, "hyp.scale": 0, "hyp.translate": 0, "hyp.fliplr": 0, "hyp.hsv_h": 0, "hyp.hsv_s": 0, "hyp.hsv_v": 0},
    "geometry": {"hyp.degrees": 10, "hyp.shear": 5, "hyp.perspective": 0.0005, "hyp.flipud": 0.5},
    "mixup": {"hyp.mixup": 0.5},
    "copy-paste": {"hyp.copy_paste": 1.0},
    "rect": {"input.rect": True},
    "multi-scale": {"input.multi_scale": True},
    "multi-scale rect": {"input.multi_scale": True, "input.rect": True},
    "close mosaic": {"epochs": 2, "input.close_mosaic": 1},
    "sampling classes": {"input.sampling": "classes"},
    "sampling images": {"input.sampling": "images"},
    "ram cache": {"input.cache": "ram"},
    "disk cache": {"input.cache": "disk"},
    "albumentations": {"input.albumentations": "pipeline.yaml"},  # written by a fixture
}
PIPELINE = """
transform:
  __class_fullname__: Compose
  p: 1.0
  transforms:
  - {__class_fullname__: RandomBrightnessContrast, p: 0.7}
  - {__class_fullname__: Rotate, limit: [-15, 15], p: 0.7}
  - {__class_fullname__: GaussNoise, p: 0.7}
"""


@dataclass
class Place:
    """A worker's place without a Comm."""

    number: int
    among: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.among


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """17 images of two shapes: global batches of 8, 8 and 1, the last of which leaves most workers without any. The wide ones have outlines."""
    folder = tmp_path_factory.mktemp("scenes")
    write_synthetic(folder / "wide", 12, hw=(96, 128))
    write_synthetic(folder / "tall", 9, seed=1, hw=(128, 96))
    for file in (folder / "wide" / "labels" / "train").iterdir():
        rows = [[float(word) for word in line.split()] for line in file.read_text().splitlines()]
        corners = [(x - w / 2, y, x, y - h / 2, x + w / 2, y, x, y + h / 2) for _, x, y, w, h in rows]
        file.write_text("".join(f"{row[0]:g} {' '.join(map(str, corner))}\n" for row, corner in zip(rows, corners, strict=True)))
    (folder / "data.yaml").write_text("train: [wide/images/train, tall/images/train]\nnames: [circle, square, triangle]\n")
    return scan_split(load_data_spec(folder / "data.yaml"), "train")


def epochs(split: Split, config: Config, size: int) -> list[list[Batch]]:
    """The shares (size,) of each global batch of two epochs."""
    sampler = build_sampler(config, split, 32)
    if sampler.balance:
        sampler.balance.ap[:] = [0.9, 0.5, 0.1]  # as an evaluation may have found
    loaders = [build_train_loader(build_train_data(config, split), sampler, Place(rank, size), 0) for rank in range(size)]
    batches = []
    for _ in range(2):
        batches += [list(shares) for shares in zip(*loaders, strict=True)]
        sampler.next_epoch()
    return batches


def told_apart(shares: list[Batch]) -> list[Any]:
    """A global batch, however it was shared out: checksum, shape, and each image's targets."""
    targets = [share.targets[share.targets[:, 0] == i, 1:].tolist() for share in shares for i in range(len(share))]
    (shape,) = {share.images.shape[1:] for share in shares if len(share)}
    return [sum(share.crc for share in shares) % 2**32, tuple(shape), targets]


def config_of(values: Mapping[str, Any]) -> Config:
    return override(Config(img=64, batch=8), values, "test")


@pytest.fixture(autouse=True)
def _pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(PIPELINE)


def skip_without_library(option: str) -> None:
    if option == "albumentations":
        pytest.importorskip("albumentations", reason="albumentations is not installed (scripts/setup.sh does)")


@pytest.mark.parametrize("option", OPTIONS)
def test_the_same_samples_at_any_size(split: Split, option: str) -> None:
    skip_without_library(option)
    config = config_of(OPTIONS[option])
    alone = [told_apart(shares) for shares in epochs(split, config, 1)]
    assert len(alone) == 6
    assert len({crc for crc, *_ in alone}) == 6
    assert not {crc for crc, *_ in alone} & {told_apart(shares)[0] for shares in epochs(split, config_of({**OPTIONS[option], "seed": 1}), 1)}
    for size in (2, 4):
        assert [told_apart(shares) for shares in epochs(split, config, size)] == alone


@pytest.mark.parametrize("option", ["ram cache", "disk cache"])
@pytest.mark.parametrize("other", [{}, OPTIONS["multi-scale rect"]])
def test_a_cache_changes_no_pixel(split: Split, option: str, other: dict[str, Any]) -> None:
    cached, plain = ([told_apart(shares) for shares in epochs(split, config_of(values), 2)] for values in (other | OPTIONS[option], other))
    assert cached == plain


@pytest.mark.parametrize("option", [name for name in list(OPTIONS)[1:] if "cache" not in name])
def test_every_option_does_something(split: Split, option: str) -> None:
    skip_without_library(option)
    usual, changed = ([told_apart(shares) for shares in epochs(split, config_of(values), 1)] for values in ({}, OPTIONS[option]))
    assert changed != usual


def test_mosaic_is_off_in_the_last_epochs(split: Split) -> None:
    """What is left is one image, letterboxed: grey above and below or on both sides."""
    plain = OPTIONS["no augmentation"] | {"hyp.mosaic": 1, "epochs": 2, "input.close_mosaic": 1}
    first, second = (torch.cat([shares[0].images for shares in part]) for part in split_in_two(epochs(split, config_of(plain), 1)))
    margins = (second[:, :, :7] == 114).flatten(1).all(1) | (second[:, :, :, :7] == 114).flatten(1).all(1)
    assert margins.all()
    assert not ((first[:, :, :7] == 114).flatten(1).all(1) | (first[:, :, :, :7] == 114).flatten(1).all(1)).all()


def split_in_two(batches: list[list[Batch]]) -> tuple[list[list[Batch]], list[list[Batch]]]:
    return batches[: len(batches) // 2], batches[len(batches) // 2 :]


def test_rectangles_waste_less_than_squares(split: Split) -> None:
    shapes = {tuple(shares[0].images.shape[2:]) for shares in epochs(split, config_of({"input.rect": True}), 1)}
    assert (64, 64) in shapes  # a batch of both kinds
    assert shapes & {(64, 64), (32, 64), (64, 32)} == shapes


def test_loader_processes_follow_shapes_and_weights(split: Split) -> None:
    config = config_of(OPTIONS["multi-scale rect"] | {"input.sampling": "classes"})
    here = build_train_loader(build_train_data(config, split), build_sampler(config, split, 32), Place(0, 1), 0)
    there = build_train_loader(build_train_data(config, split), build_sampler(config, split, 32), Place(0, 1), 2)
    assert [told_apart([batch]) for batch in there] == [told_apart([batch]) for batch in here]

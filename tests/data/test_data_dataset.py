"""Samples and batches: functions of (seed, epoch, position), whoever makes them, in whatever number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from horoyolo.config import Hyper
from horoyolo.data.augment import GREY
from horoyolo.data.dataset import EvalDataset, TrainDataset, eval_hw
from horoyolo.data.loader import Batch, build_eval_loader, build_train_loader, choose_num_workers
from horoyolo.data.sampler import Key, Sampler
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.data.synthetic import write_synthetic

IMG = 64
HYPER = Hyper(mosaic=0.7, mixup=0.3, flipud=0.3, degrees=10)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("scenes") / "synthetic"
    write_synthetic(folder, 16)
    return scan_split(load_data_spec(folder / "data.yaml"), "train")  # 13 images


@dataclass
class Place:
    """A worker's place without a Comm."""

    number: int
    among: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.among


def images_and_targets(batches: list[Batch]) -> tuple[torch.Tensor, list[list[list[float]]]]:
    images = torch.cat([batch.images for batch in batches])
    targets = [batch.targets[batch.targets[:, 0] == i, 1:].tolist() for batch in batches for i in range(len(batch))]
    return images, targets


def test_sample_depends_on_its_key_and_the_seed_alone(split: Split) -> None:
    key = Key(epoch=2, position=5, index=1)
    dataset = TrainDataset(split, IMG, HYPER, seed=0)
    dataset[Key(0, 0, 0)]
    sample = dataset[key]
    again = TrainDataset(split, IMG, HYPER, seed=0)[key]
    assert torch.equal(sample.image, again.image)
    assert torch.equal(sample.targets, again.targets)
    assert sample.crc == zlib.crc32(sample.image.numpy().tobytes())
    others = [TrainDataset(split, IMG, HYPER, seed=1)[key], dataset[Key(3, 5, 1)], dataset[Key(2, 6, 1)]]
    assert sample.crc not in [other.crc for other in others]


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_sample_has_the_promised_shapes(split: Split, mosaic: float) -> None:
    dataset = TrainDataset(split, IMG, Hyper(mosaic=mosaic), seed=0)
    boxes = 0
    for position in range(8):
        sample = dataset[Key(0, position, position)]
        assert sample.image.shape == (3, IMG, IMG)
        assert sample.image.dtype == torch.uint8
        assert sample.image.is_contiguous()
        assert sample.targets.dtype == torch.float32
        x, y, w, h = sample.targets[:, 1:].T
        assert (torch.stack([x - w / 2, y - h / 2]) >= -1e-6).all()
        assert (torch.stack([x + w / 2, y + h / 2]) <= 1 + 1e-6).all()
        assert sample.failed == []
        boxes += len(sample.targets)
    assert boxes > 8


def test_without_augmentation_training_sees_the_letterboxed_image(split: Split) -> None:
    plain = Hyper(mosaic=0, scale=0, translate=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)
    sample = TrainDataset(split, 320, plain, seed=0)[Key(0, 0, 3)]
    expected = EvalDataset(split, 320)[3]
    top, left = (sample.image.shape[1] - 240) // 2, 0
    pad_x, pad_y = (round(value) for value in expected.pad)
    seen, wanted = sample.image[:, top : top + 240, left:], expected.image[:, pad_y : pad_y + 240, pad_x : pad_x + 320]
    assert (seen.int() - wanted.int()).abs().float().mean() < 2  # faster decoding, else the same
    in_pixels = sample.targets[:, 1:] * 320 - torch.tensor([left, top, 0, 0])
    height, width = expected.image.shape[1:]
    wanted_pixels = expected.targets[:, 1:] * torch.tensor([width, height, width, height]) - torch.tensor([pad_x, pad_y, 0, 0])
    assert torch.allclose(in_pixels, wanted_pixels, atol=1e-3)


def test_eval_sample_maps_back_to_the_original(split: Split) -> None:
    for index in range(len(split)):
        sample = EvalDataset(split, IMG)[index]
        height, width = sample.original_hw
        centres = sample.targets[:, 1:3].numpy() * sample.image.shape[:0:-1]
        original = (centres - np.array(sample.pad)) / sample.gain / (width, height)
        assert np.allclose(original, split.labels[index][:, 1:3], atol=1e-4)
        assert sample.index == index
        top = int(sample.pad[1])
        assert (sample.image[:, :top] == GREY).all()


def test_vanished_file_is_grey_reported_and_has_no_boxes(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", 6)
    split = scan_split(load_data_spec(tmp_path / "set" / "data.yaml"), "train")
    split.image_paths[2].write_bytes(b"\xff\xd8\xff torn")
    dataset = TrainDataset(split, IMG, Hyper(mosaic=0, hsv_v=0), seed=0)
    sample = dataset[Key(0, 0, 2)]
    assert sample.failed == [split.relative_paths[2]]
    assert (sample.image == GREY).all()
    assert sample.targets.shape == (0, 5)
    whole = EvalDataset(split, IMG)[2]
    assert whole.failed == [split.relative_paths[2]]
    assert len(whole.targets) == len(split.labels[2])
    batch = next(iter(build_train_loader(dataset, Sampler(len(dataset), len(dataset), 0), Place(0, 1), 0)))
    assert batch.failed == [split.relative_paths[2]]


@pytest.mark.parametrize("size", [2, 5])
def test_number_of_workers_changes_no_pixel_no_target_and_no_checksum(split: Split, size: int) -> None:
    """Global batches of 4 of 13 images: the last one leaves some of 5 workers without any."""
    dataset = TrainDataset(split, IMG, HYPER, seed=0)
    sampler = Sampler(len(split), 4, seed=0)
    alone = list(build_train_loader(dataset, sampler, Place(0, 1), 0))
    shares = [list(build_train_loader(dataset, sampler, Place(rank, size), 0)) for rank in range(size)]
    assert len(alone) == 4
    for whole, *parts in zip(alone, *shares, strict=True):
        images, targets = images_and_targets(parts)
        assert torch.equal(images, whole.images)
        assert targets == images_and_targets([whole])[1]
        assert sum(part.crc for part in parts) % 2**32 == whole.crc
    last = shares[-1][-1]
    assert last.images.shape == ((1, 3, IMG, IMG) if size == 1 else (0, 3, IMG, IMG))
    assert last.targets.shape == (0, 6)


def test_loader_processes_change_nothing_and_follow_the_sampler(split: Split) -> None:
    """The processes live on: the second epoch and a start in its middle come from the same ones."""
    dataset = TrainDataset(split, IMG, HYPER, seed=0)
    sampler = Sampler(len(split), 4, seed=0)
    here = build_train_loader(dataset, sampler, Place(0, 1), 0)
    there = build_train_loader(dataset, sampler, Place(0, 1), 2)
    for state in ({"epoch": 0, "consumed": 0}, {"epoch": 1, "consumed": 8}):
        sampler.load_state_dict(state)
        expected, found = list(here), list(there)
        assert len(found) == len(here) == sampler.global_batches_left()
        for ours, theirs in zip(expected, found, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.targets, theirs.targets)
            assert ours.crc == theirs.crc
    stopped = iter(there)
    next(stopped)  # an epoch that is left early leaves nothing behind for the next
    assert torch.equal(next(iter(there)).images, expected[0].images)


PROGRAM = """
import multiprocessing, os, sys, time
from horoyolo.config import Hyper
from horoyolo.data.dataset import TrainDataset
from horoyolo.data.loader import build_train_loader
from horoyolo.data.sampler import Sampler
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec

class Alone:
    rank = lambda self: 0
    size = lambda self: 1

if __name__ == "__main__":
    split = scan_split(load_data_spec(sys.argv[1]), "train")
    loader = build_train_loader(TrainDataset(split, 64, Hyper(), 0), Sampler(len(split), 2, 0), Alone(), 2)
    batches = iter(loader)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def test_loader_processes_do_not_outlive_a_killed_training_process(split: Split, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(split.root / "data.yaml")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as program:
        assert program.stdout is not None
        children = [int(word) for word in program.stdout.readline().split()]
        program.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "loader processes still run 20 s after their parent was killed"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("size", [1, 3, 20])
def test_evaluation_scores_each_image_once(split: Split, size: int) -> None:
    dataset = EvalDataset(split, IMG)
    indices = []
    for rank in range(size):
        loader = build_eval_loader(dataset, 6, Place(rank, size), 0)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert max(map(len, batches), default=0) <= {1: 6, 3: 2, 20: 1}[size]  # no more on all together
        for batch in batches:
            assert batch.images.shape == (len(batch.indices), 3, *dataset.shapes_hw[batch.indices[0]])
            assert batch.original_hw.shape == batch.pads.shape == (len(batch), 2)
            indices += batch.indices.tolist()
    assert sorted(indices) == list(range(len(split)))


def test_images_of_different_shapes_are_not_batched_together(split: Split) -> None:
    dataset = EvalDataset(split, IMG)
    dataset.shapes_hw[::2] = [(32, 96)] * len(dataset.shapes_hw[::2])
    batches = list(build_eval_loader(dataset, 4, Place(0, 1), 0).batch_sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(split)))
    assert all(len({dataset.shapes_hw[index] for index in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 4


@pytest.mark.parametrize(
    ("original_hw", "img", "stride", "expected"),
    [((480, 640), 320, 32, (256, 352)), ((640, 480), 320, 32, (352, 256)), ((500, 500), 640, 64, (704, 704)), ((10, 1000), 320, 32, (32, 352))],
)
def test_images_are_evaluated_at_their_own_shape(original_hw, img, stride, expected) -> None:
    assert eval_hw(original_hw, img, stride) == expected


def test_number_of_loader_processes() -> None:
    assert choose_num_workers(3, 100) == 3
    assert choose_num_workers(-1, 10_000) == 0
    assert 0 <= choose_num_workers(-1, 1) <= 8

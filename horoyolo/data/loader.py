"""Samples -> batches, made by this process or by worker processes ahead of time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from horoyolo.config import InputError
from horoyolo.data.dataset import EvalDataset, EvalSample, Sample, TrainDataset
from horoyolo.data.sampler import Key, Sampler, share
from horoyolo.signals import REQUESTS

MAX_WORKERS = 8


class Place(Protocol):
    """This process among all workers; a `Comm` is one."""

    def rank(self) -> int: ...
    def size(self) -> int: ...


@dataclass(frozen=True)
class Batch:
    """This worker's share of a global batch; it may be empty."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, one shape all over the global batch; an empty share has the training size's
    targets: Tensor  # (M, 6) float32: image in this share, class, box_xywhn
    crc: int  # sum modulo 2^32 of the images' CRC-32, the same however the global batch is shared out
    failed: list[str]  # files that could not be read

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


@dataclass(frozen=True)
class EvalBatch:
    """Letterboxed images; a point of an original lies at gain * point + pad."""

    images: Tensor  # (B, 3, H, W) uint8 RGB
    targets: Tensor  # (M, 6) float32: image in this batch, class, box_xywhn of the letterboxed image
    indices: Tensor  # (B,) int64: image in the split
    original_hw: Tensor  # (B, 2) int64
    gains: Tensor  # (B,) float64
    pads: Tensor  # (B, 2) float64: x, y in pixels
    failed: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> EvalBatch:
        """The same batch in page-locked memory; the DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


def build_train_loader(dataset: TrainDataset, sampler: Sampler, comm: Place, num_workers: int, pin_memory: bool = False) -> DataLoader[Any]:
    """A loader whose every iteration gives this worker's `Batch` of each global batch from the sampler's state to the end of its epoch.

    Build it once: its processes live on from epoch to epoch. Rank and size are asked for at each iteration.
    """
    batches = _TrainBatches(sampler, comm)
    return _build(dataset, batches, partial(collate_train, img=dataset.img), num_workers, pin_memory)


def build_eval_loader(dataset: EvalDataset, batch: int, comm: Place, num_workers: int, pin_memory: bool = False) -> DataLoader[Any]:
    """A loader of `EvalBatch`es of images of one shape, up to `batch` of them on all workers together, one on each at least; over all workers each
    image comes exactly once.
    """
    return _build(dataset, _EvalBatches(dataset.shapes_hw, batch, comm), collate_eval, num_workers, pin_memory)


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives. An InputError of one of its processes is raised as it was there: torch puts where it came from before its line."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None


@contextmanager
def ending(*loaders: DataLoader[Any]) -> Iterator[None]:
    """Ends the processes of ``loaders`` with the block, however that ends.

    An exception's frames would keep them until the interpreter leaves, which then waits for ever: they don't heed the SIGTERM that it sends them.
    """
    try:
        yield
    finally:
        for loader in loaders:
            if loader.num_workers and loader._iterator is not None:
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]  # as it does itself when nothing holds it any more
                for process in loader._iterator._workers:  # type: ignore[attr-defined]
                    process.kill()  # no more than a second wish, unless it is stuck


def choose_num_workers(requested: int, local_size: int) -> int:
    """Loader processes of each worker: as requested, or, below 0, what the cores leave beside `local_size` training processes."""
    if requested >= 0:
        return requested
    cores = len(os.sched_getaffinity(0))
    return max(0, min(cores // local_size - 1, MAX_WORKERS))


def collate_train(samples: list[Sample], img: int) -> Batch:
    """Samples, none included, to a batch."""
    images = torch.stack([sample.image for sample in samples]) if samples else torch.zeros(0, 3, img, img, dtype=torch.uint8)
    crc = sum(sample.crc for sample in samples) % 2**32
    return Batch(images, _numbered([sample.targets for sample in samples]), crc, [file for sample in samples for file in sample.failed])


def collate_eval(samples: list[EvalSample]) -> EvalBatch:
    """At least one sample to a batch."""
    return EvalBatch(
        images=torch.stack([sample.image for sample in samples]),
        targets=_numbered([sample.targets for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        original_hw=torch.tensor([sample.original_hw for sample in samples]),
        gains=torch.tensor([sample.gain for sample in samples], dtype=torch.float64),
        pads=torch.tensor([sample.pad for sample in samples], dtype=torch.float64),
        failed=[file for sample in samples for file in sample.failed],
    )


def _numbered(targets: list[Tensor]) -> Tensor:
    """Targets (n, 5) of each image -> (M, 6) with the image's number in front."""
    rows = [torch.cat([torch.full((len(rows), 1), float(i)), rows], dim=1) for i, rows in enumerate(targets)]
    return torch.cat(rows) if rows else torch.zeros(0, 6)


@dataclass
class _TrainBatches:
    sampler: Sampler
    comm: Place

    def __iter__(self) -> Iterator[list[Key]]:
        return self.sampler.batches(self.comm.rank(), self.comm.size())

    def __len__(self) -> int:
        return self.sampler.global_batches_left()


@dataclass
class _EvalBatches:
    shapes_hw: list[tuple[int, int]]
    batch: int
    comm: Place

    def _batches(self) -> list[list[int]]:
        by_shape = sorted(range(len(self.shapes_hw)), key=self.shapes_hw.__getitem__)
        mine = share(len(by_shape), self.comm.rank(), self.comm.size())
        groups = (list(group) for _, group in groupby(by_shape[mine.start : mine.stop], self.shapes_hw.__getitem__))
        most = -(-self.batch // self.comm.size())
        return [group[start : start + most] for group in groups for start in range(0, len(group), most)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def __len__(self) -> int:
        return len(self._batches())


def _build(dataset: Any, batches: Any, collate: Any, num_workers: int, pin_memory: bool) -> DataLoader[Any]:
    if num_workers == 0:
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory)
    # Forking a process in which MPI or Horovod runs is unsafe; a fork server starts clean and imports torch once for all its children.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=pin_memory,
        num_workers=num_workers,
        multiprocessing_context=context,
        persistent_workers=True,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    # A request to stop may reach a whole process group: it is the training process's to handle, which ends its loaders.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A training process that was killed can't end its loaders, and they and the fork server would keep each other alive."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        cache = getattr(getattr(get_worker_info(), "dataset", None), "cache", None)
        if cache is not None:
            cache.abandon()
        os._exit(1)

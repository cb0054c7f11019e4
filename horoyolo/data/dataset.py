"""A split's samples as the network sees them: augmented for training, letterboxed for evaluation."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor

from horoyolo.config import Hyper
from horoyolo.data.albumentation import Pipeline
from horoyolo.data.augment import (
    GREY,
    Geometry,
    Labelled,
    Tile,
    flip_lr,
    flip_ud,
    hsv,
    letterbox,
    letterbox_pad,
    mixup,
    mosaic,
    scaled_hw,
    warp_canvas,
)
from horoyolo.data.decode import DecodeError, Image, decode_image
from horoyolo.data.pixels import PixelCache
from horoyolo.data.sampler import Key
from horoyolo.data.scan import Split


@dataclass(frozen=True)
class Sample:
    """A training sample."""

    image: Tensor  # (3, H, W) uint8 RGB
    targets: Tensor  # (n, 5) float32: class, box_xywhn
    crc: int  # CRC-32 of the image's bytes
    failed: list[str]  # files that could not be read: they are grey in the image and have no boxes


@dataclass(frozen=True)
class EvalSample:
    """An image to evaluate; a point of the original lies at gain * point + pad."""

    image: Tensor  # (3, H, W) uint8 RGB
    targets: Tensor  # (n, 5) float32: class, box_xywhn of the letterboxed image
    index: int  # in the split
    original_hw: tuple[int, int]
    gain: float
    pad: tuple[float, float]  # x, y in pixels
    failed: list[str]


class TrainDataset:
    """Augmented samples, addressed by `Key`: a sample's pixels depend on the seed, the epoch, the position and its batch's shape alone.

    From epoch ``mosaic_until`` on images come without mosaic and mixup, as they will be met later. A ``pipeline`` comes after those and before the
    colour jitter. A cache changes no pixel.
    """

    cache: PixelCache | None = None

    def __init__(
        self, split: Split, img: int, hyper: Hyper, seed: int, mosaic_until: float = math.inf, pipeline: Pipeline | None = None
    ) -> None:
        self.split = split
        self.img = img
        self.hyper = hyper
        self.seed = seed
        self.mosaic_until = mosaic_until
        self.pipeline = pipeline
        self._geometry = Geometry(hyper.degrees, hyper.translate, hyper.scale, hyper.shear, hyper.perspective)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Sample:
        hyper = self.hyper
        hw = key.hw or (self.img, self.img)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, key.epoch, key.position]))
        failed: list[str] = []
        if rng.random() < hyper.mosaic and key.epoch < self.mosaic_until:
            image, boxes = self._mosaic(key.index, hw, rng, failed)
            if rng.random() < hyper.mixup:
                partner = self._mosaic(int(rng.integers(len(self))), hw, rng, failed)
                image, boxes = mixup((image, boxes), partner, rng)
        else:
            image, boxes = self._single(key.index, hw, rng, failed)
        if self.pipeline is not None:
            image, boxes = self.pipeline(image, boxes, rng)
        image, boxes = hsv(image, boxes, rng, hyper.hsv_h, hyper.hsv_s, hyper.hsv_v)
        image, boxes = flip_ud(image, boxes, rng, hyper.flipud)
        image, boxes = flip_lr(image, boxes, rng, hyper.fliplr)
        pixels = _to_chw(image)
        return Sample(torch.from_numpy(pixels), _to_targets(boxes, hw), zlib.crc32(pixels.data), failed)

    def _mosaic(self, index: int, hw: tuple[int, int], rng: np.random.Generator, failed: list[str]) -> Labelled:
        indices = rng.permutation([index, *rng.integers(len(self), size=3)])
        tiles = [self._tile(int(i), failed) for i in indices]
        return mosaic(tiles, self.img, rng, self._geometry, max(hw) / self.img, self.hyper.copy_paste)

    def _single(self, index: int, hw: tuple[int, int], rng: np.random.Generator, failed: list[str]) -> Labelled:
        """One image, its long side at the output's."""
        tile = self._tile(index, failed)
        zoom = max(hw) / self.img
        canvas = (round(hw[0] / zoom), round(hw[1] / zoom))
        corner = ((canvas[1] - tile.hw[1]) // 2, (canvas[0] - tile.hw[0]) // 2)
        return warp_canvas([(tile, corner)], canvas, hw, rng, self._geometry, zoom)

    def _tile(self, index: int, failed: list[str]) -> Tile:
        """The image with its long side at the training size."""
        hw = self.tile_hw(index)
        outlines = self.split.outlines[index] if self.hyper.copy_paste and self.split.outlines else []
        in_pixels = [outline * np.array(hw[::-1], np.float32) for outline in outlines]
        return Tile(hw, _to_pixels(self.split.labels[index], hw), partial(self._load, index, failed), in_pixels)

    def tile_hw(self, index: int) -> tuple[int, int]:
        """Height and width at which an image is taken up: its long side at the training size."""
        height, width = (int(side) for side in self.split.shapes_hw[index])
        return scaled_hw((height, width), self.img / max(height, width))

    def _load(self, index: int, failed: list[str]) -> Image | None:
        decode = partial(self._decode, index)
        image = self.cache.get(index, decode) if self.cache else decode()
        if image is None:
            failed.append(self.split.relative_paths[index])
        return image

    def _decode(self, index: int) -> Image | None:
        hw = self.tile_hw(index)
        try:
            image = decode_image(self.split.image_paths[index], at_least_hw=hw)
        except DecodeError:
            return None
        if image.shape[:2] == hw:
            return image
        shrink = image.shape[0] / hw[0]
        return cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA if shrink > 2 else cv2.INTER_LINEAR)


def eval_hw(original_hw: tuple[int, int], img: int, stride: int) -> tuple[int, int]:
    """Height and width at which an image is evaluated: its long side at ``img``, both sides up to the stride, half a stride of grey at least.

    As in YOLOv5's evaluation; but each image by itself, so that its detections depend neither on its neighbours nor on how images are shared out.
    """
    gain = img / max(original_hw)
    height, width = (math.ceil(side * gain / stride + 0.5) * stride for side in original_hw)
    return height, width


class EvalDataset:
    """Images as they are, letterboxed to a rectangle of their own shape, addressed by their index in the split. A cache changes no pixel."""

    cache: PixelCache | None = None

    def __init__(self, split: Split, img: int, stride: int = 32) -> None:
        self.split = split
        self.img = img
        self.shapes_hw = [eval_hw((int(height), int(width)), img, stride) for height, width in split.shapes_hw]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> EvalSample:
        height, width = (int(side) for side in self.split.shapes_hw[index])
        hw, gain = self.shapes_hw[index], self.img / max(height, width)
        failed = []
        letterboxed = partial(self._letterboxed, index)
        image = self.cache.get(index, letterboxed) if self.cache else letterboxed()
        if image is None:  # its boxes stay: what can't be seen is missed
            image = np.full((*hw, 3), GREY, np.uint8)
            failed.append(self.split.relative_paths[index])
        pad = letterbox_pad((height, width), hw, gain)
        boxes = _to_pixels(self.split.labels[index], (height, width))
        boxes[:, 1:] = boxes[:, 1:] * gain + np.array(pad * 2, np.float32)
        pixels = torch.from_numpy(_to_chw(image))
        return EvalSample(pixels, _to_targets(boxes, hw), index, (height, width), gain, pad, failed)

    def _letterboxed(self, index: int) -> Image | None:
        try:
            original = decode_image(self.split.image_paths[index])
        except DecodeError:
            return None
        gain = self.img / max(int(side) for side in self.split.shapes_hw[index])
        return letterbox(original, self.shapes_hw[index], cv2.INTER_AREA if gain < 1 else cv2.INTER_LINEAR, gain)[0]


def _to_pixels(labels: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """class, box_xywhn (n, 5) -> class, box_xyxy in pixels (n, 5)."""
    scale = np.array(hw[::-1], np.float32)
    centre, half = labels[:, 1:3] * scale, labels[:, 3:5] * scale / 2
    return np.concatenate([labels[:, :1], centre - half, centre + half], axis=1)


def _to_targets(boxes: np.ndarray, hw: tuple[int, int]) -> Tensor:
    """class, box_xyxy in pixels (n, 5) -> class, box_xywhn (n, 5), clipped to the image."""
    wh = np.array(hw[::-1], np.float32)
    low, high = boxes[:, 1:3].clip(0, wh), boxes[:, 3:5].clip(0, wh)
    targets = np.concatenate([boxes[:, :1], (low + high) / (2 * wh), (high - low) / wh], axis=1)
    return torch.from_numpy(targets.astype(np.float32))


def _to_chw(image: Image) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))

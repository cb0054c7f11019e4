"""Bytes of an image file -> RGB pixels, at the size needed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

Image = np.ndarray  # (H, W, 3) uint8 RGB
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the whole last chunk


class DecodeError(Exception):
    """The file is no image that can be read: empty, cut short, damaged or of an unknown kind."""


def image_hw(source: Path | bytes) -> tuple[int, int]:
    """Height and width in pixels as `decode_image` gives them (EXIF orientation respected).

    Of a JPEG only the markers are read, which also finds a file that was cut short. Raises DecodeError.
    """
    data = _read(source)
    if not _is_jpeg(data):
        height, width = _decode_other(data).shape[:2]
        return height, width
    layout = _jpeg_layout(data)
    return (layout.width, layout.height) if layout.orientation >= 5 else (layout.height, layout.width)


def decode_image(source: Path | bytes, at_least_hw: tuple[int, int] | None = None) -> Image:
    """Decode a file (or its bytes) to (H, W, 3) uint8 RGB; grey, alpha and 16-bit images are converted, EXIF orientation is applied.

    With `at_least_hw`, as for training, speed goes before exact pixels: a JPEG is decoded by faster arithmetic and, if it is at least twice
    that large on both sides, at 1/2, 1/4 or 1/8 of its size, never smaller than asked. The outcome depends on nothing but the bytes and the
    size asked for. Raises DecodeError.
    """
    data = _read(source)
    if not _is_jpeg(data):
        return _decode_other(data)
    layout = _jpeg_layout(data)
    height, width = layout.height, layout.width
    options: dict[str, int | bool] = {}
    if at_least_hw is not None:
        least_h, least_w = at_least_hw[::-1] if layout.orientation >= 5 else at_least_hw
        factor = next((f for f in (8, 4, 2) if height >= f * least_h and width >= f * least_w), 1)
        size = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
        options = {"fastdct": True, "fastupsample": True, **size}
    try:
        # A decoder's warnings (stray bytes, say) are no reason to refuse an image: strict is off.
        image = simplejpeg.decode_jpeg(data, strict=False, **options)
    except ValueError:  # CMYK and the like
        return _decode_other(data)
    return _upright(image, layout.orientation)


class Form(NamedTuple):
    """How a file stores its pixels."""

    channels: int  # 1 grey, 3, or 4: with alpha, or CMYK in a JPEG
    bits: int  # of a channel
    orientation: int  # EXIF, 1 (upright) to 8
    jpeg: bool


def image_form(source: Path | bytes) -> Form:
    """What `decode_image` would convert. Raises DecodeError."""
    data = _read(source)
    if _is_jpeg(data):
        layout = _jpeg_layout(data)
        return Form(layout.channels, 8, layout.orientation, True)
    _decode_other(data)  # finds what is cut short
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise DecodeError("not readable as an image")
    return Form(1 if stored.ndim == 2 else stored.shape[2], 8 * stored.dtype.itemsize, 1, False)


def is_damaged(source: Path | bytes) -> bool:
    """A JPEG whose pixels are coded with faults: it is decoded as far as can be. Raises DecodeError for what can't be read at all."""
    data = _read(source)
    if not _is_jpeg(data) or _jpeg_layout(data).channels == 4:
        return False
    try:
        simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:
        return True
    return False


def _read(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise DecodeError(f"{source}: {error.strerror}") from error


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _decode_other(data: bytes) -> Image:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and PNG_END not in data:
        raise DecodeError("PNG file cut short: its end chunk is missing")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    except cv2.error as error:
        raise DecodeError(f"not readable as an image: {error.err}") from error
    if image is None:
        raise DecodeError("not readable as an image" if data else "empty file")
    return image


class _JpegLayout(NamedTuple):
    height: int  # as stored, before orientation
    width: int
    orientation: int  # EXIF, 1 to 8
    channels: int


def _jpeg_layout(data: bytes) -> _JpegLayout:
    """Walk a JPEG's marker segments (ITU T.81, annex B) up to the pixels; DecodeError where they end early or no end marker follows."""
    hw = None
    channels = 3
    orientation = 1
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 9 < len(data):  # start of frame
            hw = struct.unpack_from(">HH", data, at + 5)
            channels = data[at + 9]
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        elif marker == 0xDA:  # start of scan
            if hw is None or 0 in hw:
                break
            if data.rfind(b"\xff\xd9", at + 2 + length) < 0:
                raise DecodeError("JPEG file cut short: its end marker is missing")
            return _JpegLayout(hw[0], hw[1], orientation, channels)
        at += 2 + length
    raise DecodeError("JPEG file with an unreadable header")


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first image directory (EXIF 2.3, section 4.6.4); 1, upright, where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # damaged metadata, sound pixels
    return 1


def _upright(image: Image, orientation: int) -> Image:
    """Apply an EXIF orientation: 2 to 4 are mirrored or turned by 180 degrees, 5 to 8 swap the sides."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    # What is left after the transposition: rows reversed, columns reversed.
    flip_ud, flip_lr = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    image = image[::-1] if flip_ud else image
    image = image[:, ::-1] if flip_lr else image
    return np.ascontiguousarray(image)

"""Decoding: any image becomes upright 8-bit RGB, the scan's size is the decoder's, and a damaged file is an error."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from horoyolo.data.decode import DecodeError, decode_image, image_hw


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture that no flip or turn leaves as it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 * (x > width / 2) * (y > height / 3)], axis=2).astype(np.uint8)


def with_orientation(jpeg: bytes, orientation: int, order: str) -> bytes:
    mark = {"<": b"II", ">": b"MM"}[order]
    tiff = mark + struct.pack(order + "HI", 42, 8) + struct.pack(order + "HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_opencv_does(orientation: int, order: str) -> None:
    jpeg = with_orientation(simplejpeg.encode_jpeg(picture(), quality=95, colorsubsampling="444"), orientation, order)
    expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    image = decode_image(jpeg)
    assert image_hw(jpeg) == image.shape[:2] == expected.shape[:2]
    assert np.abs(image.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp"])
def test_other_formats(suffix: str) -> None:
    quality = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
    data = cv2.imencode(suffix, picture()[..., ::-1], quality)[1].tobytes()
    assert np.array_equal(decode_image(data), picture())
    assert image_hw(data) == (48, 64)


def test_what_follows_a_picture_does_it_no_harm() -> None:
    for data in (cv2.imencode(".png", picture()[..., ::-1])[1].tobytes(), simplejpeg.encode_jpeg(picture(), quality=95)):
        assert np.array_equal(decode_image(data + bytes(100)), decode_image(data))
        assert image_hw(data + bytes(100)) == (48, 64)


@pytest.mark.parametrize(
    "stored",
    [picture()[..., 0], np.dstack([picture(), np.full((48, 64), 7, np.uint8)]), picture().astype(np.uint16) * 257],
    ids=["grey", "alpha", "16 bit"],
)
def test_every_kind_of_pixel_becomes_three_bytes(stored: np.ndarray) -> None:
    image = decode_image(cv2.imencode(".png", stored)[1].tobytes())
    assert image.shape == (48, 64, 3)
    assert image.dtype == np.uint8
    expected = np.dstack([stored] * 3) if stored.ndim == 2 else picture()[..., ::-1]  # imencode takes BGR
    assert np.array_equal(image, expected)


def test_grey_jpeg_becomes_rgb() -> None:
    grey = simplejpeg.encode_jpeg(np.ascontiguousarray(picture()[..., :1]), colorspace="GRAY", quality=95)
    image = decode_image(grey)
    assert image.shape == (48, 64, 3)
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize(("at_least", "expected"), [((480, 640), 1), ((241, 320), 1), ((240, 320), 2), ((100, 100), 4), ((1, 1), 8)])
def test_scaled_decoding_is_never_smaller_than_asked(at_least: tuple[int, int], expected: int) -> None:
    full = picture(480, 640)
    image = decode_image(simplejpeg.encode_jpeg(full, quality=95), at_least_hw=at_least)
    assert image.shape == (480 // expected, 640 // expected, 3)
    small = cv2.resize(full, (640 // expected, 480 // expected), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - small).mean() < 3


def test_scaled_decoding_of_a_turned_image_asks_for_its_upright_size() -> None:
    jpeg = with_orientation(simplejpeg.encode_jpeg(picture(480, 640)), 6, "<")
    assert image_hw(jpeg) == (640, 480)
    assert decode_image(jpeg, at_least_hw=(320, 240)).shape == (320, 240, 3)
    assert decode_image(jpeg, at_least_hw=(240, 320)).shape == (640, 480, 3)  # half would be too narrow


def damaged() -> dict[str, bytes]:
    jpeg = simplejpeg.encode_jpeg(picture())
    png = cv2.imencode(".png", picture())[1].tobytes()
    thumbnail = with_orientation(jpeg, 1, "<")
    return {
        "empty": b"",
        "text": b"<html>not found</html>",
        "jpeg header only": jpeg[:10],
        "jpeg half": jpeg[: len(jpeg) // 2],
        "jpeg zeros": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2),
        "jpeg with a thumbnail's end marker": thumbnail[:2] + b"\xff\xe2\x00\x06\xff\xd9\xff\xd9" + thumbnail[2 : len(thumbnail) // 2],
        "png half": png[: len(png) // 2],
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damaged_files_are_errors_for_scan_and_decoder(kind: str) -> None:
    for read in (image_hw, decode_image):
        with pytest.raises(DecodeError):
            read(damaged()[kind])


def test_missing_file_is_a_decode_error(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"gone\.jpg"):
        decode_image(tmp_path / "gone.jpg")

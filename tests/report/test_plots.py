from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from horoyolo.engine.hooks import EPOCH_COLUMNS
from horoyolo.report.draw import class_colour
from horoyolo.report.plots import batch_grid, plot_batch, plot_boxes, plot_curves

NAMES = {0: "ball", 1: "box"}


def write_results(path: Path, epochs: int, evaluated: int = 1) -> Path:
    """A results.csv of which each ``evaluated``-th epoch has validation figures."""
    always = {"epoch", "step", "images", "train_box_loss", "train_obj_loss", "train_cls_loss", "lr", "seconds"}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, EPOCH_COLUMNS)
        writer.writeheader()
        for epoch in range(epochs):
            known = always if (epoch + 1) % evaluated else EPOCH_COLUMNS
            writer.writerow(dict.fromkeys(known, 1 / (epoch + 2)) | {"epoch": epoch})
    return path


@pytest.mark.parametrize(("epochs", "evaluated"), [(1, 1), (1, 2), (100, 7)])
def test_curves_are_drawn_from_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture, epochs: int, evaluated: int) -> None:
    plot_curves(write_results(tmp_path / "results.csv", epochs, evaluated), tmp_path / "plots")
    assert not caplog.records
    assert sorted(os.listdir(tmp_path / "plots")) == ["losses.png", "lr.png", "map.png"]
    for path in (tmp_path / "plots").iterdir():
        picture = cv2.imread(str(path))
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 1  # not a blank


def test_a_row_that_was_cut_short_is_drawn_as_far_as_it_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = write_results(tmp_path / "results.csv", 3)
    with results.open("a") as stream:
        stream.write("3,40,16,0.2")
    plot_curves(results, tmp_path)
    assert not caplog.records
    assert (tmp_path / "losses.png").exists()


def test_no_epochs_no_curves(tmp_path: Path) -> None:
    plot_curves(write_results(tmp_path / "results.csv", 0), tmp_path / "plots")
    assert os.listdir(tmp_path) == ["results.csv"]


def test_a_failed_picture_is_logged_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("epoch,lr\n1,nonsense\n")
    with caplog.at_level(logging.WARNING, "horoyolo"):
        plot_curves(tmp_path / "absent.csv", tmp_path / "plots")
        plot_curves(tmp_path / "file", tmp_path / "plots")
        plot_batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 6), NAMES, tmp_path / "file" / "batch.png")
    assert len(caplog.records) == 3
    assert os.listdir(tmp_path) == ["file"]


def test_a_batch_shows_its_images_and_boxes(tmp_path: Path) -> None:
    images = torch.randint(0, 100, (3, 3, 64, 64), dtype=torch.uint8)
    targets = torch.tensor([[1, 0, 0.5, 0.75, 0.5, 0.25], [1, 1, 0.25, 0.25, 0.1, 0.1], [2, 5, 0.5, 0.5, 1, 1]])
    grid = batch_grid(images, targets, NAMES)
    first, second, third = grid[:64, :64], grid[:64, 66:130], grid[66:130, :64]
    assert grid.shape == (130, 130, 3)
    assert (grid[66:, 66:] == 255).all()
    np.testing.assert_array_equal(first, images[0].permute(1, 2, 0))
    # A box's edges lie where its target says: x 16 to 48, y 40 to 56.
    assert tuple(second[48, 16]) == tuple(second[48, 48]) == tuple(second[56, 32]) == class_colour(0)
    np.testing.assert_array_equal(second[44:53, 20:45], images[1].permute(1, 2, 0)[44:53, 20:45])
    assert tuple(third[40, 0]) == class_colour(5)

    plot_batch(images, targets, NAMES, tmp_path / "plots" / "batch.png")
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "plots" / "batch.png"), cv2.IMREAD_COLOR_RGB), grid)


@pytest.mark.parametrize(("count", "side"), [(1, 2048), (7, 640), (64, 640), (16, 32)])
def test_a_batch_of_any_size_gives_a_picture_of_bounded_size(count: int, side: int) -> None:
    targets = torch.tensor([[count - 1, 0, 0.5, 0.5, 0.5, 0.5]])
    grid = batch_grid(torch.zeros(count, 3, side, side, dtype=torch.uint8), targets, NAMES)
    assert max(grid.shape) <= 1920
    assert min(grid.shape[:2]) >= min(side, 900)


def test_names_of_classes_are_no_formulas(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plot_boxes({"$^$": 2, "5$ or 10$": 1}, {"$^$": 1, "5$ or 10$": 1}, np.array([[8.0, 16.0]]), np.array([[8.0, 8.0]]), tmp_path / "boxes.png")
    assert cv2.imread(str(tmp_path / "boxes.png")) is not None
    assert not caplog.text


def test_no_images_no_batch(tmp_path: Path) -> None:
    plot_batch(torch.zeros(0, 3, 64, 64, dtype=torch.uint8), torch.zeros(0, 6), NAMES, tmp_path / "batch.png")
    assert os.listdir(tmp_path) == []

"""The label scan: what is dropped is said, the cache changes nothing but the time, the hash is the content's."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.data import cache, scan
from horoyolo.data.labels import label_path, parse_labels, parse_outlines
from horoyolo.data.scan import Split, scan_split
from horoyolo.data.spec import DataSpec, load_data_spec

JPEG = simplejpeg.encode_jpeg(np.zeros((48, 64, 3), np.uint8))
GOOD = "0 0.5 0.5 0.2 0.2\n"


def write_set(root: Path, labels: dict[str, str | None], images: dict[str, bytes] | None = None) -> DataSpec:
    """Images by stem with their label texts; None for no file."""
    for stem, text in labels.items():
        image = root / "images" / "train" / f"{stem}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes((images or {}).get(stem, JPEG))
        if text is not None:
            label_path(image).parent.mkdir(parents=True, exist_ok=True)
            label_path(image).write_text(text)
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [x, y]\n")
    return load_data_spec(root / "data.yaml")


def same(a: Split, b: Split) -> bool:
    labels = all(np.array_equal(x, y) for x, y in zip(a.labels, b.labels, strict=True))
    return labels and a.image_paths == b.image_paths and np.array_equal(a.shapes_hw, b.shapes_hw) and a.report == b.report


def test_label_path_replaces_the_last_images_folder() -> None:
    assert label_path(Path("/images/set/images/train/a.b.jpg")) == Path("/images/set/labels/train/a.b.txt")
    assert label_path(Path("/data/set/images.jpg")) == Path("/data/set/images.txt")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.2", "corrupt"),
        ("0 0.5 0.5 0.2 0.2 0.9", "corrupt"),
        ("0 0.5 0.5 0.2 x", "corrupt"),
        ("0 nan 0.5 0.2 0.2", "corrupt"),
        ("0.5 0.5 0.5 0.2 0.2", "corrupt"),
        ("-1 0.5 0.5 0.2 0.2", "corrupt"),
        ("inf 0.5 0.5 0.2 0.2", "corrupt"),
        ("0 1.2 0.5 0.2 0.2", "out_of_range"),
        ("0 0.5 0.5 -0.2 0.2", "out_of_range"),
        ("0 0.1 0.1 0.2 0.1 1.4 0.3", "out_of_range"),
        ("0 0.5 0.5 0 0.2", "zero_area"),
        ("0 0.1 0.1 0.1 0.2 0.1 0.3", "zero_area"),
        ("1 0.5 0.5 0.2 0.20", "duplicate"),
    ],
)
def test_a_bad_line_is_dropped_alone(line: str, kind: str) -> None:
    labels, lines, problems = parse_labels(f"1 0.5 0.5 0.2 0.2\n\n{line}\n0 0.25 0.25 0.5 0.5\n")
    assert labels.tolist() == np.array([[1, 0.5, 0.5, 0.2, 0.2], [0, 0.25, 0.25, 0.5, 0.5]], np.float32).tolist()
    assert lines.tolist() == [1, 4]
    assert [(problem.kind, problem.line) for problem in problems] == [(kind, 3)]


def test_polygon_becomes_its_bounding_box() -> None:
    labels, _, problems = parse_labels("1 0.1 0.2 0.5 0.2 0.3 0.6\n")
    assert not problems
    assert np.allclose(labels, [[1, 0.3, 0.4, 0.4, 0.4]])


def test_a_polygon_may_reach_beyond_the_border_as_long_as_its_box_is_one() -> None:
    labels, lines, problems = parse_labels("1 -0.02 0.2 0.5 0.2 0.3 1.01\n")
    assert not problems
    assert np.allclose(labels, [[1, 0.25, 0.6, 0.5, 0.8]])
    assert parse_outlines("1 -0.02 0.2 0.5 0.2 0.3 1.01\n", lines)[0].tolist() == np.array([[0, 0.2], [0.5, 0.2], [0.3, 1]], np.float32).tolist()


def test_a_mark_of_the_byte_order_is_no_part_of_labels_and_lists(tmp_path: Path) -> None:
    """As editors on Windows write it."""
    write_set(tmp_path, {"a": f"\ufeff{GOOD}"})
    (tmp_path / "list.txt").write_text("\ufeff./images/train/a.jpg\n", encoding="utf-8")
    (tmp_path / "data.yaml").write_text("train: list.txt\nnames: [x]\n")
    report = scan_split(load_data_spec(tmp_path / "data.yaml"), "train").report
    assert (report.images, report.boxes, report.corrupt) == (1, 1, [])


def test_rounding_beyond_the_border_is_clipped() -> None:
    labels, _, problems = parse_labels("0 0.5 0.5 1.00001 1.0\n")
    assert not problems
    assert labels.max() == 1.0


@given(st.text(alphabet=st.sampled_from("01 .-\nenaif+"), max_size=80))
def test_any_text_is_labels_or_problems(text: str) -> None:
    labels, lines, problems = parse_labels(text)
    num_lines = sum(bool(line.strip()) for line in text.splitlines())
    assert len(labels) == len(lines)
    assert len(labels) + len(problems) == num_lines
    assert ((labels[:, 1:] >= 0) & (labels[:, 1:] <= 1)).all()
    assert (labels[:, 3:] > 0).all()


def test_report_names_everything(tmp_path: Path) -> None:
    spec = write_set(
        tmp_path,
        {
            "a": GOOD,
            "b": None,
            "c": "\n",
            "d": GOOD,
            "e": f"{GOOD}{GOOD}0 0.5 0.5 0 0\n0 2 0.5 0.1 0.1\nhello\n",
        },
        {"d": JPEG[: len(JPEG) // 2]},
    )
    split = scan_split(spec, "train")
    report = split.report
    assert [path.stem for path in split.image_paths] == ["a", "b", "c", "e"]
    assert [len(labels) for labels in split.labels] == [1, 0, 0, 1]
    assert split.shapes_hw.tolist() == [[48, 64]] * 4
    assert (report.images, report.boxes) == (4, 2)
    assert report.missing_labels == ["images/train/b.jpg"]
    assert report.empty_labels == ["images/train/c.jpg"]
    assert report.corrupt_images == ["images/train/d.jpg"]
    expected = {"duplicate": 2, "zero_area": 3, "out_of_range": 4, "corrupt": 5}
    for kind, line in expected.items():
        assert [name.split(" ")[0] for name in getattr(report, kind)] == [f"labels/train/e.txt:{line}"]
    text = "\n".join(report.lines())
    assert text.startswith("train: 4 images, 2 boxes\n")
    assert len(report.lines()) == 8
    assert "train: 1 boxes without area dropped: labels/train/e.txt:3" in text


def test_long_lists_are_shortened_in_words_only(tmp_path: Path) -> None:
    spec = write_set(tmp_path, {"a": GOOD, **{f"b{i}": None for i in range(9)}})
    report = scan_split(spec, "train").report
    assert len(report.missing_labels) == 9
    assert report.lines()[1].endswith("images/train/b4.jpg and 4 more")


@pytest.mark.parametrize("cached", [False, True])
def test_class_beyond_the_names_says_file_and_line(tmp_path: Path, cached: bool) -> None:
    spec = write_set(tmp_path, {"a": f"{GOOD}1 0.1 0.1 0.1 0.1\n"})
    if cached:
        scan_split(spec, "train")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [x]\n")
    with pytest.raises(InputError, match=r"a\.txt:2: class 1 is beyond .* which are 0 to 0"):
        scan_split(load_data_spec(tmp_path / "data.yaml"), "train")


@pytest.mark.parametrize("cached", [False, True])
def test_all_objects_may_be_of_one_class(tmp_path: Path, cached: bool) -> None:
    write_set(tmp_path, {"a": f"{GOOD}1 0.1 0.1 0.1 0.1\n"})
    file = tmp_path / "data.yaml"
    if cached:
        scan_split(load_data_spec(file), "train")
    one = scan_split(load_data_spec(file, single_cls=True), "train")
    assert (one.labels[0][:, 0].tolist(), one.names) == ([0, 0], {0: "item"})
    several = scan_split(load_data_spec(file), "train")
    assert (several.labels[0][:, 0].tolist(), several.names) == ([0, 1], {0: "x", 1: "y"})
    assert np.array_equal(one.labels[0][:, 1:], several.labels[0][:, 1:])
    assert one.content_hash != several.content_hash


def test_a_single_class_keeps_its_name_and_takes_all_labels(tmp_path: Path) -> None:
    write_set(tmp_path, {"a": f"{GOOD}2 0.1 0.1 0.1 0.1\n"})
    file = tmp_path / "data.yaml"
    file.write_text("train: images/train\nnames: [cell]\n")
    one = scan_split(load_data_spec(file, single_cls=True), "train")
    assert (one.labels[0][:, 0].tolist(), one.names) == ([0, 0], {0: "cell"})
    with pytest.raises(InputError, match=r"class 2 is beyond"):
        scan_split(load_data_spec(file), "train")


def test_without_being_strict_unknown_classes_are_listed_and_left_out(tmp_path: Path) -> None:
    spec = write_set(tmp_path, {"a": f"{GOOD}7 0.1 0.1 0.1 0.1\n2 0.1 0.1 0.1 0.1\n"})
    split = scan_split(spec, "train", strict=False)
    assert split.report.unknown_class == ["labels/train/a.txt:2 (class 7)", "labels/train/a.txt:3 (class 2)"]
    assert split.report.boxes == 1
    assert len(scan_split(write_set(tmp_path / "torn", {"a": GOOD}, {"a": b""}), "train", strict=False)) == 0


def test_no_labels_and_no_readable_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no labels at all for `train`"):
        scan_split(write_set(tmp_path / "bare", {"a": None, "b": ""}), "train")
    with pytest.raises(InputError, match="all 1 are corrupt"):
        scan_split(write_set(tmp_path / "torn", {"a": GOOD}, {"a": JPEG[:20]}), "train")


def test_cached_scan_equals_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_set(tmp_path, {"a": GOOD, "b": None, "c": GOOD + "bad\n"}, {"b": JPEG[:20]})
    first = scan_split(spec, "train")
    monkeypatch.setattr(scan, "_scan_image", None)  # a second scan would fail
    second = scan_split(spec, "train")
    assert same(first, second)
    assert first.content_hash == second.content_hash


@pytest.mark.parametrize("unreadable", ["a.jpg", "a.txt"])
def test_what_could_not_be_read_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str) -> None:
    """Rights that are given later change neither a file's size nor its time."""
    spec = write_set(tmp_path, {"a": GOOD, "b": GOOD})

    def denied(read: Callable) -> Callable:
        def tried(file: Path, *args: object, **kwargs: object) -> object:
            if file.name == unreadable:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return read(file, *args, **kwargs)

        return tried

    with monkeypatch.context() as patched:
        for name in ("read_bytes", "read_text"):
            patched.setattr(Path, name, denied(getattr(Path, name)))
        report = scan_split(spec, "train").report
    assert report.boxes == 1
    assert [*report.corrupt_images, *report.corrupt] == ["images/train/a.jpg" if unreadable == "a.jpg" else "labels/train/a.txt (Permission denied)"]
    assert scan_split(spec, "train").report.boxes == 2


def test_a_listed_image_that_is_not_there_is_found_missing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, {"a": GOOD, "b": GOOD})
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n./images/train/gone.jpg\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: train.txt\nnames: [x, y]\n")
    spec = load_data_spec(tmp_path / "data.yaml")
    first = scan_split(spec, "train")
    assert [Path(name).name for name in first.report.corrupt_images] == ["gone.jpg"]
    monkeypatch.setattr(scan, "_scan_all", lambda *_: pytest.fail("scanned again"))
    assert same(scan_split(spec, "train"), first)


def test_processes_find_what_threads_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_set(tmp_path, {"a": GOOD, "b": None, "c": GOOD + "bad\n"}, {"b": JPEG[:20]})
    first = scan_split(spec, "train")
    shutil.rmtree(tmp_path / ".horoyolo-cache")
    monkeypatch.setattr(scan, "MANY", 1)
    monkeypatch.setattr(scan, "ThreadPoolExecutor", None)
    assert same(first, scan_split(spec, "train"))


def test_of_workers_that_start_together_one_reads_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_set(tmp_path, {f"a{i}": GOOD for i in range(10)})
    read: list[Path] = []
    image_hw = scan.image_hw
    monkeypatch.setattr(scan, "image_hw", lambda file: (read.append(file), image_hw(file))[1])
    with ThreadPoolExecutor(4) as pool:
        splits = list(pool.map(lambda _: scan_split(spec, "train"), range(4)))
    assert all(same(splits[0], split) for split in splits)
    assert len(read) == 10


@pytest.mark.parametrize("change", ["label", "image", "new image", "no label"])
def test_any_change_makes_a_new_scan(tmp_path: Path, change: str) -> None:
    spec = write_set(tmp_path, {"a": GOOD, "b": GOOD})
    first = scan_split(spec, "train")
    image = tmp_path / "images" / "train" / "a.jpg"
    if change == "label":
        label_path(image).write_text("1 0.5 0.5 0.2 0.2\n")
        os.utime(label_path(image), ns=(1, 1))
    elif change == "image":
        image.write_bytes(simplejpeg.encode_jpeg(np.zeros((32, 32, 3), np.uint8)))
    elif change == "new image":
        (image.parent / "c.jpg").write_bytes(JPEG)
    else:
        label_path(image).unlink()
    second = scan_split(spec, "train")
    assert not same(first, second) if change != "new image" else len(second) == 3
    assert first.content_hash != second.content_hash


@pytest.mark.parametrize("content", [b"", b"no archive", b"half"])
def test_torn_or_foreign_cache_is_rebuilt(tmp_path: Path, content: bytes) -> None:
    spec = write_set(tmp_path, {"a": GOOD})
    first = scan_split(spec, "train")
    (file,) = (tmp_path / ".horoyolo-cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert same(first, scan_split(spec, "train"))
    assert file.read_bytes() == whole


def test_jobs_that_start_at_once_agree_and_leave_one_file(tmp_path: Path) -> None:
    spec = write_set(tmp_path, {f"a{i}": GOOD for i in range(20)})
    with ThreadPoolExecutor(8) as pool:
        splits = list(pool.map(lambda _: scan_split(spec, "train"), range(8)))
    assert all(same(splits[0], split) for split in splits)
    assert len(list((tmp_path / ".horoyolo-cache").iterdir())) == 1


def test_cache_goes_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    arrays = {"x": np.arange(3)}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".horoyolo-cache").write_text("a file where the folder should be: nothing can be written below it")
    folders = cache.folders(tmp_path / "set")
    file = cache.save(folders, "train", "key", arrays)
    assert file is not None
    assert file.parent == tmp_path / "user" / "horoyolo"
    loaded = cache.load(folders, "train", "key")
    assert loaded is not None
    assert np.array_equal(loaded["x"], arrays["x"])
    assert cache.load(folders, "train", "other") is None


def test_content_hash_is_the_same_at_another_place(tmp_path: Path) -> None:
    first = scan_split(write_set(tmp_path / "here", {"a": GOOD, "b": None}), "train")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    second = scan_split(load_data_spec(tmp_path / "there" / "data.yaml"), "train")
    assert first.content_hash == second.content_hash


def test_who_looks_and_who_waits_for_him_give_signs_of_life(tmp_path: Path) -> None:
    spec = write_set(tmp_path, dict.fromkeys("abc", GOOD))
    beats: list[str] = []
    scan_split(spec, "train", beat=lambda: beats.append("looks"))
    assert beats == ["looks"] * 3
    waits = threading.Event()

    def wait() -> None:
        with cache.one_at_a_time([tmp_path], waits.set):
            beats.append("has it")

    with ThreadPoolExecutor(1) as pool, cache.one_at_a_time([tmp_path]):
        pool.submit(wait)
        for _ in range(2):
            assert waits.wait(10)
            waits.clear()
        assert "has it" not in beats
    assert beats[-1] == "has it"

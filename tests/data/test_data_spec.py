"""data.yaml as YOLOv5 has it, and one clear line for what can't be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from horoyolo.config import InputError
from horoyolo.data.spec import load_data_spec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set's folder with images a and b for train, c for val; what is in them doesn't matter here."""
    for name in ("train/a.jpg", "train/deep/b.PNG", "val/c.jpg", "train/notes.txt"):
        file = tmp_path / "set" / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "set"


def write(file: Path, **content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return file


def train_names(file: Path) -> list[str]:
    return [image.name for image in load_data_spec(file).image_files("train")]


SPLITS = {"train": "images/train", "val": "images/val"}


def test_folders_are_searched_and_sorted(root: Path) -> None:
    spec = load_data_spec(write(root / "data.yaml", **SPLITS, names=["x", "y"], nc=2))
    assert [spec.relative(file) for file in spec.image_files("train")] == ["images/train/a.jpg", "images/train/deep/b.PNG"]
    assert spec.names == {0: "x", 1: "y"}
    assert spec.num_classes == 2
    assert set(spec.splits) == {"train", "val"}


def test_hidden_files_are_no_images(root: Path) -> None:
    """What notebooks and file managers leave: copies without labels, and files of other content under an image's name."""
    for name in (".ipynb_checkpoints/a-checkpoint.jpg", "._a.jpg"):
        file = root / "images" / "train" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert train_names(write(root / "data.yaml", **SPLITS, names=["x"])) == ["a.jpg", "b.PNG"]


def test_a_name_that_is_not_utf_8_is_told(root: Path) -> None:
    (root / "images" / "train" / os.fsdecode(b"caf\xe9.jpg")).touch()
    with pytest.raises(InputError, match=r"caf\\xe9\.jpg' \(`train` of .*: the file's name is not UTF-8"):
        train_names(write(root / "data.yaml", **SPLITS, names=["x"]))


def test_a_test_split_that_is_not_there_is_nothing_to_look_at(root: Path) -> None:
    file = write(root / "data.yaml", **SPLITS, test="images/test", names=["x"])
    assert load_data_spec(file).splits_to_look_at() == ["train", "val"]
    (root / "images" / "test").mkdir()
    assert load_data_spec(file).splits_to_look_at() == ["train", "val", "test"]


def test_names_may_be_a_mapping_in_any_order(root: Path) -> None:
    spec = load_data_spec(write(root / "data.yaml", **SPLITS, names={1: "y", 0: "x"}))
    assert list(spec.names.items()) == [(0, "x"), (1, "y")]


def test_list_files_and_lists_of_sources(root: Path) -> None:
    (root / "lists").mkdir()
    (root / "lists" / "own.txt").write_text("./../images/train/a.jpg\n\n")
    (root / "lists" / "root.txt").write_text(f"images/val/c.jpg\n{root}/images/train/deep/b.PNG\n")
    file = write(root / "data.yaml", train=["lists/own.txt", "lists/root.txt"], val="images/val", names=["x"])
    assert train_names(file) == ["a.jpg", "b.PNG", "c.jpg"]


@pytest.mark.parametrize(
    ("yaml_file", "path", "folder"),
    [
        ("set/data.yaml", None, "elsewhere"),  # beside the images
        ("set/data.yaml", ".", "elsewhere"),  # though the current folder exists too
        ("yamls/data.yaml", "../set", "elsewhere"),
        ("code/data/data.yaml", "../set", "elsewhere"),  # YOLOv5's own: from the folder above the yaml's
        ("yamls/data.yaml", "set", ""),  # from the current folder
    ],
)
def test_relative_path(root: Path, monkeypatch: pytest.MonkeyPatch, yaml_file: str, path: str | None, folder: str) -> None:
    current = root.parent / folder
    current.mkdir(exist_ok=True)
    monkeypatch.chdir(current)
    given = {} if path is None else {"path": path}
    file = write(root.parent / yaml_file, **SPLITS, **given, names=["x"])
    assert train_names(file) == ["a.jpg", "b.PNG"]


def test_exported_sets_that_climb_out_of_their_folder_by_mistake(root: Path) -> None:
    assert train_names(write(root / "data.yaml", train="../images/train", val="../images/val", names=["x"])) == ["a.jpg", "b.PNG"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SPLITS, "no class names"),
        ({**SPLITS, "names": []}, "no class names"),
        ({**SPLITS, "names": ["x", "y"], "nc": 3}, "nc is 3 but `names` has 2"),
        ({**SPLITS, "names": {0: "x", 2: "y"}}, "must be 0 to 1"),
        ({"names": ["x"]}, "lists no images"),
        ({"train": {"a": 1}, "names": ["x"]}, "`train` must be a folder"),
    ],
)
def test_unfit_content_is_one_line(root: Path, content: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_data_spec(write(root / "data.yaml", **content))
    assert "\n" not in str(error.value)
    assert "data.yaml" in str(error.value)


def test_unreadable_yaml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("train: images\nnames: [a, b\nval: c\n")
    with pytest.raises(InputError, match=r"data\.yaml, line 3: not valid yaml") as error:
        load_data_spec(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"just words", b""])
def test_what_is_no_data_yaml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"data\.yaml") as error:
        load_data_spec(tmp_path / "data.yaml")
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file: .*gone\.yaml"):
        load_data_spec(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match="can't be read"):
        load_data_spec(tmp_path)


def test_images_that_are_not_there(root: Path) -> None:
    spec = load_data_spec(write(root / "data.yaml", **SPLITS, test="images/test", names=["x"], download="fetch.sh"))
    with pytest.raises(InputError, match=r"images/test, which doesn't exist; its `download` key isn't run"):
        spec.image_files("test")
    (root / "images" / "test").mkdir()
    with pytest.raises(InputError, match="no images found for `test`"):
        spec.image_files("test")
    with pytest.raises(InputError, match="has no `test` split; it lists train, val"):
        load_data_spec(write(root / "data.yaml", **SPLITS, names=["x"])).image_files("test")

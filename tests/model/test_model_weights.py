from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from horoyolo.config import InputError
from horoyolo.model.boxes import non_max_suppression, unletterbox
from horoyolo.model.weights import load_matching, model_from_weights, read_weights, save_weights
from horoyolo.model.yolo import YOLO, build_model, fuse_conv_bn, load_layer_table

TENSORS = {"model.0.conv.weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture(scope="module")
def model() -> YOLO:
    torch.manual_seed(0)
    return build_model("yolov5n", 3, {0: "RBC", 1: "WBC", 2: "Platelets"})


class Saved:
    """Pickles as a call of ``function`` with ``args``, then of ``__setstate__`` with ``state`` where there is one."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A checkpoint at ``path`` like those of torch, with this pickle in the place of its own."""
    saved = io.BytesIO()
    torch.save({"model": TENSORS}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return path


def with_object(path: Path, extra: Any, protocol: int = 2) -> Path:
    """A good checkpoint that holds ``extra`` besides."""
    torch.save({"extra": extra, "model": OrderedDict(TENSORS)}, path, pickle_protocol=protocol)
    return path


# Our own files


def test_a_saved_model_comes_back(model: YOLO, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_weights(path, model, {"img": 320, "epoch": 4})
    back, meta = model_from_weights(path)
    assert (meta["img"], meta["epoch"], meta["nc"], meta["names"], back.names) == (320, 4, 3, model.names, model.names)
    assert back.table == model.table
    assert not back.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert os.listdir(tmp_path) == ["best.pt"]
    assert torch.load(path, weights_only=True)["format"] == "horoyolo"


def test_a_failed_save_leaves_the_old_file(model: YOLO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    with pytest.raises(AttributeError):
        save_weights(path, model, {"bad": lambda: None})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_layout_come_back_as_float32(layout: torch.memory_format, model: YOLO, tmp_path: Path) -> None:
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.to(memory_format=layout).state_dict().items()
    }
    torch.save({"model": halves}, tmp_path / "half.pt")
    tensors = read_weights(tmp_path / "half.pt").tensors
    assert list(tensors) == list(halves)
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if halves[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, halves[name].to(tensor.dtype)), name


def test_the_average_goes_before_the_model(tmp_path: Path) -> None:
    average = {name: tensor + 1 for name, tensor in TENSORS.items()}
    for ema in (average, {"model": average, "updates": 3}):
        torch.save({"format": "horoyolo", "kind": "checkpoint", "model": TENSORS, "ema": ema}, tmp_path / "c.pt")
        assert torch.equal(read_weights(tmp_path / "c.pt").tensors["model.0.conv.weight"], TENSORS["model.0.conv.weight"] + 1)


@pytest.mark.parametrize("cfg", ["yolov5s", "yolov5n6"])
def test_bare_tensors_of_a_known_model_tell_their_layers(cfg: str, tmp_path: Path) -> None:
    saved = build_model(cfg, 7)
    torch.save(saved.state_dict(), tmp_path / "bare.pt")
    back, meta = model_from_weights(tmp_path / "bare.pt")
    assert (meta["nc"], meta["cfg"]) == (7, load_layer_table(cfg))
    assert torch.equal(back.state_dict()["model.0.conv.weight"], saved.state_dict()["model.0.conv.weight"])


def test_tensors_of_no_known_model_need_a_table(tmp_path: Path) -> None:
    torch.save({"model": TENSORS}, tmp_path / "bare.pt")
    with pytest.raises(InputError, match="does not say its layers"):
        model_from_weights(tmp_path / "bare.pt")


@pytest.mark.parametrize("lacking", ["anchors", "backbone"])
def test_a_model_without_anchors_is_refused(model: YOLO, tmp_path: Path, lacking: str) -> None:
    """Of later models of YOLOv5's makers the table has none."""
    table = {key: value for key, value in load_layer_table("yolov5n").items() if key != lacking}
    torch.save({"format": "horoyolo", "model": model.state_dict(), "cfg": table, "nc": 3}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=rf"weights .*w\.pt: model table: it lacks {lacking}, which YOLOv5's have"):
        model_from_weights(tmp_path / "w.pt")


def test_a_file_that_contradicts_its_table_is_refused(model: YOLO, tmp_path: Path) -> None:
    torch.save({"format": "horoyolo", "model": model.state_dict(), "cfg": load_layer_table("yolov5s"), "num_classes": 3}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"tensors do not fit its layers, first model\.0\.conv\.weight: \(16, 3, 6, 6\) in the file, \(32,"
    ):
        model_from_weights(tmp_path / "w.pt")


# Taking what matches


def test_other_classes_keep_all_but_the_heads(model: YOLO) -> None:
    other = build_model("yolov5n", 8)
    before = other.state_dict()["model.24.m.0.weight"].clone()
    report = load_matching(other, model.state_dict())
    heads = [f"model.24.m.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert [line.split(":")[0] for line in report.left_out] == heads
    assert report.left_out[0] == "model.24.m.0.weight: (24, 64, 1, 1) in the file, (39, 64, 1, 1) in the model"
    assert (report.loaded, report.total) == (len(model.state_dict()) - 6, len(model.state_dict()))
    assert torch.equal(other.state_dict()["model.9.cv1.conv.weight"], model.state_dict()["model.9.cv1.conv.weight"])
    assert torch.equal(other.state_dict()["model.24.m.0.weight"], before)


def test_other_width_takes_what_fits(model: YOLO) -> None:
    wide = build_model("yolov5s", 3)
    report = load_matching(wide, model.state_dict())
    fits = [
        name for name, tensor in wide.state_dict().items() if name in model.state_dict() and model.state_dict()[name].shape == tensor.shape
    ]
    assert report.loaded == len(fits) > 0
    assert report.total == len(wide.state_dict())
    missing = [line for line in report.left_out if line.endswith("not in the model")]
    assert missing == [f"{name}: not in the model" for name in model.state_dict() if name not in wide.state_dict()]


def test_anchors_are_taken_unless_the_model_keeps_its_own(model: YOLO) -> None:
    tensors = {**model.state_dict(), "model.24.anchors": model.anchors + 1}
    own = model.anchors.clone()
    other = build_model("yolov5n", 3)
    assert load_matching(other, tensors, skip_anchors=True).left_out == ["model.24.anchors: the model keeps its own"]
    assert torch.equal(other.anchors, own)
    assert load_matching(other, tensors).left_out == []
    assert torch.equal(other.anchors, own + 1)


# Public files


def test_the_public_checkpoint_is_read(shared: Path) -> None:
    public, meta = model_from_weights(shared / "weights" / "yolov5n_coco.pt")
    assert (meta["nc"], meta["names"][0], len(meta["names"])) == (80, "person", 80)
    assert public.table["width_multiple"] == 0.25
    assert torch.equal(meta["anchors"], build_model("yolov5n").anchors)
    report = load_matching(build_model("yolov5n"), read_weights(shared / "weights" / "yolov5n_coco.pt").tensors)
    assert report.left_out == ["model.24.anchor_grid: not in the model"]  # a buffer of older versions, the anchors in pixels


@pytest.mark.parametrize("name", ["bus", "zidane"])
@pytest.mark.parametrize("fused", [False, True])
def test_detections_are_the_public_ones(shared: Path, name: str, fused: bool) -> None:
    golden = np.load(shared / "golden" / f"detect_{name}.npz")
    public, _ = model_from_weights(shared / "weights" / "yolov5n_coco.pt")
    public = fuse_conv_bn(public) if fused else public
    pixels = torch.from_numpy(golden["letterboxed_rgb_chw"])[None]
    with torch.no_grad():
        predictions = public.decode(public(pixels.float() / 255))
    expected = torch.from_numpy(golden["decoded_predictions"])
    torch.testing.assert_close(predictions[..., :4], expected[..., :4], rtol=0, atol=0.05)
    torch.testing.assert_close(predictions[..., 4:], expected[..., 4:], rtol=0, atol=1e-3)

    (found,) = non_max_suppression(predictions, conf_threshold=0.25, iou_threshold=0.45)
    height, width = cv2.imread(str(shared / "data" / "images" / f"{name}.jpg")).shape[:2]
    detections = torch.from_numpy(golden["nms_xyxy_conf_cls"])
    assert torch.equal(found[:, 5], detections[:, 5])
    torch.testing.assert_close(unletterbox(found[:, :4], tuple(pixels.shape[2:]), (height, width)), detections[:, :4], rtol=0, atol=0.1)
    torch.testing.assert_close(found[:, 4], detections[:, 4], rtol=0, atol=1e-3)


class Module:
    """Stands for a class of another project: this reader must not need it."""

    def __init__(self, **state: Any) -> None:
        self.__dict__ |= {"_parameters": {}, "_buffers": {}, "_modules": {}} | state


def test_modules_give_their_tensors_by_name(tmp_path: Path) -> None:
    one, two = torch.randn(2), torch.randn(3).half()
    conv = Module(_parameters=OrderedDict(weight=torch.nn.Parameter(one), bias=None))
    bn = Module(_buffers={"running_mean": two, "num_batches_tracked": torch.tensor(5)})
    root = Module(_modules={"0": conv, "1": Module(_modules={"bn": bn})}, names=["a", "b"], nc=2, yaml={"nc": 2})
    torch.save({"model": root, "ema": None, "opt": Module()}, tmp_path / "public.pt")
    weights = read_weights(tmp_path / "public.pt")
    assert list(weights.tensors) == ["0.weight", "1.bn.running_mean", "1.bn.num_batches_tracked"]
    assert torch.equal(weights.tensors["0.weight"], one)
    assert torch.equal(weights.tensors["1.bn.running_mean"], two.float())
    assert (weights.meta["names"], weights.meta["nc"], weights.meta["cfg"]) == ({0: "a", 1: "b"}, 2, {"nc": 2})


def test_a_module_that_holds_itself_ends(tmp_path: Path) -> None:
    root = Module(_parameters={"w": torch.ones(2)})
    root._modules = {"a": root, "b": Module(_modules={"c": root})}
    torch.save({"model": root}, tmp_path / "loop.pt")
    assert list(read_weights(tmp_path / "loop.pt").tensors) == ["w"]


# Malicious files


@pytest.mark.parametrize("protocol", range(2, 6))
def test_calls_in_a_file_are_not_made(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    calls = [
        Saved(os.system, f"touch {marker}"),
        Saved(eval, f"open({str(marker)!r}, 'w')"),
        Saved(exec, f"open({str(marker)!r}, 'w')"),
        Saved(open, str(marker), "w"),
        Saved(getattr, Saved(__import__, "os"), "system"),
        Saved(os.makedirs, str(marker)),
        Saved(torch.load, str(marker)),
        Saved(Module, state={"__setstate__": Saved(os.system, f"touch {marker}"), "__class__": 1}),
        Saved(OrderedDict, state={"items": 1, "get": 2}),
        [Saved(os.system, f"touch {marker}"), {"deep": (Saved(os.system, f"touch {marker}"),)}],
    ]
    for call in calls:
        path = with_object(tmp_path / "bad.pt", call, protocol)
        assert torch.equal(read_weights(path).tensors["model.0.conv.weight"], TENSORS["model.0.conv.weight"])
        assert not marker.exists()


def hand_made(marker: Path) -> dict[str, bytes]:
    """Pickles that no pickler writes."""
    touch = f"touch {marker}".encode()
    push = b"X" + len(touch).to_bytes(4, "little") + touch
    return {
        "GLOBAL": b"\x80\x02cos\nsystem\n" + push + b"\x85R.",
        "GLOBAL posix": b"\x80\x02cposix\nsystem\n" + push + b"\x85R.",
        "INST": b"(S'" + touch + b"'\nios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\n" + push + b"o.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + push + b"\x85R.",
        "STACK_GLOBAL attribute": b"\x80\x04\x8c\x08builtins\x8c\x0cdict.__class__\x93" + push + b"\x85R.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + push + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93" + push + b"\x85}\x92.",
        "call of a result": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n" + push + b"\x86R" + push + b"\x85R.",
        "BUILD on a stand-in": b"\x80\x02cos\nsystem\n)R}(X\x0c\x00\x00\x00__setstate__cos\nsystem\nub" + push + b"b.",
        "BUILD on a class": b"\x80\x02cos\nsystem\n}X\x01\x00\x00\x00acos\nsystem\nsb.",
        "BUILD on a function": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x08\x00\x00\x00__code__cos\nsystem\ns\x86b.",
        "BUILD on an ordered dict": b"\x80\x02ccollections\nOrderedDict\n)RN}X\x09\x00\x00\x00__class__cos\nsystem\ns\x86b.",
        "extension registry": b"\x80\x02\x82\x01.",
        "unknown storage": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000NKtQ.",
        "not a pickle": b"\x80\x02this is no pickle",
        "nothing": b"",
        "cut": b"\x80\x02cos\nsys",
    }


@pytest.mark.parametrize("name", list(hand_made(Path("m"))))
def test_hand_made_pickles_do_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(InputError) as caught:
        read_weights(with_pickle(tmp_path / "bad.pt", hand_made(marker)[name]))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_malicious_pickle_would_work_on_the_stock_reader(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(hand_made(marker)["GLOBAL"])
    assert marker.exists()


def test_one_file_cannot_change_the_reading_of_the_next(tmp_path: Path) -> None:
    poison = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b."  # sets an attribute of the function
    with pytest.raises(InputError):
        read_weights(with_pickle(tmp_path / "bad.pt", poison))
    torch.save({"model": OrderedDict(TENSORS)}, tmp_path / "good.pt")
    assert torch.equal(read_weights(tmp_path / "good.pt").tensors["model.0.conv.weight"], TENSORS["model.0.conv.weight"])


class Tensorish:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.args


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (1000,), (1,)), (5, (2,), (1,)), (-1, (2,), (1,)), (0, (10**9,), (0,)), (0, (2, 2), (1,)), (0, ("a",), (1,)), (0, (-1,), (1,))],
)
def test_tensors_outside_their_storage_are_refused(tmp_path: Path, offset: int, size: tuple, stride: tuple) -> None:
    storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(6).untyped_storage(), dtype=torch.float32, _internal=True)
    torch.save({"model": {"w": Tensorish(storage, offset, size, stride, False, OrderedDict())}}, tmp_path / "bad.pt")
    with pytest.raises(InputError):
        read_weights(tmp_path / "bad.pt")


# Damaged and foreign files


def test_a_torn_file_is_refused_wherever_it_was_cut(model: YOLO, tmp_path: Path) -> None:
    save_weights(tmp_path / "whole.pt", model)
    content = (tmp_path / "whole.pt").read_bytes()
    for part in (0, 0.001, 0.3, 0.9, 0.9999):
        (tmp_path / "torn.pt").write_bytes(content[: int(len(content) * part)])
        with pytest.raises(InputError, match="torn"):
            read_weights(tmp_path / "torn.pt")


def test_a_changed_byte_is_noticed(model: YOLO, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.pt", model)
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(InputError, match="torn"):
        read_weights(tmp_path / "w.pt")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": TENSORS}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"torch 1\.6"):
        read_weights(path)
    for content in ([1, 2], {"model": {}}, {"model": {"w": 3}}, {"a": "b"}):
        torch.save(content, path)
        with pytest.raises(InputError, match="neither a YOLOv5"):
            read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no checkpoint")
    with pytest.raises(InputError, match=r"without one data\.pkl"):
        read_weights(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 100)
    with pytest.raises(InputError, match="compressed"):
        read_weights(path)
    with pytest.raises(InputError, match="no such file"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(InputError, match="no such file"):
        read_weights(tmp_path)


def test_a_table_that_says_only_how_many_anchors_has_those_of_the_tensors(model: YOLO, tmp_path: Path) -> None:
    """YOLOv5 leaves such a table in the weights of a model whose anchors it fitted."""
    save_weights(tmp_path / "w.pt", model)
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    torch.save({**content, "cfg": {**content["cfg"], "anchors": 3}}, tmp_path / "number.pt")
    loaded, _ = model_from_weights(tmp_path / "number.pt")
    assert torch.equal(loaded.anchors, model.anchors)
    assert loaded.table["anchors"] == content["cfg"]["anchors"]

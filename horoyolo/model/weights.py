"""Weights in files: this project's own and public YOLOv5 ``.pt`` files, read without running anything the file says.

A ``.pt`` file is a zip of one pickle and of one raw file a storage. The pickle of a public checkpoint names classes of its own project
and may name anything else. The reader here gives the pickle nothing of the real modules: tensors become records of where their numbers
lie, read afterwards, and every other name becomes an inert stand-in.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from horoyolo.config import InputError
from horoyolo.files import atomic_file
from horoyolo.model.yolo import SIZES, YOLO, load_layer_table, model_from_table

FORMAT = "horoyolo"

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds: ``tensors`` by name, floating-point ones as float32, and of ``meta`` what could be read.

    ``meta`` may have nc, names (number -> name), cfg (the layer table) and anchors (num_layers, num_anchors, 2) in cells; a file of this
    project adds what it was saved with (img, epoch ...).
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class LoadReport:
    """How many of the model's ``total`` tensors were ``loaded``, and which ones were not, with the reason."""

    loaded: int
    total: int
    left_out: list[str]


def save_weights(path: str | Path, model: YOLO, meta: Mapping[str, Any] | None = None) -> None:
    """Writes a model to ``path``, whole or not at all. ``meta`` adds entries (img, epoch ...), plain values only."""
    content = {
        **(meta or {}),
        "format": FORMAT,
        "kind": "weights",
        "model": model.state_dict(),
        "cfg": {**model.table, "anchors": anchors_in_table(model)},
        "num_classes": model.num_classes,
        "names": model.names,
    }
    with atomic_file(path) as stream:
        torch.save(content, stream)


def read_weights(path: str | Path) -> WeightsFile:
    """Reads this project's weights and checkpoints and public YOLOv5 ``.pt`` files; a moving average goes before the model it follows.

    Raises InputError for any other file.
    """
    if not Path(path).is_file():
        raise InputError(f"weights {path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except zipfile.BadZipFile as error:
        raise InputError(
            f"weights {path}: torn, or not a zip file as torch 1.6 and later write it; fetch it whole or save it again"
        ) from error
    except Exception as error:  # a file made by anybody can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"weights {path}: neither a YOLOv5 .pt file nor one of horoyolo's ({reason})") from error


def load_matching(model: nn.Module, tensors: Mapping[str, Tensor], skip_anchors: bool = False) -> LoadReport:
    """Copies into ``model`` every tensor whose name and shape agree and reports the others.

    ``skip_anchors`` keeps the model's own anchors, for a model whose table was chosen apart from the weights.
    """
    own = model.state_dict()
    left_out = []
    with torch.no_grad():
        for name, target in own.items():
            value = tensors.get(name)
            if value is None:
                left_out.append(f"{name}: not in the file")
            elif value.shape != target.shape:
                left_out.append(f"{name}: {tuple(value.shape)} in the file, {tuple(target.shape)} in the model")
            elif skip_anchors and name.endswith(".anchors"):
                left_out.append(f"{name}: the model keeps its own")
            else:
                target.copy_(value)
    loaded = len(own) - len(left_out)
    left_out += [f"{name}: not in the model" for name in tensors if name not in own]
    return LoadReport(loaded, len(own), left_out)


def model_from_weights(path: str | Path) -> tuple[YOLO, dict[str, Any]]:
    """The model that a file holds, from that file alone, in eval mode, with the file's ``meta``.

    Raises InputError where the file's tensors do not make up a model.
    """
    weights = read_weights(path)
    cfg, nc, names = (weights.meta.get(key) for key in ("cfg", "nc", "names"))
    if cfg is None:
        raise InputError(f"weights {path}: the file does not say its layers, and they are none of the known models'")
    try:
        model = model_from_table(cfg, nc, names)
    except InputError as error:
        raise InputError(f"weights {path}: {error}") from error
    report = load_matching(model, weights.tensors)
    if report.loaded < report.total:
        missing = f"{report.total - report.loaded} of {report.total} tensors do not fit its layers, first {report.left_out[0]}"
        raise InputError(f"weights {path}: {missing}")
    model.table["anchors"] = anchors_in_table(model)
    return model.eval(), weights.meta


def anchors_in_table(model: YOLO) -> list[list[float]]:
    """The model's anchors as a layer table lists them: its own table may only say how many, or others than were fitted."""
    return model.anchors_px.flatten(1).tolist()


# What the objects in a file say


def _read_archive(archive: zipfile.ZipFile) -> WeightsFile:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip file without one data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("compressed entries, which torch never writes")  # and which can unpack to any size
    folder = pickles[0].removesuffix("data.pkl")
    content = _InertUnpickler(io.BytesIO(archive.read(pickles[0]))).load()
    if not isinstance(content, dict):
        raise ValueError("no dictionary in it")

    source = content.get("ema") or content.get("model") or content
    if isinstance(source, dict) and isinstance(source.get("model"), dict):  # an average saved with its counter
        source = source["model"]
    records = dict(_module_records(source)) if isinstance(source, _StandIn) else _records(source)
    tensors = _read_tensors(records, lambda key: archive.read(f"{folder}data/{key}"))
    if not tensors:
        raise ValueError("no tensors by name in it")

    if content.get("format") == FORMAT:
        meta = {key: value for key, value in content.items() if key not in ("model", "ema", "num_classes")}
        meta["nc"] = content.get("num_classes")
    else:
        meta = _public_meta(source)
    if meta.get("cfg") is None:
        meta |= _inferred_meta(tensors)
    meta["names"] = _names(meta.get("names"))
    meta["anchors"] = next((tensor for name, tensor in tensors.items() if name.endswith(".anchors")), None)
    return WeightsFile(tensors, {key: value for key, value in meta.items() if value is not None})


def _module_records(module: _StandIn) -> Iterator[tuple[str, _TensorRecord]]:
    """The tensors of a pickled module by their `state_dict` names. A module counts once, so that no file can make this endless."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", module)]
    while pending:
        prefix, current = pending.pop()
        if not isinstance(current, _StandIn) or id(current) in seen:
            continue
        seen.add(id(current))
        state = vars(current)
        for group in ("_parameters", "_buffers"):
            for name, record in _records(state.get(group)).items():
                yield prefix + name, record
        modules = state.get("_modules")
        if isinstance(modules, dict):
            pending += [(f"{prefix}{name}.", child) for name, child in reversed(modules.items())]


def _records(mapping: Any) -> dict[str, _TensorRecord]:
    entries = mapping.items() if isinstance(mapping, dict) else ()
    return {name: value for name, value in entries if isinstance(name, str) and isinstance(value, _TensorRecord)}


def _read_tensors(records: Mapping[str, _TensorRecord], read_storage: Callable[[str], bytes]) -> dict[str, Tensor]:
    storages: dict[str, Tensor] = {}
    tensors = {}
    for name, (storage, offset, size, stride) in records.items():
        if storage.key not in storages:
            raw = bytearray(read_storage(storage.key))
            storages[storage.key] = torch.frombuffer(raw, dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)
        numbers = storages[storage.key]
        tensor = numbers.as_strided(tuple(size), tuple(stride), offset)  # refuses what lies outside the storage
        if tensor.numel() > numbers.numel():
            raise ValueError(f"{name} is larger than its storage")
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _public_meta(source: Any) -> dict[str, Any]:
    state = vars(source) if isinstance(source, _StandIn) else {}
    cfg = state.get("yaml")
    cfg = cfg if isinstance(cfg, dict) else None
    return {"cfg": cfg, "nc": state.get("nc") or (cfg or {}).get("nc"), "names": state.get("names")}


def _inferred_meta(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """cfg and nc of the known model that has these tensors, for files of bare tensors; nothing where there is none."""
    sizes = {64 * width: size for size, (_, width) in SIZES.items()}
    deep = "model.33.m.0.bias" in tensors
    stem, bias = tensors.get("model.0.conv.weight"), tensors.get(f"model.{33 if deep else 24}.m.0.bias")
    if stem is None or bias is None or stem.shape[0] not in sizes:
        return {}
    table = load_layer_table(f"yolov5{sizes[stem.shape[0]]}{'6' if deep else ''}")
    return {"cfg": table, "nc": len(bias) // (len(table["anchors"][0]) // 2) - 5}


def _names(names: Any) -> dict[int, str] | None:
    if isinstance(names, list):
        names = dict(enumerate(names))
    return {key: str(value) for key, value in names.items() if isinstance(key, int)} if isinstance(names, dict) else None


# Reading without running


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


class _TensorRecord(NamedTuple):
    """Where a tensor's numbers lie, in numbers; nothing here has been checked."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _StandIn:
    """In the place of any object, class or function this reader does not know: takes whatever the pickle does to it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
        return _StandIn()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update((key, value) for key, value in state.items() if isinstance(key, str))

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Builds plain containers, tensor records and stand-ins: a pickle reaches code only through `find_class`, and this one has none to
    give.

    It makes a fresh object for every name, as a pickle can set attributes on what it is given.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _TensorRecord(storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _STORAGE_DTYPES:
            return type(name, (_StandIn,), {"dtype": _STORAGE_DTYPES[name]})
        return type("StandIn", (_StandIn,), {})

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage_type, key, *_ = pid  # "storage", its type, its file, the device it was on, its length
        return _Storage(key, storage_type.dtype)

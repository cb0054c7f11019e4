"""Weights in files: this project's own and public YOLOv5 ``.pt`` files, read without running anything the file says.

A ``.pt`` file is a zip of one pickle and of one raw file a storage. The pickle of a public checkpoint names classes of its own project and may name anything else; the reader here knows
ordered dicts, storages and the functions that rebuild tensors (its own versions of them), and puts an inert stand-in in the place of everything else.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from horoyolo.config import InputError
from horoyolo.model.yolo import MODELS, YOLO, load_layer_table, model_from_table

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
    """What a file holds: ``tensors`` by name, floating-point ones as float32, and of ``meta`` what could be read (nc, names, cfg, anchors, img, kind, epoch ...)."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class LoadReport:
    """How many of the model's ``total`` tensors were ``loaded``, and which ones were not, with the reason."""

    loaded: int
    total: int
    left_out: list[str]


def save_weights(path: str | Path, model: YOLO, meta: Mapping[str, Any] | None = None) -> None:
    """Writes a model to ``path``; a reader sees the old file or the whole new one, never a part. ``meta`` adds entries (img, epoch ...), plain values only."""
    content = {
        **(meta or {}),
        "format": FORMAT,
        "kind": "weights",
        "model": model.state_dict(),
        "cfg": model.table,
        "num_classes": model.num_classes,
        "names": model.names,
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: str | Path) -> WeightsFile:
    """Reads this project's weights and checkpoints and public YOLOv5 ``.pt`` files; the moving average goes before the model. Raises InputError for any other file."""
    content = _read_content(Path(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no weights, a YOLOv5 .pt file or one of horoyolo's is needed")
    source = content.get("ema") or content.get("model") or content
    if isinstance(source, dict) and isinstance(source.get("model"), dict):  # an EMA's own state
        source = source["model"]
    tensors = dict(_named_tensors(source) if isinstance(source, _StandIn) else _plain_tensors(source))
    if not tensors:
        raise InputError(f"{path}: holds no tensors by name, a YOLOv5 .pt file or one of horoyolo's is needed")
    if content.get("format") == FORMAT:
        meta = {key: value for key, value in content.items() if key not in ("model", "ema")}
        meta["nc"] = meta.get("num_classes")
    else:
        meta = _public_meta(source)
    meta["anchors"] = next((tensor for name, tensor in tensors.items() if name.endswith(".anchors")), None)
    meta["names"] = _names(meta.get("names"))
    return WeightsFile(tensors, {key: value for key, value in meta.items() if value is not None})


def load_matching(model: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Copies into ``model`` every tensor whose name and shape agree and reports the others."""
    own = model.state_dict()
    left_out = []
    with torch.no_grad():
        for name, target in own.items():
            value = tensors.get(name)
            if value is None:
                left_out.append(f"{name}: not in the file")
            elif value.shape != target.shape:
                left_out.append(f"{name}: {tuple(value.shape)} in the file, {tuple(target.shape)} in the model")
            else:
                target.copy_(value)
    loaded = len(own) - len(left_out)
    left_out += [f"{name}: not in the model" for name in tensors if name not in own]
    return LoadReport(loaded, len(own), left_out)


def model_from_weights(path: str | Path) -> tuple[YOLO, dict[str, Any]]:
    """The model a file holds, from that file alone, in eval mode, with the file's ``meta``. Raises InputError where the file's tensors do not make up a model."""
    weights = read_weights(path)
    cfg, nc = weights.meta.get("cfg"), weights.meta.get("nc")
    model = model_from_table(cfg, nc, weights.meta.get("names")) if isinstance(cfg, dict) else _infer_model(weights, path)
    report = load_matching(model, weights.tensors)
    if report.loaded < report.total:
        raise InputError(f"{path}: {report.total - report.loaded} of {report.total} tensors do not fit its own layer table, first {report.left_out[0]}")
    return model.eval(), weights.meta


def _infer_model(weights: WeightsFile, path: str | Path) -> YOLO:
    """The known model whose tensors have the file's names and shapes, for files that carry no layer table."""
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    anchors = weights.meta.get("anchors")
    last = max((int(name.split(".")[1]) for name in shapes if name.startswith("model.")), default=-1)
    bias = shapes.get(f"model.{last}.m.0.bias")
    if bias is not None and isinstance(anchors, Tensor) and anchors.ndim == 3:
        num_classes = bias.numel() // anchors.shape[1] - 5
        for cfg in MODELS if num_classes > 0 else ():
            with torch.device("meta"):
                model = model_from_table(load_layer_table(cfg), num_classes)
            if {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes:
                return model_from_table(load_layer_table(cfg), num_classes, weights.meta.get("names"))
    raise InputError(f"{path}: carries no layer table and fits none of {', '.join(MODELS)}: give the model by --cfg")


# What a public file's objects say


def _named_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a pickled module by their `state_dict` names. Each module counts once, so that a file cannot make this endless."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", module)]
    while pending:
        prefix, current = pending.pop()
        if id(current) in seen or not isinstance(current, _StandIn):
            continue
        seen.add(id(current))
        state = vars(current)
        for group in ("_parameters", "_buffers"):
            for name, value in _items(state.get(group)):
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", _as_float32(value)
        pending += reversed([(f"{prefix}{name}.", child) for name, child in _items(state.get("_modules"))])


def _plain_tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in _items(state):
        if isinstance(value, Tensor):
            yield name, _as_float32(value)


def _public_meta(source: Any) -> dict[str, Any]:
    state = vars(source) if isinstance(source, _StandIn) else {}
    cfg = state.get("yaml") if isinstance(state.get("yaml"), dict) else None
    nc = state.get("nc") or (cfg or {}).get("nc")
    return {"cfg": cfg, "nc": nc if isinstance(nc, int) else None, "names": state.get("names")}


def _names(names: Any) -> dict[int, str] | None:
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        return None
    return {int(key): str(value) for key, value in names.items() if isinstance(key, int)}


def _items(mapping: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in mapping.items() if isinstance(key, str)] if isinstance(mapping, dict) else []


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


# Reading without running


class _StandIn:
    """In the place of any object or function that a file names and this reader does not know: takes whatever the pickle does to it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
        return _StandIn()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(_items(state))

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Builds plain containers, tensors and stand-ins. Every name the file asks for goes through `find_class`, which hands out nothing of the real module."""

    def __init__(self, pickled: bytes, read_storage: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8", errors="replace")
        self._read_storage = read_storage
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Fresh objects each time: a pickle can set attributes on what it is given.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return type("Storage", (_StandIn,), {"dtype": _STORAGE_DTYPES[name]})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args[:4])
        if (module, name) in (("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state")):
            return lambda *args: args[0]
        return type("StandIn", (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Tensor:
        _, storage_type, key, _, _ = pid
        if key not in self._storages:
            self._storages[key] = torch.frombuffer(bytearray(self._read_storage(key)), dtype=storage_type.dtype)
        return self._storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    tensor = storage.as_strided(tuple(size), tuple(stride), offset)  # refuses what lies outside the storage
    if tensor.numel() > storage.numel():
        raise ValueError("a tensor is larger than its storage")
    return tensor


def _read_content(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"weights {path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{path}: not a torch checkpoint, it is a zip without one data.pkl")
            folder = pickles[0].removesuffix("data.pkl")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path}: not a torch checkpoint, its entries are compressed")
            return _InertUnpickler(archive.read(pickles[0]), lambda key: archive.read(f"{folder}data/{key}")).load()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: torn, or not a torch checkpoint of torch 1.6 or later (a zip file); save it again or fetch a whole copy") from error
    except InputError:
        raise
    except Exception as error:  # a file made by anybody can fail in any way
        raise InputError(f"{path}: not a checkpoint that can be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error

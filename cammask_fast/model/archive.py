"""Tensors out of PyTorch's zip archives without running code: `torch.save` files and TorchScript archives (OpenAI's CLIP).

Both hold a pickle beside raw storages. The pickle is read by an unpickler that can only build tensors, ordered dictionaries
and inert stand-ins for objects of every other class, so whatever else a checkpoint holds (NumPy scalars, hyper-parameters,
whole pickled modules, hostile calls) is never imported and never called.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip


def read_archive(path: Path) -> tuple[Any, list[str], bool]:
    """Read a zip archive of PyTorch.

    Returns:
        content: what was saved; objects of foreign classes are `Inert`.
        foreign: names of the classes and functions that were not imported, without those of TorchScript and torch.nn.
        scripted: whether it is a TorchScript archive.

    Raises:
        ValueError: cut off, damaged, or no archive of PyTorch's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
            if len(pickles) != 1:
                raise ValueError(f"{path} is a zip archive, but none of PyTorch's weights: unpack it and give the file inside")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError(f"{path} was written on a big-endian machine: save it again on this one")
            with archive.open(pickles[0]) as file:
                reader = _Unpickler(file, archive, folder)
                content = reader.load()
            return content, sorted(reader.foreign), f"{folder}constants.pkl" in names
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is cut off or damaged: download or copy it again") from None
    except ValueError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or no plain checkpoint, and was not loaded ({reason})") from None


class Inert:
    """Stands for an object whose class is not imported; holds its state, does nothing."""

    def __init__(self, *_args: Any, **_options: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    # what a pickle may do to lists, dictionaries and sets
    def append(self, _item: Any) -> None:
        """Ignore an item, as a pickle may append to lists."""

    def extend(self, _items: Any) -> None:
        """Ignore items, as a pickle may extend lists."""

    def add(self, _item: Any) -> None:
        """Ignore an item, as a pickle may add to sets."""

    def __setitem__(self, _key: Any, _value: Any) -> None: ...
    def __call__(self, *_args: Any, **_options: Any) -> Inert:
        return Inert()


class _Unpickler(pickle.Unpickler):
    """Builds tensors from the archive's storages, each of which is read once."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str):
        super().__init__(file, encoding="utf-8")
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}
        self.foreign: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and (name in _DTYPES or isinstance(getattr(torch, name, None), torch.dtype)):
            return _DTYPES[name] if name in _DTYPES else getattr(torch, name)
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"):
            # made for this reading, so that nothing a pickle does to them outlives it
            return (lambda data, *_: data) if name == "_rebuild_parameter" else (lambda *args: _strided(*args))
        if not module.startswith(("__torch__", "torch.nn.", "torch.jit")):
            self.foreign.add(f"{module}.{name}")
        return type("Inert", (Inert,), {})

    def persistent_load(self, identity: Any) -> Tensor:
        _, kind, key, _, numel = identity
        if key not in self.storages:
            if not isinstance(kind, torch.dtype):
                raise pickle.UnpicklingError("a storage of unknown type")
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            stored = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
            if len(stored) < numel:
                raise pickle.UnpicklingError(f"storage {key} is too short")
            self.storages[key] = stored
        return self.storages[key]


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any) -> Tensor:
    """more: requires_grad, hooks, and for `_rebuild_tensor_v3` the type of an untyped storage."""
    if len(more) > 2 and isinstance(more[2], torch.dtype):
        storage = storage.view(more[2])
    return storage.as_strided(size, stride, offset)


def module_tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a pickled or scripted module by their names; empty where `content` is no module."""
    if not isinstance(content, Inert) or not isinstance(content.state, Mapping):
        return {}
    found: dict[str, Tensor] = {}
    state = content.state
    parts = [state, *(state[kind] for kind in ("_parameters", "_buffers", "_modules") if isinstance(state.get(kind), Mapping))]
    for name, value in ((name, value) for part in parts for name, value in part.items()):
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        else:
            found |= module_tensors(value, f"{prefix}{name}.")
    return found

"""The one reader of weights: whatever file or folder people have of a CLIP, or what is wrong with it and what to do.

Files are told apart by what they hold, not by their suffix: safetensors, `torch.save` files and TorchScript archives; one file,
shards with an index, or a folder as a model hub has it. No code in a file is ever run.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cammask_fast.model.archive import module_tensors, read_archive
from cammask_fast.model.files import read_safetensors
from cammask_fast.model.layouts import to_open_clip_names, without_prefixes

CLASSIFIER_FORMAT = "cammask-classifier-1"
FILES_OF_A_FOLDER = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
    "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "weights", "params", "net", "network", "clip")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_MAGIC = (
    (b"\x1f\x8b", "a gzip archive: unpack it and give the file inside"),
    (b"\x89HDF", "weights of TensorFlow (HDF5): get the PyTorch or safetensors file of the same model"),
    (b"GGUF", "weights for llama.cpp (GGUF): get the PyTorch or safetensors file of the same model"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it and give the file inside"),
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file or folder holds of a CLIP."""

    path: Path
    """The file that was read, for shards their index."""
    tensors: dict[str, Tensor]
    """float32 under open_clip's names."""
    layout: str
    """In words: `open_clip's CLIP`, `OpenAI's CLIP` or `transformers' CLIPModel`."""
    recognised: str
    """One line for the user: layout, type, prefixes, what was left aside."""


def read_weights(path: Path) -> Weights:
    """Read a CLIP's weights from a file, an index of shards, one of the shards, or a folder.

    Raises:
        ValueError: one line with the cause and what to do, for anything that is missing, damaged or no CLIP.
    """
    file = _file_of(path)
    shards = _shards(file)
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for shard in shards:
        found, more = _read_file(shard)
        tensors |= found
        notes += [note for note in more if note not in notes]
    types = {str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point()}
    try:
        inside, prefix, outside = without_prefixes(tensors)
        weights, layout = to_open_clip_names(inside)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None
    words = [f"{layout} in {' and '.join(sorted(types))}", *([f"{len(shards)} shards"] if len(shards) > 1 else []), *notes]
    if prefix:
        words.append(f"the prefix {prefix} removed")
    if outside:
        words.append(f"{outside} tensors outside the CLIP left aside")
    return Weights(path=file, tensors=weights, layout=layout, recognised=f"{file}: {', '.join(words)}")


def is_classifier(path: Path) -> bool:
    """Whether a file is a checkpoint of `cammask train`, by its header."""
    if not path.is_file() or _refusal(path) or not _is_safetensors(path):
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return f'"{CLASSIFIER_FORMAT}"'.encode() in file.read(length)


def _file_of(path: Path) -> Path:
    """The file with the weights of a folder, or of a shard its index."""
    if path.is_dir():
        found = next((path / name for name in FILES_OF_A_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{path} is a folder without weights: expected one of {', '.join(FILES_OF_A_FOLDER[2:6])} in it")
        return found
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard.group(1)}{shard.group(2)}.index.json") if shard else path
    if not index.is_file():
        raise ValueError(
            f"{path} is one of several shards, and their index {index.name} is missing: get all files of the model"
        )
    return index


def _shards(file: Path) -> list[Path]:
    """The files that an index lists, else the file itself."""
    if not file.name.endswith(".index.json"):
        return [file]
    try:
        listed = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [file.with_name(name) for name in listed if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is no index of shards: expected JSON with a weight_map of file names") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise ValueError(f"{file} lists shards that are missing: {', '.join(missing) or 'all'}; get all files of the model")
    return shards


def _read_file(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one file under its own names, and words on what else it held."""
    refusal = _refusal(file)
    if refusal:
        raise ValueError(f"{file} is {refusal}")
    if _is_safetensors(file):
        tensors, header = read_safetensors(file)
        if header.get("format") == CLASSIFIER_FORMAT:
            raise ValueError(
                f"{file} is a checkpoint of cammask train, which has no text tower: pass it as `train --init`, `mask "
                "--checkpoint`, `predict` or `evaluate --checkpoint`"
            )
        return tensors, []
    if file.suffix == ".safetensors" and _begins(file, 2) not in (b"PK", b"\x80\x02"):
        raise ValueError(f"{file} is cut off or damaged, it does not begin like a safetensors file: get it again")
    if _begins(file, 4) != b"PK\x03\x04":
        return _unwrapped(_read_legacy(file), file, [])
    content, foreign, scripted = read_archive(file)
    try:
        of_module = module_tensors(content)
        if of_module:
            return of_module, ["a TorchScript archive of which no code was run" if scripted else "a pickled module"]
        return _unwrapped(content, file, foreign)
    except RecursionError:
        raise ValueError(f"{file} is damaged, and was not loaded: something in it contains itself") from None


def _read_legacy(file: Path) -> Any:
    """A file of torch.save from before PyTorch 1.6, or the reason why it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged or hostile file can raise anything
        raise ValueError(
            f"{file} is cut off, damaged, or not a plain state dict of tensors, and was not loaded, since pickled code could "
            "run: get it again, or convert it to safetensors"
        ) from None


def _unwrapped(content: Any, file: Path, foreign: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside a checkpoint, through the wrappers of training scripts."""
    aside: list[str] = []
    while isinstance(content, Mapping):
        content = {name: module_tensors(value) or value for name, value in content.items()}
        tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
        inner = {name: value for name, value in content.items() if _holds_tensors(value)}
        name = next((name for name in _WRAPPERS if name in inner), next(iter(inner)) if len(inner) == 1 else None)
        if len(tensors) > 1 or (tensors and not inner):  # two or more: a lone tensor beside a wrapper is a counter or a metric
            aside += [str(name) for name in content if name not in tensors]
            return tensors, [f"{', '.join(aside[:4])}{' and more' if len(aside) > 4 else ''} left aside"] if aside else []
        if name is None:
            if inner:
                raise ValueError(f"{file} holds several state dicts, {', '.join(map(str, inner))}: save the one that is meant")
            break
        aside += [str(other) for other in content if other != name]
        content = content[name]
    if foreign:
        raise ValueError(
            f"{file} is not a plain state dict of tensors and was not loaded, since pickled code could run (it names "
            f"{', '.join(foreign[:3])}): save model.state_dict(), or convert it to safetensors"
        )
    raise ValueError(f"{file} holds no state dict: expected parameter names and tensors")


def _holds_tensors(value: Any) -> bool:
    """Whether a mapping or, inside it, another one holds tensors by name; an optimiser's state does not count."""
    if not isinstance(value, Mapping) or {"param_groups"} & set(value):
        return False
    return any(isinstance(name, str) and (isinstance(one, Tensor) or _holds_tensors(one)) for name, one in value.items())


def _refusal(file: Path) -> str:
    """What a file is that holds no weights, and what to do; empty when it may hold some."""
    start = _begins(file, 4096)
    if _is_safetensors(file):
        return ""
    if not start:
        return "empty: the download or copy failed, get it again"
    if start.startswith(_GIT_LFS):
        size = re.search(rb"size (\d+)", start)
        of_size = f" of {int(size.group(1)) / 1e6:.0f} MB" if size else ""
        return f"a Git LFS pointer to a file{of_size}: run `git lfs pull` in its repository, or download the file itself"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the weights: download the file itself (on huggingface.co the link has /resolve/, not /blob/)"
    if text.startswith((b"{", b"[")):
        return "JSON text, not the weights: give the file or the folder of the weights"
    if file.suffix == ".onnx":
        return "an ONNX graph, whose weights have lost their names: give the weights that it was made of"
    if file.suffix == ".pt2":
        return "a program of torch.export, not the weights: give the checkpoint that it was made of"
    return next((words for magic, words in _MAGIC if start.startswith(magic)), "")


def _is_safetensors(file: Path) -> bool:
    """By its first bytes."""
    start = _begins(file, 9)
    return start[4:9] == b"\0\0\0\0{"  # the length of the header in 8 bytes, then JSON


def _begins(file: Path, count: int) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(count)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from None

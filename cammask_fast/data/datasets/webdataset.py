"""WebDataset tar shards: `.tar` files whose members share a key, an image and its `.cls` or `.json`.

The shards are indexed once (offset and size of every image), and samples are then read from anywhere in them: order, ranks
and resuming work as with folders, however many shards there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cammask_fast.data.datasets.image_folder import SUFFIXES, read_lines
from cammask_fast.runtime.files import atomic_write

CLASSES = "classes.txt"
INDEX = ".index.json"
INDEX_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What one shard holds. samples: (key, offset, size, label) per image; faults: (location, reason) of what was lost."""

    samples: tuple[tuple[str, int, int, int], ...]
    faults: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class TarShards:
    """Images in tar shards. shards: files; keys, shard_of (M,), offsets (M,), sizes (M,): where each image lies; folders: class
    names; labels: int64 (M,)."""

    shards: tuple[Path, ...]
    keys: tuple[str, ...]
    shard_of: Tensor
    offsets: Tensor
    sizes: Tensor
    folders: tuple[str, ...]
    labels: Tensor
    faults: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        return f"{self.shards[0]}" + (f" and {len(self.shards) - 1} more shards" if len(self.shards) > 1 else "")

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        """The bytes of an image. Raises OSError when they cannot be read, EOFError when the shard has become shorter."""
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        with open(self.shards[int(self.shard_of[index])], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise EOFError("the shard was cut off")
        return data

    def name(self, index: int) -> str:
        return f"{self.shards[int(self.shard_of[index])]}/{self.keys[index]}"

    def subset(self, chosen: Tensor) -> TarShards:
        """The images at the indices `chosen`, int64 (n,), in that order; classes stay."""
        return replace(
            self,
            keys=tuple(self.keys[i] for i in chosen.tolist()),
            shard_of=self.shard_of[chosen],
            offsets=self.offsets[chosen],
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
        )

    def with_classes(self, folders: tuple[str, ...], labels: Tensor) -> TarShards:
        """The same images under other classes."""
        return replace(self, folders=folders, labels=labels)


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..012}.tar` and `{x,y}.tar` as a shell spells them out, leading zeros kept. Raises ValueError on a `{` without
    `}`."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"{pattern}: a brace is not closed; expected such as shard-{{000..012}}.tar")
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers is None:
        words = found[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ValueError(f"{pattern}: expected {{FIRST..LAST}} in rising order")
        words = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    return [one for word in words for one in expand_braces(pattern[: found.start()] + word + pattern[found.end() :])]


def are_shards(data: str) -> bool:
    """Whether `--data` names shards: a .tar or a pattern of them, a .txt list, or a folder of .tar files."""
    path = Path(data)
    return data.endswith((".tar", ".txt")) or (path.is_dir() and any(path.glob("*.tar")))


def shard_paths(data: str) -> list[Path]:
    """The shards that `are_shards` recognises; a list has a path or pattern per line, relative to the list. Raises ValueError
    when one is missing."""
    path = Path(data)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if data.endswith(".txt"):
        lines = [line.strip() for line in read_lines(path)]
        found = [path.parent / one for line in lines for one in expand_braces(line)]
    else:
        found = [Path(one) for one in expand_braces(data)]
    missing = [str(one) for one in found if not one.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(found)} shards are missing, the first is {missing[0]}")
    return found


def open_shards(data: str) -> TarShards:
    """All samples of the shards that `data` names (see `shard_paths`), in the order of the shards.

    Class names come from `classes.txt` beside the first shard, one per line in the order of the labels; without it they are the
    labels themselves. What cannot be indexed (a cut shard, an image without a label) is listed in `faults`. Raises ValueError
    when there are no samples.
    """
    shards = shard_paths(data)
    indices = [index_of(shard) for shard in shards]
    names = shards[0].parent / CLASSES
    largest = max((label for index in indices for *_, label in index.samples), default=-1)
    folders = tuple(line.strip() for line in read_lines(names)) if names.is_file() else tuple(map(str, range(largest + 1)))
    rows, shard_of = [], []
    faults: list[tuple[str, str]] = []
    for number, (shard, index) in enumerate(zip(shards, indices, strict=True)):
        faults += index.faults
        for sample in index.samples:
            if sample[3] < len(folders):
                rows.append(sample)
                shard_of.append(number)
            else:
                faults.append((f"{shard}/{sample[0]}", f"label {sample[3]}, and {names} has {len(folders)} classes"))
    if not rows:
        reason = f": {faults[0][0]}: {faults[0][1]}" if faults else ""
        raise ValueError(f"no samples in {data}{reason}; expected members such as 000.jpg and 000.cls")
    keys, offsets, sizes, labels = zip(*rows, strict=True)
    return TarShards(
        shards=tuple(shards), keys=keys, shard_of=torch.tensor(shard_of), offsets=torch.tensor(offsets),
        sizes=torch.tensor(sizes), folders=folders, labels=torch.tensor(labels), faults=tuple(faults),
    )  # fmt: skip


def index_of(shard: Path) -> ShardIndex:
    """The index of a shard: read from `<shard>.index.json` if that belongs to the file as it is, else made and, where the
    folder can be written, kept there."""
    stat = shard.stat()
    identity = {"format": INDEX_FORMAT, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    kept = shard.with_name(shard.name + INDEX)
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if {name: found[name] for name in identity} == identity:
            samples = tuple((str(key), int(offset), int(size), int(label)) for key, offset, size, label in found["samples"])
            return ShardIndex(
                samples=samples, faults=tuple((str(location), str(reason)) for location, reason in found["faults"])
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or not ours: made again
    index = _read_index(shard, stat.st_size)
    text = json.dumps({**identity, "samples": index.samples, "faults": index.faults})
    # where the folder cannot be written the index is made again next time
    with contextlib.suppress(OSError), atomic_write(kept, temporary=f"{kept.name}.{os.getpid()}.part") as part:
        part.write_text(text, encoding="utf-8")
    return index


def _read_index(shard: Path, file_size: int) -> ShardIndex:
    members: dict[str, dict[str, tuple[int, int]]] = {}
    faults: list[tuple[str, str]] = []
    before, end = -1, 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset <= before or member.size < 0:
                    raise tarfile.ReadError("a header that points backwards")
                before = member.offset
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > file_size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                if key:
                    of_sample = members.setdefault(f"{folder}/{key}" if folder else key, {})
                    of_sample[f".{extension.lower()}"] = (member.offset_data, member.size)
        with open(shard, "rb", buffering=0) as file:  # tarfile takes a damaged header for the end
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except Exception as error:  # tarfile raises a dozen kinds on damaged headers
        faults.append((str(shard), f"cut off or damaged after {len(members)} samples ({error})"))
    samples = []
    with open(shard, "rb", buffering=0) as file:
        for key, parts in members.items():
            image = next((extension for extension in parts if extension in SUFFIXES), None)
            if image is None:
                faults.append((f"{shard}/{key}", "no image"))
                continue
            label = _label({name: os.pread(file.fileno(), min(size, 1 << 20), offset) for name, (offset, size) in parts.items()
                            if name in (".cls", ".json")})  # fmt: skip
            if label is None:
                faults.append((f"{shard}/{key}", "no label: expected .cls with a number, or .json with label or cls"))
            else:
                samples.append((key, *parts[image], label))
    return ShardIndex(samples=tuple(samples), faults=tuple(faults))


def _label(parts: dict[str, bytes]) -> int | None:
    try:
        found: Any = None
        if ".cls" in parts:
            found = parts[".cls"].decode("ascii").strip()
        elif ".json" in parts:
            described = json.loads(parts[".json"])
            found = described.get("label", described.get("cls"))
        label = int(found)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return label if 0 <= label < 1 << 31 and not isinstance(found, float) else None


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """The class names that `open_shards` reads."""
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")

"""WebDataset tar shards: `.tar` files whose members share a key, an image and its `.cls` or `.json`.

The shards are indexed once (`shard_index`), and samples are then read from anywhere in them: order, ranks and resuming work as
with folders, however many shards there are.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cammask_fast.data.class_names import read_classes_file, some
from cammask_fast.data.datasets.imagenet import wnids
from cammask_fast.data.datasets.shard_index import HIDDEN, NO_LABEL, ShardIndex, index_of
from cammask_fast.data.files import has_images, listing
from cammask_fast.data.sampler import digest
from cammask_fast.data.text_files import read_lines
from cammask_fast.runtime.notices import notice, remark

CLASSES = "classes.txt"
FEW_CLASSES = 1000
"""Labels below it are indices into a list of classes even where most of these have no images."""


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
        """The first shard and the number of the others."""
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
        """Shard and key of a sample."""
        return f"{self.shards[int(self.shard_of[index])]}/{self.keys[index]}"

    def fingerprint(self) -> str:
        """A digest of all keys and sizes."""
        return digest("\n".join(self.keys), self.sizes.tolist())

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
    """Whether `--data` names shards: a .tar or a pattern of them, a .txt list, or a folder of .tar files without folders of
    images beside them."""
    path = Path(data)
    if data.endswith((".tar", ".txt")):
        return not path.is_dir()
    beside = sorted(path.glob("*.tar")) if path.is_dir() else []
    if not beside or not any(has_images(path / one) for one in listing(path).folders):
        return bool(beside)
    notice(
        f"{data}: .tar files beside folders of images, ignored: {len(beside)}, such as {beside[0].name}; "
        f"--data '{data}/*.tar' reads them"
    )
    return False


def shard_paths(data: str) -> list[Path]:
    """The shards that `are_shards` recognises. A pattern has braces or, in quotes, the shell's `*`, `?` and `[…]`; a list has a
    path or pattern per line, relative to the list. Raises ValueError when one is missing or stands twice."""
    path = Path(data)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if data.endswith(".txt"):
        found = [one for line in read_lines(path) for one in _expanded(str(path.parent / line.strip()))]
    else:
        found = _expanded(data)
    missing = [str(one) for one in found if not one.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(found)} shards are missing, the first is {missing[0]}")
    twice = [str(one) for one, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(f"{data} names {len(twice)} shards more than once, such as {twice[0]}")
    return found


def _expanded(pattern: str) -> list[Path]:
    if Path(pattern).is_file():
        return [Path(pattern)]
    found: list[Path] = []
    for one in expand_braces(pattern):
        if not glob.has_magic(one) or Path(one).exists():
            found.append(Path(one))
            continue
        matches = sorted(Path(match) for match in glob.glob(one, recursive=True))
        if not matches:
            raise ValueError(f"no file matches {one}")
        found += matches
    return found


def open_shards(data: str) -> TarShards:
    """All samples of the shards that `data` names (see `shard_paths`, `open_shard_files`)."""
    return open_shard_files(shard_paths(data), data)


def open_shard_files(shards: Sequence[Path], data: str = "") -> TarShards:
    """All samples of shards, in their order. data: what names them in messages.

    Class names come from `classes.txt` beside the first shard, one per line in the order of the labels. Without it they are the
    labels themselves: the numbers from 0, those that occur where most do not, or the names that stand for labels. What cannot
    be indexed (a cut shard, an image without a label) is listed in `faults`. Raises ValueError when there are no samples.
    """
    data = data or f"{shards[0]} and {len(shards) - 1} more shards"
    indices = [index_of(shard) for shard in shards]
    _notice_index_faults(data, indices)
    names = shards[0].parent / CLASSES
    found = [label for index in indices for *_, label in index.samples]
    listed = read_classes_file(names) if names.is_file() else None
    folders, label_of = _labels(data, found) if listed is None else _listed_labels(names, listed, found)
    rows, shard_of = [], []
    faults: list[tuple[str, str]] = []
    for number, (shard, index) in enumerate(zip(shards, indices, strict=True)):
        faults += index.faults
        for key, offset, size, label in index.samples:
            if label in label_of:
                rows.append((key, offset, size, label_of[label]))
                shard_of.append(number)
            elif listed is not None:
                faults.append((f"{shard}/{key}", f"label {label}, and {names} has {len(folders)} classes"))
            else:
                faults.append((f"{shard}/{key}", f"{NO_LABEL} (it is {label!r}, where others are numbers)"))
    if not rows:
        reason = f": {faults[0][0]}: {faults[0][1]}" if faults else ""
        raise ValueError(f"no samples in {data}{reason}; expected members such as 000.jpg and 000.cls")
    keys, offsets, sizes, labels = zip(*rows, strict=True)
    without = len(folders) - len(set(labels))
    if without:
        remark(f"{data}: classes without images there: {without} of {len(folders)}")
    return TarShards(
        shards=tuple(shards), keys=keys, shard_of=torch.tensor(shard_of), offsets=torch.tensor(offsets),
        sizes=torch.tensor(sizes), folders=folders, labels=torch.tensor(labels), faults=tuple(faults),
    )  # fmt: skip


def _notice_index_faults(data: str, indices: Sequence[ShardIndex]) -> None:
    """Print one line for each kind of thing that was noticed while indexing."""
    counts: Counter[str] = Counter()
    for index in indices:
        counts.update(dict(index.notes))
    for what, count in counts.items():
        (remark if what == HIDDEN else notice)(f"{data}: {what}: {count}")
    stale = sum(index.stale for index in indices)
    if stale:
        remark(f"{data}: indexes made again, as they were of another state of their shards: {stale} of {len(indices)}")
    unwritten = [index.unwritten for index in indices if index.unwritten]
    if unwritten:
        remark(
            f"{data}: indexes that cannot be kept ({unwritten[0]}): {len(unwritten)}; these shards are read through at every "
            "start"
        )


def _listed_labels(
    file: Path, names: tuple[str, ...], found: Sequence[int | str]
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """The classes of a file, and the index of each label among them, by number or by name. Raises ValueError where numbers
    start at 1."""
    label_of: dict[int | str, int] = {label: label for label in range(len(names))}
    label_of |= {name.strip(): label for label, name in enumerate(names)}
    numbers = {label for label in found if isinstance(label, int)}
    if numbers and min(numbers) == 1 and max(numbers) == len(names):
        raise ValueError(
            f"the labels are 1 to {len(names)}, and {file} has {len(names)} classes: labels start at 0, write them so"
        )
    return names, label_of


def _labels(data: str, found: Sequence[int | str]) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Classes and label indices where no file names them."""
    numbers = sorted({label for label in found if isinstance(label, int)})
    if not numbers:
        words = sorted({label for label in found if isinstance(label, str)})
        return tuple(words), {word: index for index, word in enumerate(words)}
    if numbers[-1] < max(2 * len(numbers), FEW_CLASSES):
        return tuple(map(str, range(numbers[-1] + 1))), {number: number for number in numbers}
    ids = tuple(f"n{number:08d}" for number in numbers)
    names = ids if set(ids) <= set(wnids()) else tuple(map(str, numbers))
    notice(
        f"{data}: the labels, {numbers[0]} to {numbers[-1]}, are ids and no indices into a list: the classes are the "
        f"{len(numbers)} that occur, {some(names)}"
    )
    return names, {number: index for index, number in enumerate(numbers)}


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """The class names that `open_shards` reads."""
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")

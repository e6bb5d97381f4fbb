"""What `--data` names: where its splits lie, however they are spelled."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from cammask_fast.data.class_names import some
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.datasets.webdataset import are_shards, open_shard_files, open_shards
from cammask_fast.data.files import SUFFIXES, has_images, listing
from cammask_fast.data.types import ImageSource
from cammask_fast.runtime.notices import notice, remark

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}  # fmt: skip
"""Names of the folders of a split, in any case. A class may be called so, too; see `find_splits`."""
_SPLIT_OF = {name: split for split, names in SPELLINGS.items() for name in names}
_ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")

Location = str | tuple[Path, ...]
"""Where images lie: a folder or what `shard_paths` takes, or the shards themselves."""


def open_source(location: Location) -> ImageSource:
    """Tar shards or a folder of class folders. Raises ValueError when it is neither."""
    if not isinstance(location, str):
        return open_shard_files(location)
    if location.lower().endswith(_ARCHIVES):
        raise ValueError(f"{location} is a compressed archive: unpack it, and name the folder or the .tar files in it")
    return open_shards(location) if are_shards(location) else scan(Path(location))


def find_splits(data: str) -> dict[str, Location]:
    """The splits of `data` by their names here (`train`, `val`, `test`); none where it is a single set.

    A folder that is called like a split is one if class folders or shards lie in it. It is a class if its images lie directly
    in it, or in its only folder, and other folders beside it hold images. Shards in one folder are split by words in their
    names (`x-train-000.tar`). Raises ValueError for two folders of one split.
    """
    root = Path(data)
    if not root.is_dir():
        return {}
    named, others = defaultdict[str, list[Path]](list), list[Path]()
    for folder in listing(root).folders:
        split = _SPLIT_OF.get(folder.lower())
        (named[split] if split is not None else others).append(root / folder)
    whole = {split: [one for one in folders if _holds_classes(one)] for split, folders in named.items()}
    real = [one for folders in whole.values() for one in folders]
    if not real:
        return _splits_of_shards(root)
    beside = [folder.name for folder in others if has_images(folder)]
    if beside:
        if any(_could_be_class(one) for one in real):
            return {}
        notice(f"{data} has the splits {_spelled(real)}; other folders with images, not used: {len(beside)}, {some(beside)}")
    loose = [name for name in sorted(os.listdir(root)) if _is_data(name)]
    if loose:
        notice(f"{data} has the splits {_spelled(real)}; images and shards beside them, not used: {len(loose)}, {some(loose)}")
    if "train" in whole:  # beside images for training, a split may be empty or lack class folders: its use is an error
        whole = {split: folders or named[split] for split, folders in whole.items()}
    for folders in whole.values():
        if len(folders) > 1:
            raise ValueError(f"{data} has two folders for one split, {_spelled(folders)}: rename or merge them")
    return {split: str(whole[split][0]) for split in SPELLINGS if whole.get(split)}


def training_locations(data: str) -> tuple[Location, Location | None]:
    """Where the training images lie, and the validation images, if they are apart. Raises ValueError where
    there are splits, but none to train on."""
    splits = find_splits(data)
    if not splits:
        return data, None
    if "train" not in splits:
        raise ValueError(f"{data} has no train split; it has {_spelled(splits.values())}: name the folder to train on")
    return splits["train"], splits.get("val")


def evaluation_location(data: str) -> Location:
    """Where the images to be scored lie: the validation split, else the test split, else the training split. All but a
    validation split without a test split beside it is said."""
    splits = find_splits(data)
    if not splits:
        return data
    chosen = next(split for split in ("val", "test", "train") if split in splits)
    text = f"{data} has the splits {_spelled(splits.values())}: {_spelled([splits[chosen]])} is evaluated"
    if chosen == "train":
        notice(f"{text}, which holds images for training; there are no others")
    elif {"val", "test"} <= splits.keys():
        notice(f"{text}; for the other one, name its folder")
    elif chosen == "test" and "train" in splits:
        remark(text)
    return splits[chosen]


def _is_data(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, ".tar")) and not name.startswith(".")


def _spelled(locations: Iterable[Location | Path]) -> str:
    """Names of locations for a message."""
    return some(
        [f"{location[0].name} …" if isinstance(location, tuple) else f"{Path(location).name}/" for location in locations]
    )


def _holds_classes(folder: Path) -> bool:
    if any(folder.glob("*.tar")):
        return True
    return any(has_images(folder / one) for one in listing(folder).folders)


def _could_be_class(folder: Path) -> bool:
    """Whether a folder with images below it may be a class, with all its images in one more folder, or some of them."""
    images, folders = listing(folder)
    return bool(images) or sum(has_images(folder / one) for one in folders) < 2


def _splits_of_shards(root: Path) -> dict[str, Location]:
    shards = sorted(root.glob("*.tar"))
    if not shards or any(has_images(root / one) for one in listing(root).folders):
        return {}
    found, rest = defaultdict[str, list[Path]](list), list[Path]()
    for shard in shards:
        splits = {_SPLIT_OF[word] for word in re.split(r"[^a-z]+", shard.stem.lower()) if word in _SPLIT_OF}
        (found[splits.pop()] if len(splits) == 1 else rest).append(shard)
    if len(found) < 2:
        return {}
    counts = ", ".join(f"{len(found[split])} {split}" for split in SPELLINGS if split in found)
    left = f"; not used: {len(rest)}, such as {rest[0].name}" if rest else ""
    notice(f"{root}: the shards are splits by their names: {counts}{left}")
    return {split: tuple(found[split]) for split in SPELLINGS if split in found}

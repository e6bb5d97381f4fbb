"""ImageNet and its five shifts as evaluation sets: found by their folder names, counted, and labelled by wnid.

A set says which of the model's logits count and which of them are right for a label (`groups`): all for ImageNet, V2 and
Sketch, 200 for A and R, the mapped ones for ObjectNet, where several ImageNet classes can be right for one folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.data.class_names import some
from cammask_fast.data.datasets.image_folder import ImageFolder, scan
from cammask_fast.data.splits import of_classes
from cammask_fast.data.text_files import read_lines

WNID = re.compile(r"n\d{8}")
OBJECTNET_BORDER = 2
"""Pixels of the red border around ObjectNet's images."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A set of the family: the spellings of its folder (lower case, letters and digits only), and what it must hold."""

    spellings: tuple[str, ...]
    classes: int
    images: int


KNOWN = {
    "imagenet": Known(
        spellings=(
            "imagenet", "imagenet1k", "in1k", "ilsvrc", "ilsvrc2012", "ilsvrc2012val", "ilsvrc2012imgval", "imagenetval",
            "imagenet2012", "imagenetilsvrc2012",
        ),
        classes=1000, images=50_000,
    ),
    "imagenet-v2": Known(
        spellings=("imagenetv2", "imagenetv2matchedfrequency", "imagenetv2matchedfrequencyformatval", "imagenetv2mf", "inv2"),
        classes=1000, images=10_000,
    ),
    "imagenet-r": Known(spellings=("imagenetr", "imagenetrendition", "imagenetrenditions", "inr"), classes=200, images=30_000),
    "imagenet-sketch": Known(spellings=("imagenetsketch", "sketch", "insketch"), classes=1000, images=50_889),
    "imagenet-a": Known(spellings=("imageneta", "imagenetadversarial", "ina"), classes=200, images=7_500),
    "objectnet": Known(spellings=("objectnet", "objectnet10"), classes=113, images=18_574),
}  # fmt: skip
SPLITS = ("val", "validation", "test", "valid")


class KnownSet(NamedTuple):
    """images: labelled by `images.folders`, the classes of the set. groups: int64 (K,), for each logit of the model the class
    of the set for which it is right, or -1 where it does not count. border: pixels to cut off. lacking: what is missing."""

    images: ImageFolder
    groups: Tensor
    border: int
    lacking: str


@cache
def wnids() -> tuple[str, ...]:
    """ImageNet-1k's WordNet ids in the order of its classes."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def wnids_of(name: str) -> tuple[str, ...]:
    """The classes of a set of the family but ObjectNet, in the order of ImageNet-1k."""
    if name not in ("imagenet-a", "imagenet-r"):
        return wnids()
    listed = files("timm.data").joinpath("_info", f"{name.replace('-', '_')}_synsets.txt").read_text()
    return tuple(wnid for wnid in wnids() if wnid in listed.split())


def imagenet_names(folders: Sequence[str]) -> tuple[str, ...] | None:
    """CLIP's class names for folders that are all ImageNet-1k wnids, else None. Names are looked up by index: "missile" and
    "sunglasses" name two classes each."""
    if not all(WNID.fullmatch(folder) for folder in folders) or not set(folders) <= set(wnids()):
        return None
    from open_clip import IMAGENET_CLASSNAMES

    index_of = {wnid: index for index, wnid in enumerate(wnids())}
    return tuple(IMAGENET_CLASSNAMES[index_of[folder]] for folder in folders)


def find_sets(root: Path) -> dict[str, Path]:
    """Sets of the family by name: `root` itself if it is spelled as one and built as one, else those among its folders."""
    if not root.is_dir():
        return {}
    own = [(name, found) for name in KNOWN if (found := _located(name, root)) is not None]
    if own:
        return dict(own)
    sets: dict[str, Path] = {}
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        for name in KNOWN:
            found = _located(name, folder)
            if found is not None:
                if name in sets:
                    raise ValueError(f"two folders for {name}: {sets[name]} and {found}; name one with --data {name}=FOLDER")
                sets[name] = found
    return {name: sets[name] for name in KNOWN if name in sets}


def _located(name: str, folder: Path) -> Path | None:
    """The folder with the classes of a set, inside a folder that is spelled as the set, at most two levels down."""
    if _plain(folder.resolve().name) not in KNOWN[name].spellings and _plain(folder.name) not in KNOWN[name].spellings:
        return None
    return located(name, folder)


def located(name: str, folder: Path) -> Path | None:
    """The folder with the classes of a set (for ObjectNet that with `images`), whatever `folder` is called."""
    if not folder.is_dir():
        return None
    wanted = (*SPLITS, *KNOWN[name].spellings)
    inside = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    if _built_as(name, inside):
        return folder
    for child in inside:
        if _plain(child.name) in wanted and _built_as(name, [one for one in child.iterdir() if one.is_dir()]):
            return child
    return None


def _built_as(name: str, inside: list[Path]) -> bool:
    names = {path.name for path in inside}
    if name == "objectnet":
        return "images" in names
    whole = [one for one in names if WNID.fullmatch(one) or (name == "imagenet-v2" and one.isdecimal())]
    return bool(whole) and 2 * len(whole) > len(names)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def open_known(name: str, folder: Path, model_folders: Sequence[str]) -> KnownSet:
    """Open a set of the family for a model whose logits are given. Classes that the model does not have are left out.

    Args:
        name: of the set, a key of `KNOWN`.
        folder: where it is.
        model_folders: the model's K classes, wnids, in the order of its logits.

    Returns:
        The images, and for each logit the class for which it is right.

    Raises:
        ValueError: the folder is not built as the set or holds classes that do not belong to it, or the model has none of its
            classes.
    """
    root = located(name, folder)
    if root is None:
        raise ValueError(f"{folder} is not built as {name}: expected {_layout(name)}")
    found, right = _objectnet(root) if name == "objectnet" else _by_wnid(name, root)
    lacking = _lacking(name, found, right)
    logit = {wnid: index for index, wnid in enumerate(model_folders)}
    shared = [one for one in found.folders if any(wnid in logit for wnid in right[one])]
    if not shared:
        raise ValueError(f"{name}: the model has none of its classes; a model for it is trained on folders named by wnid")
    images = of_classes(found, shared)
    groups = torch.full((len(model_folders),), -1)
    # Logits of classes without images still compete: they are predictions that are never right.
    absent = len(shared)
    for wnids_of_class in right.values():
        for wnid in wnids_of_class:
            if wnid in logit:
                groups[logit[wnid]] = absent
    for label, one in enumerate(shared):
        for wnid in right[one]:
            if wnid in logit:
                groups[logit[wnid]] = label
    return KnownSet(images, groups, OBJECTNET_BORDER if name == "objectnet" else 0, lacking)


def _layout(name: str) -> str:
    if name == "objectnet":
        return "images/<folder>/*.png and mappings/*.json"
    return "folders 0 to 999 or wnid folders (n01440764 …)" if name == "imagenet-v2" else "wnid folders (n01440764 …)"


def _by_wnid(name: str, root: Path) -> tuple[ImageFolder, dict[str, tuple[str, ...]]]:
    """The images with their classes' folders named by wnid, and the right wnids of every class of the set."""
    found = scan(root)
    folders = found.folders
    if name == "imagenet-v2" and all(one.isdecimal() for one in folders):
        beyond = [one for one in folders if int(one) >= len(wnids())]
        if beyond:
            raise ValueError(f"{root}: folders {some(beyond)} are not among 0 to {len(wnids()) - 1}")
        folders = tuple(wnids()[int(one)] for one in folders)  # the folder's number, not its position in a sorted list
    known = wnids_of(name)
    foreign = sorted(set(folders) - set(known))
    if foreign:
        raise ValueError(f"{root} has folders that are not classes of {name}: {some(foreign)}")
    return found.with_classes(folders, found.labels), {wnid: (wnid,) for wnid in known}


def _objectnet(root: Path) -> tuple[ImageFolder, dict[str, tuple[str, ...]]]:
    """The images of the mapped folders, and for each the wnids that are right."""
    right = objectnet_mapping(_mappings(root))
    found = scan(root / "images")
    mapped = [one for one in found.folders if one in right]
    if not mapped:
        raise ValueError(f"{root / 'images'} has none of the {len(right)} folders that map to ImageNet")
    return of_classes(found, mapped), right


def _mappings(root: Path) -> Path:
    for folder in (root / "mappings", root):
        if (folder / "objectnet_to_imagenet_1k.json").is_file():
            return folder
    raise ValueError(f"{root}: ObjectNet's own mappings/objectnet_to_imagenet_1k.json is missing; it comes with the data set")


def objectnet_mapping(folder: Path) -> dict[str, tuple[str, ...]]:
    """ObjectNet's folder names to ImageNet wnids, from the four files of the data set's `mappings`.

    A folder has a label; a label may list ImageNet descriptions, separated by "; "; a description's line is its id in
    ImageNet 2012, and another file says which class index has that id. Raises ValueError when a file is missing or they do
    not fit together.
    """
    try:
        label_of = json.loads((folder / "folder_to_objectnet_label.json").read_text(encoding="utf-8"))
        described = json.loads((folder / "objectnet_to_imagenet_1k.json").read_text(encoding="utf-8"))
        ids = json.loads((folder / "pytorch_to_imagenet_2012_id.json").read_text(encoding="utf-8"))
        lines = [line.strip() for line in read_lines(folder / "imagenet_to_label_2012_v2")]
        class_of_id = {int(number): int(index) for index, number in ids.items()}
        class_of = {line: class_of_id[number] for number, line in enumerate(lines)}
        folder_of = {label: one for one, label in label_of.items()}
        return {
            folder_of[label]: tuple(wnids()[class_of[text.strip()]] for text in texts.split("; "))
            for label, texts in described.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: ObjectNet's mapping files are missing or damaged ({error})") from None
    except (KeyError, IndexError) as error:
        raise ValueError(f"{folder}: ObjectNet's mapping files do not fit together: nothing for {error}") from None


def _lacking(name: str, found: ImageFolder, right: dict[str, tuple[str, ...]]) -> str:
    """What is missing or too much, in words; empty for a whole set."""
    known, have = KNOWN[name], set(found.folders)
    if len(have) == known.classes and len(found) == known.images:
        return ""
    missing = [one for one in right if one not in have]
    text = f"{name}: {len(have)} of {known.classes} classes and {len(found)} of {known.images} images in {found.root}"
    return text + (f", missing {some(missing)}" if missing else "")

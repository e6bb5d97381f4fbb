"""Image folders: `train/<class>/*.jpg` with an optional `val/`, or class folders directly inside the given folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cammask_fast.data.class_names import some
from cammask_fast.data.files import SUFFIXES, Ignored, count_images_below, identity, listing, missing_folder
from cammask_fast.data.sampler import digest
from cammask_fast.data.text_files import printable
from cammask_fast.runtime.notices import notice

SIZES_SEEN = 1000


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images of one split. folders: class folder names; files: paths below root with a forward slash; labels: int64 (M,),
    indices into folders."""

    root: Path
    folders: tuple[str, ...]
    files: tuple[str, ...]
    labels: Tensor
    faults: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """The bytes of an image. Raises OSError when they cannot be read."""
        return (self.root / self.files[index]).read_bytes()

    def name(self, index: int) -> str:
        """Path of an image."""
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        """A digest of all names, and of the sizes of up to 1000 files spread over them."""
        chosen = range(0, len(self), -(-len(self) // SIZES_SEEN) or 1)
        return digest("\n".join(self.files), [_size(self.root / self.files[index]) for index in chosen])

    def subset(self, chosen: Tensor) -> ImageFolder:
        """The images at the indices `chosen`, int64 (n,), in that order; classes stay."""
        return replace(self, files=tuple(self.files[i] for i in chosen.tolist()), labels=self.labels[chosen])

    def with_classes(self, folders: tuple[str, ...], labels: Tensor) -> ImageFolder:
        """The same images under other classes."""
        return replace(self, folders=folders, labels=labels)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def scan(root: Path) -> ImageFolder:
    """Images in the class folders directly inside `root`, sorted by class and file name.

    Images one folder deeper belong to the class, too. What is ignored (other files, deeper folders, class folders without
    images) is a notice with a count; symbolic links are followed, but not in circles. Names that are not UTF-8 are escaped.
    Raises ValueError when the folder is missing or holds no images in class folders.
    """
    if root.is_file():
        raise ValueError(f"{root} is a file: expected a folder of class folders, or shards whose names end in .tar")
    if not root.is_dir():
        raise ValueError(missing_folder(root))
    ignored = Ignored()
    loose, folders = listing(root, ignored)
    if loose:
        ignored.add("images outside class folders", str(root / loose[0]), len(loose))
    found = {folder: _class_images(root, folder, ignored) for folder in _without_circles(root, folders, ignored)}
    if not any(found.values()):
        lying = " (its images lie outside class folders)" if loose else ""
        raise ValueError(f"no images in class folders of {root}{lying}: expected <class>/*.jpg ({', '.join(SUFFIXES)})")
    _tell_deeper(root, found)
    empty = [printable(name) for name, images in found.items() if not images]
    if empty:
        notice(f"{root}: class folders without images, left out: {len(empty)}, {some(empty)}")
    ignored.tell(str(root))
    found = {name: images for name, images in found.items() if images}
    names = [printable(name) for name in found]
    escaped = [name for name, raw in zip(names, found, strict=True) if name != raw]
    if escaped:
        notice(
            f"{root}: folder names escaped, as they are not UTF-8 or hold control characters: {len(escaped)}, {some(escaped)}"
        )
    return ImageFolder(
        root=root,
        folders=tuple(names),
        files=tuple(f"{name}/{image}" for name, images in found.items() for image in images),
        labels=torch.repeat_interleave(torch.tensor([len(images) for images in found.values()])),
    )


def _without_circles(root: Path, folders: list[str], ignored: Ignored) -> list[str]:
    """The folders that are neither `root` nor one that holds it, nor one of the others under another name."""
    seen = {identity(folder): str(folder) for folder in (root.resolve(), *root.resolve().parents)}
    kept = []
    for name in folders:
        own = identity(root / name)
        if own in seen:
            ignored.add(f"links to a folder that is read already ({seen[own]})", str(root / name))
        else:
            seen[own] = str(root / name)
            kept.append(name)
    return kept


def _class_images(root: Path, name: str, ignored: Ignored) -> list[str]:
    """Images of a class, directly in its folder and one folder deeper, as paths below the class folder."""
    images, inner = listing(root / name, ignored)
    for one in _without_circles(root / name, inner, ignored):
        deeper, beyond = listing(root / name / one, ignored)
        images += [f"{one}/{image}" for image in deeper]
        lost = sum(count_images_below(root / name / one / further) for further in beyond)
        if lost:
            ignored.add("images more than one folder below a class", str(root / name / one), lost)
    return images


def _tell_deeper(root: Path, found: dict[str, list[str]]) -> None:
    """Say how many images lie below class folders. Raises ValueError where the folders below look like the classes."""
    deeper = [(name, image) for name, images in found.items() for image in images if "/" in image]
    if not deeper:
        return
    inner = sorted({image.rpartition("/")[0] for _, image in deeper})
    if len(inner) > 1 and len(deeper) == sum(map(len, found.values())):
        raise ValueError(
            f"no images in class folders of {root}, but one level below, as in {root}/{deeper[0][0]}/{deeper[0][1]}: name the "
            "folder whose folders are the classes"
        )
    notice(
        f"{root}: images in folders below a class folder ({some(inner)}), taken for that class: {len(deeper)}; move them away "
        "if they are no photographs of it"
    )

"""Image folders: `train/<class>/*.jpg` with an optional `val/`, or class folders directly inside the given folder."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
log = logging.getLogger(__name__)


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
        return str(self.root)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """The bytes of an image. Raises OSError when they cannot be read."""
        return (self.root / self.files[index]).read_bytes()

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def subset(self, chosen: Tensor) -> ImageFolder:
        """The images at the indices `chosen`, int64 (n,), in that order; classes stay."""
        return replace(self, files=tuple(self.files[i] for i in chosen.tolist()), labels=self.labels[chosen])

    def with_classes(self, folders: tuple[str, ...], labels: Tensor) -> ImageFolder:
        """The same images under other classes."""
        return replace(self, folders=folders, labels=labels)


def scan(root: Path) -> ImageFolder:
    """Images in the class folders directly inside `root`, sorted by class and file name.

    Hidden files and files that are no images by their suffix are ignored, and so are class folders without images, with a
    warning; symbolic links are followed. Raises ValueError when the folder is missing or holds no images in class folders.
    """
    if not root.is_dir():
        raise ValueError(f"no folder at {root}: expected FOLDER/train/<class>/*.jpg or FOLDER/<class>/*.jpg")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    found = {folder: _images_in(root / folder) for folder in folders}
    if not any(found.values()):
        loose = " (its images lie outside class folders)" if _images_in(root) else ""
        raise ValueError(f"no images in class folders of {root}{loose}: expected <class>/*.jpg ({', '.join(SUFFIXES)})")
    empty = [name for name, images in found.items() if not images]
    if empty:
        log.warning("%s: no images in %s: left out", root, some(empty))
    found = {name: images for name, images in found.items() if images}
    return ImageFolder(
        root=root,
        folders=tuple(found),
        files=tuple(f"{name}/{image}" for name, images in found.items() for image in images),
        labels=torch.repeat_interleave(torch.tensor([len(images) for images in found.values()])),
    )


def images_in(folder: Path) -> list[Path]:
    """The images directly inside a folder, sorted. Raises ValueError when there are none."""
    found = _images_in(folder) if folder.is_dir() else []
    if not found:
        raise ValueError(f"no images in {folder}: expected a folder with {', '.join(SUFFIXES)} files")
    return [folder / name for name in found]


def _images_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        shown = [e for e in entries if not e.name.startswith(".") and os.path.splitext(e.name)[1].lower() in SUFFIXES]
        return sorted(entry.name for entry in shown if entry.is_file() or (entry.is_symlink() and not entry.is_dir()))


def read_class_names(file: Path | None, folders: tuple[str, ...]) -> tuple[str, ...]:
    """One class name per folder, for the prompts.

    Without a file: the folder names, underscores read as spaces. The file has one name per line in the order of the folders,
    or lines `folder<TAB>name` in any order. Raises ValueError when names and folders do not match.
    """
    if file is None:
        return tuple(folder.replace("_", " ") for folder in folders)
    lines = read_lines(file)
    if all("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines)
        missing = [folder for folder in folders if folder not in named]
        if missing:
            raise ValueError(f"{file} names no class for the folders {some(missing)}")
        return tuple(named[folder].strip() for folder in folders)
    if len(lines) != len(folders):
        raise ValueError(f"{file} has {len(lines)} class names for {len(folders)} class folders: write one line per folder")
    return tuple(line.strip() for line in lines)


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank. Raises ValueError when there are none or it cannot be read."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file} as text: {error}") from None
    if not lines:
        raise ValueError(f"{file} is empty: expected one entry per line")
    return lines


def some(names: list[str] | tuple[str, ...], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

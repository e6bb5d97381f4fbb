"""Which files of a folder are images, and a count with reasons of those that are not."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

from PIL import features

from cammask_fast.data.class_names import some
from cammask_fast.data.text_files import printable
from cammask_fast.runtime.notices import notice, remark
from cammask_fast.runtime.suggest import did_you_mean

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    *((".avif",) if features.check("avif") else ()),
)  # fmt: skip
UNREADABLE_FORMATS = (
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".mp4", ".mov", ".pdf",
)  # fmt: skip
"""Formats of pictures that are not read; where Pillow knows AVIF, that is in `SUFFIXES`."""
LITTER = ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information")
"""What operating systems leave in folders, in lower case; hidden files belong to it, too."""


_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself: run `git lfs pull`"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"%PDF", "a PDF, which is not read: convert it to .jpg or .png"),
)


def kind_of(data: bytes) -> str:
    """What the first bytes of something unreadable are, in words, or nothing."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"<":
        name = "an SVG drawing" if b"<svg" in head.lower() else "a page of HTML or XML, such as a download gives that failed"
        return f"{name}, and no image"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "a HEIC image, which is not read: convert it to .jpg or .png"
    return next((text for start, text in _KINDS if head.startswith(start)), "")


class Ignored:
    """Files and folders that are not used, by reason. harmless: by reasons that nobody needs to act on."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.harmless: Counter[str] = Counter()

    def add(self, reason: str, path: str, count: int = 1) -> None:
        """Count files that are ignored.

        Args:
            reason: why.
            path: of one of them; the first path of a reason is kept as its example.
            count: how many.
        """
        self.counts[reason] += count
        self.examples.setdefault(reason, path)

    def tell(self, where: str) -> None:
        """One line with all counts: a notice, or a remark where only litter was ignored."""
        parts = [f"{count} {reason} (such as {self.examples[reason]})" for reason, count in self.counts.most_common()]
        litter = [f"{count} {reason}" for reason, count in self.harmless.most_common()]
        if parts or litter:
            total = self.counts.total() + self.harmless.total()
            line = f"{where}: ignored files and folders: {total}, of which {', '.join(parts + litter)}"
            (notice if parts else remark)(line)


class Listing(NamedTuple):
    """Names in a folder, sorted. images: those with a suffix of `SUFFIXES`. folders: visible ones, links followed."""

    images: list[str]
    folders: list[str]


def listing(folder: Path, ignored: Ignored | None = None) -> Listing:
    """What is directly inside a folder. Raises OSError when it cannot be listed."""
    ignored = Ignored() if ignored is None else ignored
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                ignored.harmless["hidden"] += 1
            elif entry.name.lower() in LITTER:
                ignored.harmless["left by the system"] += 1
            elif is_folder(entry):
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                images.append(entry.name)  # broken links too: an image that cannot be read
            else:
                ignored.add(_reason(entry.name), entry.path)
    return Listing(sorted(images), sorted(folders))


def is_folder(entry: os.DirEntry[str] | Path) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def has_images(folder: Path, *, depth: int = 1) -> bool:
    """Whether images lie in a folder, or in its folders down to `depth`."""
    images, folders = listing(folder)
    return bool(images) or (depth > 0 and any(has_images(folder / one, depth=depth - 1) for one in folders))


def identity(folder: Path) -> tuple[int, int]:
    """Identifies a folder, whichever links lead to it."""
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def images_in(folder: Path) -> list[Path]:
    """The images directly inside a folder, sorted. Raises ValueError when there are none."""
    found = listing(folder).images if folder.is_dir() else []
    if not found:
        raise ValueError(f"no images in {folder}: expected a folder with {', '.join(SUFFIXES)} files")
    return [folder / name for name in found]


def photographs_of(given: Sequence[str | Path]) -> list[Path]:
    """Files, folders (all images below, links not followed) and patterns as one list of files, each once, in the order given.

    What is ignored in folders is a notice. Raises ValueError for what names no image.
    """
    found: dict[Path, None] = {}
    for one in map(Path, given):
        if one.is_dir():
            inside = _below(one)
            if not inside:
                raise ValueError(f"no images in {one}: expected a folder with {', '.join(SUFFIXES)} files")
        elif one.exists() or not has_magic(str(one)):
            inside = [one]  # one that is missing cannot be read, which is said there
        else:
            inside = [Path(name) for name in sorted(glob(str(one), recursive=True)) if not Path(name).is_dir()]
            if not inside:
                raise ValueError(f"no files match {one}")
        found |= dict.fromkeys(inside)
    return list(found)


def _below(folder: Path) -> list[Path]:
    """Images anywhere below a folder, sorted."""
    ignored, found = Ignored(), []
    for parent, folders, _ in os.walk(folder):
        names = listing(Path(parent), ignored)
        folders[:] = names.folders
        found += [Path(parent, name) for name in names.images]
    ignored.tell(str(folder))
    return sorted(found)


def count_images_below(folder: Path) -> int:
    """Images anywhere below a folder; links to folders are not followed."""
    return sum(
        os.path.splitext(name)[1].lower() in SUFFIXES for _, _, names in os.walk(folder) for name in names if name[0] != "."
    )


def _reason(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNREADABLE_FORMATS:
        return f"{suffix} (a format that is not read; convert to .jpg or .png)"
    return suffix or "without a suffix"


def missing_folder(path: Path) -> str:
    """What to say of a folder of images that is not there: a close name beside it, and what lies there."""
    expected = "expected FOLDER/train/<class>/*.jpg or FOLDER/<class>/*.jpg"
    names = [printable(name) for name in listing(path.parent).folders] if path.parent.is_dir() else []
    there = f"; {path.parent} holds {some(names)}" if names else ""
    meant = did_you_mean(str(path), [str(path.parent / name) for name in names])
    return f"no folder at {path}: {expected}{there}{meant}"

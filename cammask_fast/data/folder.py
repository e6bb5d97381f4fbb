"""Image folders: `train/<class>/*.jpg` with an optional `val/`, or class folders directly inside the given folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cammask_fast.data.batch import Batch, epoch_order

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images of one split. folders: class folder names; labels: int64 (M,), indices into folders."""

    root: Path
    folders: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, chosen: Tensor) -> ImageFolder:
        """The images at the indices `chosen`, int64 (n,), in that order; classes stay."""
        return replace(self, paths=tuple(self.paths[i] for i in chosen.tolist()), labels=self.labels[chosen])

    def labelled_by(self, folders: tuple[str, ...]) -> ImageFolder:
        """The same images with labels that index `folders`. Raises ValueError for a class that is not among them."""
        unknown = [name for name in self.folders if name not in folders]
        if unknown:
            raise ValueError(
                f"{self.root} has class folders outside the {len(folders)} known classes: {_some(unknown)}; "
                f"known: {_some(folders)}. Rename or remove them"
            )
        place = torch.tensor([folders.index(name) for name in self.folders])
        return replace(self, folders=folders, labels=place[self.labels])


def scan(root: Path) -> ImageFolder:
    """Images in the class folders directly inside `root`, sorted by class and file name.

    Hidden files and files that are no images are ignored; symbolic links are followed. Raises ValueError when the folder is
    missing, has no class folders, or a class folder holds no images.
    """
    if not root.is_dir():
        raise ValueError(f"no folder at {root}: expected FOLDER/train/<class>/*.jpg or FOLDER/<class>/*.jpg")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {folder.name: _images_in(folder) for folder in folders}
    if not any(found.values()):
        loose = " (its images lie outside class folders)" if _images_in(root) else ""
        raise ValueError(f"no images in class folders of {root}{loose}: expected <class>/*.jpg ({', '.join(SUFFIXES)})")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise ValueError(f"no images in {root / empty[0]}: add images ({', '.join(SUFFIXES)}) or remove the folder")
    return ImageFolder(
        root=root,
        folders=tuple(found),
        paths=tuple(path for paths in found.values() for path in paths),
        labels=torch.repeat_interleave(torch.tensor([len(paths) for paths in found.values()])),
    )


def images_in(folder: Path) -> list[Path]:
    """The images directly inside a folder, sorted. Raises ValueError when there are none."""
    found = _images_in(folder) if folder.is_dir() else []
    if not found:
        raise ValueError(f"no images in {folder}: expected a folder with {', '.join(SUFFIXES)} files")
    return found


def _images_in(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file())


def training_folders(root: Path, *, val_share: float, seed: int) -> tuple[ImageFolder, ImageFolder | None]:
    """Training and validation images of a folder.

    `root/val` validates where it exists; otherwise a stratified share of the training images does, chosen by `seed`; none for
    a share of 0. Raises ValueError on folders that cannot be used (see `scan`) and on validation classes without training
    images.
    """
    if not 0 <= val_share < 1:
        raise ValueError(f"--val-share: expected a share in [0, 1), got {val_share}")
    train = scan(root / "train" if (root / "train").is_dir() else root)
    if (root / "train").is_dir() and (root / "val").is_dir():
        return train, scan(root / "val").labelled_by(train.folders)
    return hold_out(train, share=val_share, seed=seed) if val_share else (train, None)


def evaluation_folder(root: Path) -> ImageFolder:
    """The images to evaluate on: `root/val`, else `root/train`, else the class folders inside `root`."""
    for name in ("val", "train"):
        if (root / name).is_dir():
            return scan(root / name)
    return scan(root)


def hold_out(folder: ImageFolder, *, share: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Split off `share` of every class, at least one image each and never the last one. Returns (rest, held out)."""
    counts = torch.bincount(folder.labels, minlength=len(folder.folders))
    single = [name for name, count in zip(folder.folders, counts.tolist(), strict=True) if count < 2]
    if single:
        raise ValueError(
            f"only one image in class {_some(single)} of {folder.root}, and a validation image must be held out: "
            "add images, give a val/ folder, or pass --val-share 0"
        )
    order = epoch_order(len(folder), seed=seed, epoch=0)
    held = torch.zeros(len(folder), dtype=torch.bool)
    for label, count in enumerate(counts.tolist()):
        mine = order[folder.labels[order] == label]
        held[mine[: min(max(1, round(share * count)), count - 1)]] = True
    return folder.subset((~held).nonzero()[:, 0]), folder.subset(held.nonzero()[:, 0])


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
            raise ValueError(f"{file} names no class for the folders {_some(missing)}")
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


def decode(path: Path, size: int) -> Tensor:
    """One image as uint8 (size, size, 3): EXIF rotation, RGB, bicubic resize of the short side, centre crop.

    Sizes round as in torchvision's Resize and CenterCrop. Raises ValueError naming a file that cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path} ({_first_line(error)}): remove or replace it") from None
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))


class _Decoded(Dataset[tuple[Tensor, int, int] | str]):
    """Decoded images; one that cannot be read is its error message, since worker processes garble exceptions."""

    def __init__(self, folder: ImageFolder, size: int):
        self.paths, self.labels, self.size = folder.paths, folder.labels, size

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | str:
        try:
            return decode(self.paths[index], self.size), int(self.labels[index]), index
        except ValueError as error:
            return str(error)


class _Order(Sampler[int]):
    """The sample order of the current epoch."""

    def __init__(self, count: int, *, shuffle: bool, seed: int):
        self.count, self.shuffle, self.seed, self.epoch = count, shuffle, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.count, seed=self.seed, epoch=self.epoch) if self.shuffle else torch.arange(self.count)
        return iter(order.tolist())


def _collate(items: list[tuple[Tensor, int, int] | str]) -> Batch | str:
    decoded = []
    for item in items:
        if isinstance(item, str):
            return item
        decoded.append(item)
    images, labels, ids = zip(*decoded, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(ids))


class FolderLoader:
    """Batches of an image folder, decoded by `workers` processes (0: in this one).

    With `shuffle` the order follows `epoch_order` and the last incomplete batch is dropped, as in training; otherwise every
    image comes once, in order. sample_ids are indices into `folder.paths`.
    """

    def __init__(
        self,
        folder: ImageFolder,
        *,
        image_size: int,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
    ):
        if batch_size < 1 or workers < 0:
            raise ValueError(f"expected a batch size of 1 or more and 0 or more workers, got {batch_size} and {workers}")
        if shuffle and len(folder) < batch_size:
            raise ValueError(
                f"batch size {batch_size} is larger than the {len(folder)} training images: choose a smaller --batch-size"
            )
        self.folder, self.labels = folder, folder.labels
        self._order = _Order(len(folder), shuffle=shuffle, seed=seed)
        self._loader: DataLoader[tuple[Tensor, int, int] | str] = DataLoader(
            _Decoded(folder, image_size),
            batch_size=batch_size,
            sampler=self._order,
            num_workers=workers,
            collate_fn=_collate,
            drop_last=shuffle,
            persistent_workers=workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        self._order.epoch = epoch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Raises ValueError naming the first image that cannot be read."""
        for item in self._loader:
            if isinstance(item, str):
                raise ValueError(item)
            yield item


def _some(names: list[str] | tuple[str, ...], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

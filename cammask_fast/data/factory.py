"""What `--data` names: the embedded benchmark (`texture-digits`), image folders, tar shards, ImageNet and its shifts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.data.augment import Augment
from cammask_fast.data.class_names import read_class_names
from cammask_fast.data.datasets.imagenet import KNOWN, find_sets, imagenet_names, open_known, wnids
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, IMAGE_SIZE
from cammask_fast.data.datasets.texture_digits_splits import EVALUATION_BATCH as BENCHMARK_BATCH
from cammask_fast.data.datasets.texture_digits_splits import (
    TRAIN_IMAGES,
    evaluation_specifications,
    rendered,
    training_splits,
)
from cammask_fast.data.layout import evaluation_location, open_source, training_locations
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.loaders.dali_loader import DaliLoader
from cammask_fast.data.loaders.torch_loader import UNREADABLE, TorchLoader
from cammask_fast.data.splits import few_shot, hold_out, hold_out_images, labelled_by, of_classes
from cammask_fast.data.summary import summary
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.data.types import ArrayLoader, ImageSource

BENCHMARK = "texture-digits"
EVALUATION_BATCH = 128
DEFAULT_VAL_SHARE = 0.1
PREVIEW_SIZE = 60

AnyLoader = ArrayLoader | TorchLoader | DaliLoader


@dataclass(frozen=True, kw_only=True)
class DataSubset:
    """Which images of the training data are used. val_share, val_images: held out, stratified, even where there is a `val`;
    with neither, `val` validates, else a tenth. shots: training images per class. classes: class folders, all without any."""

    val_share: float | None = None
    val_images: int | None = None
    shots: int | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.val_share is not None and not 0 <= self.val_share < 1:
            raise ValueError(f"--val-share: expected a share in [0, 1), got {self.val_share}")
        if self.val_share is not None and self.val_images is not None:
            raise ValueError("--val-share and --val-images: give one of them")


class TrainingData(NamedTuple):
    """Loaders of one run; class_folders are the folder names behind class_names (the prompts' names). fingerprint: of all
    images (see ImageSource). path: of those to train on. summary: lines that say what will be trained on."""

    train: AnyLoader
    validation: AnyLoader | None
    class_names: tuple[str, ...]
    class_folders: tuple[str, ...]
    fingerprint: str = ""
    path: str | None = None
    summary: tuple[str, ...] = ()


class EvaluationSet(NamedTuple):
    """labels: int64 (M,) of all images, indices into class_folders. groups: int64 (K,), for each logit of the model the label
    for which it is right, or -1 where it does not count."""

    loader: AnyLoader
    labels: Tensor
    class_folders: tuple[str, ...]
    groups: Tensor


def training_sources(data: str, subset: DataSubset, *, seed: int) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images of a data set.

    Args:
        data: a folder or shards, perhaps with splits inside.
        subset: classes, images per class and held-out images.
        seed: of what is held out and of the images per class.

    Returns:
        Both sources; None without validation images.

    Raises:
        ValueError: for data that cannot be used and for validation classes without training images.
    """
    train_location, val_location = training_locations(data)
    train = open_source(train_location)
    if subset.classes:
        train = of_classes(train, subset.classes)
    held_out: ImageSource | None = None
    if subset.val_images is not None:
        train, held_out = hold_out_images(train, subset.val_images, seed=seed)
    elif subset.val_share is None and val_location is not None:
        held_out = open_source(val_location)
        if subset.classes:
            held_out = of_classes(held_out, [name for name in train.folders if name in held_out.folders])
        held_out = labelled_by(held_out, train.folders)
    else:
        share = DEFAULT_VAL_SHARE if subset.val_share is None else subset.val_share
        if share:
            train, held_out = hold_out(train, share=share, seed=seed)
    if subset.shots is not None:
        train = few_shot(train, subset.shots, seed=seed)
    return train, held_out


def names_of(file: Path | None, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Class names for the prompts: of the file, else CLIP's for wnid folders, else the folder names."""
    return (imagenet_names(folders) if file is None else None) or read_class_names(file, folders)


def open_training(
    data: str,
    *,
    image_size: int,
    batch_size: int | Callable[[int], int],
    seed: int,
    subset: DataSubset,
    augment: Augment,
    class_names: Path | None,
    loader_config: LoaderConfig,
) -> TrainingData:
    """Training and validation loaders of a data set.

    Args:
        data: `texture-digits`, a folder or shards.
        image_size: of the model, pixels.
        batch_size: training images per step and process, perhaps as a function of the number of training images.
        seed: of order, augmentation and held-out images.
        subset: classes, images per class and held-out images.
        augment: augmentation of the training images.
        class_names: file of names for prompts; None takes those of the folders.
        loader_config: loader, workers, device and processes.

    Returns:
        The loaders and what is known of the classes.

    Raises:
        ValueError: for data that cannot be used.
    """
    if data == BENCHMARK:
        _refuse_other_size(image_size)
        if augment != Augment() or subset != DataSubset():
            raise ValueError(f"{BENCHMARK} is used as it is: no augmentation, few-shot, class or validation options")
        train, validation = training_splits(
            seed, batch_size=_of_images(batch_size, TRAIN_IMAGES), rank=loader_config.rank, world_size=loader_config.world_size
        )
        return TrainingData(train, validation, CLASS_NAMES, CLASS_NAMES)
    images, held_out = training_sources(data, subset, seed=seed)
    names = names_of(class_names, images.folders)
    transform = Transform(size=image_size, augment=augment, seed=seed)
    own_batch = _of_images(batch_size, len(images))
    loader = loader_config.build(images, transform, batch_size=own_batch, shuffle=True, seed=seed)
    validation_loader = None
    if held_out is not None:
        validation_loader = loader_config.build(held_out, Transform(size=image_size), batch_size=EVALUATION_BATCH)
    return TrainingData(
        loader, validation_loader, names, images.folders,
        fingerprint=" ".join(one.fingerprint() for one in (images, held_out) if one is not None),
        path=os.path.realpath(images.where), summary=summary(data, images, held_out, names),
    )  # fmt: skip


def _of_images(batch_size: int | Callable[[int], int], images: int) -> int:
    return batch_size if isinstance(batch_size, int) else batch_size(images)


def open_evaluation(
    data: Sequence[str],
    *,
    image_size: int,
    class_folders: Sequence[str],
    loader_config: LoaderConfig,
    allow_incomplete: bool = False,
) -> dict[str, EvaluationSet]:
    """Open evaluation sets.

    Args:
        data: each `texture-digits` (its ID set and shifts), an image folder or shards, NAME=FOLDER for a set of ImageNet's
            family, or a folder that is such a set or holds several.
        image_size: of the model, pixels.
        class_folders: the classes of the model, to which its logits refer.
        loader_config: loader, workers, device and processes.
        allow_incomplete: accept a set of ImageNet's family from which classes or images are missing.

    Returns:
        Evaluation sets by name, in the order given.

    Raises:
        ValueError: for data that cannot be used, classes that the model does not have, a set given twice and an incomplete set.
    """
    sets: dict[str, EvaluationSet] = {}
    for one in data:
        added = _open_one(one, image_size, tuple(class_folders), loader_config, allow_incomplete=allow_incomplete)
        twice = [name for name in added if name in sets]
        if twice:
            raise ValueError(f"--data: {twice[0]} is given twice")
        sets |= added
    return sets


def _open_one(
    data: str, image_size: int, folders: tuple[str, ...], loader_config: LoaderConfig, *, allow_incomplete: bool
) -> dict[str, EvaluationSet]:
    if data == BENCHMARK:
        return open_benchmark(tuple(evaluation_specifications()), image_size, folders, loader_config)
    own_name, folder = named_set(data)
    if own_name:
        found = _open_one(folder, image_size, folders, loader_config, allow_incomplete=allow_incomplete)
        return {own_name if len(found) == 1 else f"{own_name}-{name}": one for name, one in found.items()}
    known = _known_sets(data)
    if known:
        return {
            name: _open_known(name, folder, image_size, folders, loader_config, allow_incomplete)
            for name, folder in known.items()
        }
    images = labelled_by(open_source(evaluation_location(data)), folders)
    loader = loader_config.build(images, Transform(size=image_size), batch_size=EVALUATION_BATCH)
    return {images.where: EvaluationSet(loader, images.labels, folders, torch.arange(len(folders)))}


def open_benchmark(
    names: Sequence[str], image_size: int, class_folders: Sequence[str], loader_config: LoaderConfig
) -> dict[str, EvaluationSet]:
    """Some of the benchmark's evaluation sets; only these are rendered.

    Args:
        names: keys of `evaluation_specifications`.
        image_size: of the model, pixels.
        class_folders: the classes of the model.
        loader_config: processes that share the images.

    Returns:
        The sets by name.

    Raises:
        ValueError: the model takes other images or has other classes.
    """
    _refuse_other_size(image_size)
    if tuple(class_folders) != CLASS_NAMES:
        raise ValueError(f"{BENCHMARK} has the classes {', '.join(CLASS_NAMES)}; this model has others")
    return {
        name: EvaluationSet(
            _benchmark_loader(name, loader_config), rendered(evaluation_specifications()[name])[1], CLASS_NAMES,
            torch.arange(len(CLASS_NAMES)),
        )
        for name in names
    }  # fmt: skip


def named_set(data: str) -> tuple[str, str]:
    """The name and the folder of NAME=FOLDER; no name for a set of ImageNet's family and for a path that exists."""
    name, given, folder = data.partition("=")
    if not given or not name or name in KNOWN or "/" in name or Path(data).exists():
        return "", data
    return name, folder


def _known_sets(data: str) -> dict[str, Path]:
    name, given, folder = data.partition("=")
    if given and name in KNOWN:
        if not Path(folder).is_dir():
            raise ValueError(f"--data {data}: no folder at {folder}")
        return {name: Path(folder)}
    return find_sets(Path(data))


def _open_known(
    name: str,
    folder: Path,
    image_size: int,
    model_folders: tuple[str, ...],
    loader_config: LoaderConfig,
    allow_incomplete: bool,
) -> EvaluationSet:
    found = open_known(name, folder, model_folders)
    if found.lacking and not allow_incomplete:
        raise ValueError(f"{found.lacking}: fetch the whole set again, or pass --allow-incomplete")
    transform = Transform(size=image_size, border=found.border)
    loader = loader_config.build(found.images, transform, batch_size=EVALUATION_BATCH)
    return EvaluationSet(loader, found.images.labels, found.images.folders, found.groups)


def _benchmark_loader(name: str, loader_config: LoaderConfig) -> ArrayLoader:
    images, labels = rendered(evaluation_specifications()[name])
    return ArrayLoader(images, labels, loader_config.sampler(len(images), BENCHMARK_BATCH))


def folders_of(data: Sequence[str]) -> tuple[str, ...]:
    """The classes of a zero-shot model for `data`: ImageNet's 1000 where a set of its family is among them, else those of the
    first."""
    data = [named_set(one)[1] for one in data]
    if any(_known_sets(one) for one in data if one != BENCHMARK):
        return wnids()
    if data[0] == BENCHMARK:
        return CLASS_NAMES
    return open_source(evaluation_location(data[0])).folders


def _refuse_other_size(image_size: int) -> None:
    if image_size != IMAGE_SIZE:
        raise ValueError(f"{BENCHMARK} has images of {IMAGE_SIZE} pixels for --arch tiny; this model takes {image_size}")


def preview_rows(data: str, *, seed: int, columns: int = 12, classes: int = 24) -> dict[str, Tensor]:
    """Images for a contact sheet.

    Args:
        data: `texture-digits`, a folder or shards.
        seed: of the images of the benchmark.
        columns: images per row.
        classes: rows of a folder or shards, at most.

    Returns:
        uint8 (columns, H, W, 3) by split of the benchmark or class of a folder. An image that cannot be read is black.

    Raises:
        ValueError: for data that cannot be used.
    """
    if data == BENCHMARK:
        train, _ = training_splits(seed, batch_size=columns)
        sets = {name: rendered(split)[0] for name, split in evaluation_specifications().items()}
        return {name: images[:columns] for name, images in {"train": train.images, **sets}.items()}
    images, _ = training_sources(data, DataSubset(val_share=0), seed=seed)
    rows = {}
    for label, name in enumerate(images.folders[:classes]):
        chosen = (images.labels == label).nonzero()[:columns, 0].tolist()
        row = torch.full((columns, PREVIEW_SIZE, PREVIEW_SIZE, 3), 255, dtype=torch.uint8)
        for column, index in enumerate(chosen):
            try:
                row[column] = decode(images.read(index), Transform(size=PREVIEW_SIZE))
            except UNREADABLE:
                row[column] = 0
        rows[name] = row
    return rows

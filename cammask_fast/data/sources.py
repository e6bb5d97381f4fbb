"""What `--data` names: the embedded benchmark (`texture-digits`) or an image folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.data.batch import ArrayLoader
from cammask_fast.data.benchmark import evaluation_splits, training_splits
from cammask_fast.data.folder import FolderLoader, decode, evaluation_folder, read_class_names, training_folders
from cammask_fast.data.texture_digits import CLASS_NAMES, IMAGE_SIZE

BENCHMARK = "texture-digits"
EVALUATION_BATCH = 128
PREVIEW_SIZE = 60


class TrainingData(NamedTuple):
    """Loaders of one run; class_folders are the folder names behind class_names (the prompts' names)."""

    train: ArrayLoader | FolderLoader
    validation: ArrayLoader | FolderLoader | None
    class_names: tuple[str, ...]
    class_folders: tuple[str, ...]


class EvaluationSet(NamedTuple):
    """labels: int64 (M,) of all images, indices into class_folders."""

    loader: ArrayLoader | FolderLoader
    labels: Tensor
    class_folders: tuple[str, ...]


def open_training(
    data: str, *, image_size: int, batch_size: int, seed: int, val_share: float, class_names: Path | None, workers: int
) -> TrainingData:
    """Training and validation loaders. Raises ValueError on data that cannot be used."""
    if data == BENCHMARK:
        _refuse_other_size(image_size)
        train, validation = training_splits(seed, batch_size=batch_size)
        return TrainingData(train, validation, CLASS_NAMES, CLASS_NAMES)
    images, held_out = training_folders(Path(data), val_share=val_share, seed=seed)
    names = read_class_names(class_names, images.folders)
    loader = FolderLoader(images, image_size=image_size, batch_size=batch_size, shuffle=True, seed=seed, workers=workers)
    validation_loader = None
    if held_out is not None:
        validation_loader = FolderLoader(held_out, image_size=image_size, batch_size=EVALUATION_BATCH, workers=workers)
    return TrainingData(loader, validation_loader, names, images.folders)


def open_evaluation(
    data: str, *, image_size: int, class_folders: Sequence[str] | None = None, workers: int = 0
) -> dict[str, EvaluationSet]:
    """Evaluation sets by name: the benchmark's ID set and shifts, or the images of a folder.

    class_folders: the classes of the model, to which the labels refer; None: those of the data. Raises ValueError on data that
    cannot be used and on classes that the model does not have.
    """
    if data == BENCHMARK:
        _refuse_other_size(image_size)
        if class_folders is not None and tuple(class_folders) != CLASS_NAMES:
            raise ValueError(f"{BENCHMARK} has the classes {', '.join(CLASS_NAMES)}; this model has others")
        return {name: EvaluationSet(loader, loader.labels, CLASS_NAMES) for name, loader in evaluation_splits().items()}
    images = evaluation_folder(Path(data))
    if class_folders is not None:
        images = images.labelled_by(tuple(class_folders))
    loader = FolderLoader(images, image_size=image_size, batch_size=EVALUATION_BATCH, workers=workers)
    return {str(images.root): EvaluationSet(loader, images.labels, images.folders)}


def _refuse_other_size(image_size: int) -> None:
    if image_size != IMAGE_SIZE:
        raise ValueError(f"{BENCHMARK} has images of {IMAGE_SIZE} pixels for --arch tiny; this model takes {image_size}")


def preview_rows(data: str, *, seed: int, columns: int = 12, classes: int = 24) -> dict[str, Tensor]:
    """Images for a contact sheet, uint8 (columns, H, W, 3) per row: a split of the benchmark, or a class of a folder."""
    if data == BENCHMARK:
        train, _ = training_splits(seed, batch_size=columns)
        loaders = {"train": train, **evaluation_splits()}
        return {name: loader.images[:columns] for name, loader in loaders.items()}
    images, _ = training_folders(Path(data), val_share=0, seed=seed)
    rows = {}
    for label, name in enumerate(images.folders[:classes]):
        chosen = (images.labels == label).nonzero()[:columns, 0].tolist()
        row = torch.full((columns, PREVIEW_SIZE, PREVIEW_SIZE, 3), 255, dtype=torch.uint8)
        for place, index in enumerate(chosen):
            row[place] = decode(images.paths[index], PREVIEW_SIZE)
        rows[name] = row
    return rows

"""The embedded benchmark's splits at the difficulty that ships: one look, correlation and amount of data for all methods."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cammask_fast.data.datasets.texture_digits import Scenes, Split, render, sample_scenes
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader

TRAIN_IMAGES = 1500
VALIDATION_IMAGES = 500
TEST_IMAGES = 2000
CORRELATION = 1.0
"""Probability that a downstream digit stands on its group's background."""
OUTLINED = 0.6
"""Share of downstream digits drawn as half-transparent outlines, which are rare (4 %) on the web."""
OOD_SETS = ("flipped", "unseen", "sketch", "corrupted")
EVALUATION_BATCH = 100  # activations stay in the caches of a CPU core


def training_splits(seed: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[ArrayLoader, ArrayLoader]:
    """The training images (shuffled) and the in-distribution validation images of the benchmark, with disjoint digit scans.

    Args:
        seed: of the images and of the order.
        batch_size: training images per batch and process.
        rank: of this process.
        world_size: number of processes.

    Returns:
        Loaders of the training and the validation images.
    """
    train = Split(
        name="train", images=TRAIN_IMAGES, seed=seed, scans="train", placement="grouped",
        correlation=CORRELATION, outlined=OUTLINED,
    )  # fmt: skip
    validation = Split(
        name="validation", images=VALIDATION_IMAGES, seed=seed, scans="val", placement="grouped",
        correlation=CORRELATION, outlined=OUTLINED,
    )  # fmt: skip
    return (
        _loader(train, batch_size=batch_size, shuffle=True, rank=rank, world_size=world_size),
        _loader(validation, rank=rank, world_size=world_size),
    )


def evaluation_specifications(*, scans: str = "test") -> dict[str, Split]:
    """The ID set and the four shifts. `scans="val"`: other scans and other draws, the sets on which choices are made."""

    def split(name: str, placement: str, correlation: float = 1.0, **style: float | bool) -> Split:
        return Split(
            name=f"{scans}-{name}", images=TEST_IMAGES, seed=1, scans=scans, placement=placement, correlation=correlation,
            outlined=float(style.get("outlined", OUTLINED)), sketched=float(style.get("sketched", 0.0)),
            corrupted=bool(style.get("corrupted", False)),
        )  # fmt: skip

    return {
        "id": split("id", "grouped", CORRELATION),
        "flipped": split("flipped", "flipped"),
        "unseen": split("unseen", "unseen"),
        "sketch": split("sketch", "any", outlined=0.0, sketched=1.0),
        "corrupted": split("corrupted", "grouped", 0.5, corrupted=True),
    }


def evaluation_splits(*, scans: str = "test") -> dict[str, ArrayLoader]:
    """Loaders of `evaluation_specifications`, by name, `id` first."""
    return {name: _loader(split) for name, split in evaluation_specifications(scans=scans).items()}


def _loader(
    split: Split, *, batch_size: int = EVALUATION_BATCH, shuffle: bool = False, rank: int = 0, world_size: int = 1
) -> ArrayLoader:
    images, labels = rendered(split)
    return ArrayLoader(
        images,
        labels,
        ResumableDistributedSampler(
            len(images), batch_size=batch_size, shuffle=shuffle, seed=split.seed, rank=rank, world_size=world_size
        ),
    )


@cache
def rendered(split: Split) -> tuple[Tensor, Tensor]:
    """Images uint8 (M, 48, 48, 3) and labels int64 (M,) of a split, rendered once per process."""
    scenes: Scenes = sample_scenes(split)
    return render(scenes), torch.from_numpy(scenes.labels)

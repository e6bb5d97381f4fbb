"""Parts of a source: held-out images, a few per class, some of the classes, other labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cammask_fast.data.class_names import did_you_mean, match_names, some
from cammask_fast.data.sampler import epoch_order
from cammask_fast.data.types import ImageSource
from cammask_fast.runtime.notices import notice

Source = TypeVar("Source", bound=ImageSource)


def labelled_by(source: Source, folders: Sequence[str]) -> Source:
    """The same images with labels that index `folders`. Raises ValueError for a class that is not among them."""
    matched, unknown = match_names(source.folders, folders)
    if unknown:
        raise ValueError(
            f"{source.where} has class folders outside the {len(folders)} known classes: {some(unknown)}; "
            f"known: {some(tuple(folders))}. Rename or remove them{did_you_mean(unknown, folders)}"
        )
    known = {name: index for index, name in enumerate(folders)}
    new_label = torch.tensor([known[name] for name in matched])
    return source.with_classes(tuple(folders), new_label[source.labels])


def of_classes(source: Source, folders: Sequence[str]) -> Source:
    """The images of the given classes alone, labelled by their order. Raises ValueError for classes without images."""
    matched, missing = match_names(folders, source.folders)
    if missing or not folders:
        raise ValueError(
            f"{source.where} has no class {some(missing)}; it has {some(source.folders)}{did_you_mean(missing, source.folders)}"
        )
    chosen = tuple(dict.fromkeys(matched))
    if len(chosen) < len(matched):
        notice(f"--classes: names that repeat an earlier one: {len(matched) - len(chosen)}")
    new_label = torch.full((len(source.folders),), -1)
    new_label[torch.tensor([source.folders.index(name) for name in chosen])] = torch.arange(len(chosen))
    kept = source.subset((new_label[source.labels] >= 0).nonzero()[:, 0])
    return kept.with_classes(chosen, new_label[kept.labels])


def few_shot(source: Source, shots: int, *, seed: int) -> Source:
    """A few images of every class.

    Args:
        source: images with labels.
        shots: images per class, 1 or more; a class that has fewer keeps all.
        seed: of the draw.

    Returns:
        The chosen images in the source's order.

    Raises:
        ValueError: fewer than one shot.
    """
    if shots < 1:
        raise ValueError(f"--shots: expected 1 or more, got {shots}")
    rank = _rank_within_class(source.labels, seed=seed)
    counts = torch.bincount(source.labels, minlength=len(source.folders)).tolist()
    fewer = [name for name, count in zip(source.folders, counts, strict=True) if count < shots]
    if fewer:
        notice(f"--shots {shots}: classes that have fewer images, and keep them all: {len(fewer)}, {some(fewer)}")
    return source.subset((rank < shots).nonzero()[:, 0])


def hold_out(source: Source, *, share: float, seed: int) -> tuple[Source, Source]:
    """Split off a share of every class, at least one image each and never the last one.

    Args:
        source: images with labels.
        share: of the images of each class, 0 to 1.
        seed: of the draw.

    Returns:
        The rest and the held-out images.

    Raises:
        ValueError: a class has a single image.
    """
    counts = torch.bincount(source.labels, minlength=len(source.folders))
    single = [name for name, count in zip(source.folders, counts.tolist(), strict=True) if count == 1]
    if single:
        raise ValueError(
            f"only one image in class {some(single)} of {source.where}, and a validation image must be held out: "
            "add images, give a val/ folder, or pass --val-share 0"
        )
    return _split(source, (share * counts).round().long().clamp(min=1).minimum(counts - 1), seed=seed)


def hold_out_images(source: Source, images: int, *, seed: int) -> tuple[Source, Source]:
    """Split off a number of images in the proportions of the classes (largest remainders), never the last one of a class.

    Args:
        source: images with labels.
        images: how many to hold out.
        seed: of the draw.

    Returns:
        The rest and the held-out images.

    Raises:
        ValueError: the source has too few images.
    """
    counts = torch.bincount(source.labels, minlength=len(source.folders))
    spare = int((counts - 1).clamp(min=0).sum())
    if not 0 < images <= spare:
        raise ValueError(f"--val-images: expected 1 to {spare} of the {len(source)} images of {source.where}, got {images}")
    exact = images * counts.double() / len(source)
    taken = exact.floor().long()  # below `counts` in every class that has images, as `images` is below their number
    remainder = exact - taken
    while (short := images - int(taken.sum())) > 0:
        open_classes = taken < counts - 1
        best = torch.where(open_classes, remainder, -torch.inf).argsort(descending=True, stable=True)
        chosen = best[: min(short, int(open_classes.sum()))]
        taken[chosen] += 1
        remainder[chosen] -= 1
    return _split(source, taken, seed=seed)


def _split(source: Source, taken: Tensor, *, seed: int) -> tuple[Source, Source]:
    held = _rank_within_class(source.labels, seed=seed) < taken[source.labels]
    return source.subset((~held).nonzero()[:, 0]), source.subset(held.nonzero()[:, 0])


def _rank_within_class(labels: Tensor, *, seed: int) -> Tensor:
    """For every image its rank among those of its class in a shuffled order, int64 (M,)."""
    order = epoch_order(len(labels), seed=seed, epoch=0)
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels)
    first = (counts.cumsum(0) - counts)[labels[by_class]]
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first
    return rank

"""What a training is about to use, on less than a screen."""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote

import torch

from cammask_fast.data.class_names import some
from cammask_fast.data.types import ImageSource

NEARLY_EMPTY = 5
"""Classes with fewer images are pointed out."""
SHOWN = 8


def summary(data: str, train: ImageSource, held_out: ImageSource | None, names: Sequence[str]) -> tuple[str, ...]:
    """Describe a training set from the names of its files alone: counts, names in prompts, classes with few images.

    Args:
        data: as given on the command line.
        train: training images.
        held_out: validation images, or None.
        names: class names in prompts, in the order of the folders.

    Returns:
        Lines to print.
    """
    counts = torch.bincount(train.labels, minlength=len(train.folders)).tolist()
    shown = [
        f"{folder} {count}" if folder == name else f"{folder} ({name!r}) {count}"
        for folder, name, count in zip(train.folders, names, counts, strict=True)
    ]
    lines = [
        f"{train.where}: {len(train)} training images, {len(train.folders)} classes of {min(counts)} to {max(counts)}",
        f"  classes: {some(shown, SHOWN)}",
    ]
    if held_out is None:
        lines.append("  no validation images: the last weights are the best")
    else:
        origin = "held out of them" if held_out.where == train.where else held_out.where
        lines.append(f"  {len(held_out)} validation images, {origin}")
    few = [folder for folder, count in zip(train.folders, counts, strict=True) if count < NEARLY_EMPTY]
    if few:
        lines.append(f"  classes with fewer than {NEARLY_EMPTY} images: {len(few)}, {some(few)}")
    lines.append(f"  `cammask data check {quote(data)}` reads every image and looks for damage, duplicates and leaks")
    return tuple(lines)

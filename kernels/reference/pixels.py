"""What the references of `normalise`, `masked_fill` and `counterfactual_batch` share: constants and shapes of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LAYOUTS = ("nchw", "patches")


def normalised_colour(constant: Sequence[float] | None) -> tuple[float, float, float]:
    """An RGB colour in [0, 1] after normalisation; None is CLIP's mean, exactly 0."""
    if constant is None:
        return 0.0, 0.0, 0.0
    red, green, blue = ((value - mean) / std for value, mean, std in zip(constant, CLIP_MEAN, CLIP_STD, strict=True))
    return red, green, blue


def image_size(images: Tensor) -> tuple[int, int, int]:
    """(N, H, W) of uint8 (N, H, W, 3) or float (N, 3, H, W) images. Raises ValueError on anything else."""
    if images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images: expected uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        return images.shape[0], images.shape[1], images.shape[2]
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected float (N, 3, H, W) or uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    return images.shape[0], images.shape[2], images.shape[3]


def grid_of(patches: int, side: int) -> int:
    """Patches per side. Raises ValueError where they are no square grid whose patches divide the image."""
    grid = 1
    while grid * grid < patches:  # not math.isqrt, which torch.compile cannot trace on a symbolic size
        grid += 1
    if grid * grid != patches or side % grid:
        raise ValueError(f"{patches} patches are no square grid that divides an image of {side} pixels")
    return grid

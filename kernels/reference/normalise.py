"""CLIP's pixel normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .pixels import CLIP_MEAN, CLIP_STD, LAYOUTS, image_size


def normalise(
    images: Tensor, *, dtype: torch.dtype = torch.float32, layout: str = "nchw", patch_size: int | None = None
) -> Tensor:
    """(x - mean) / std with CLIP's constants.

    Args:
        images: uint8 (N, H, W, 3), or float (N, 3, H, W) in [0, 1].
        dtype: of the result, any float dtype.
        layout: `nchw`, or `patches`: row-major patches of a square image, each flattened in the order channel, y, x.
        patch_size: pixels per side of a patch, p; needed for `patches`.

    Returns:
        (N, 3, H, W), or (N, P, 3 * p * p).

    Raises:
        ValueError: for other shapes and layouts, and where patch_size does not divide the image.
    """
    _, height, width = image_size(images)
    size = _checked_patch_size(layout, patch_size, height, width)
    planes = images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
    if layout == "patches":
        assert size is not None
        planes = planes.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)  # (N, G, G, 3, p, p)
    mean = torch.tensor(CLIP_MEAN, dtype=dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, dtype=dtype, device=images.device).view(3, 1, 1)
    if images.dtype == torch.uint8:
        pixels = planes.contiguous().to(dtype).div_(255).sub_(mean).div_(std)  # bytes are moved before they grow
    else:
        pixels = ((planes.to(dtype) - mean) / std).contiguous()
    return pixels.flatten(3).flatten(1, 2).flatten(2) if layout == "patches" else pixels


def _checked_patch_size(layout: str, patch_size: int | None, height: int, width: int) -> int | None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "patches":
        if patch_size is None:
            raise ValueError("patch_size: layout 'patches' needs it")
        if height != width:
            raise ValueError(f"images: expected square images for patches, got {height} x {width} pixels")
        if patch_size < 1 or height % patch_size:
            raise ValueError(f"patch_size: expected a divisor of the image side {height}, got {patch_size}")
    return patch_size

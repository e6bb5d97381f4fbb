"""Masked fill in plain PyTorch: up-sample the patch mask, take masked pixels from donors, normalise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(x - mean) / std with CLIP's constants.

    images: uint8 (N, H, W, 3), or float (N, 3, H, W) in [0, 1]. Returns `dtype` (N, 3, H, W).
    """
    if images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 (N, H, W, 3), got {tuple(images.shape)}")
        images = images.permute(0, 3, 1, 2).to(dtype, memory_format=torch.contiguous_format) / 255
    elif images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected float (N, 3, H, W), got {tuple(images.shape)}")
    mean = torch.tensor(CLIP_MEAN, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    return (images.to(dtype) - mean) / std


def upsample_nearest(mask_NP: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """Patch values (N, P), row-major, to pixels (N, grid * patch_size, grid * patch_size)."""
    count = len(mask_NP)
    pixels = mask_NP.view(count, grid, 1, grid, 1).expand(count, grid, patch_size, grid, patch_size)
    return pixels.reshape(count, grid * patch_size, grid * patch_size)


def upsample_bilinear(relevance_NP: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """Normalised relevance (N, P) to pixels (N, H, W); align_corners=False, edges clamped."""
    side = grid * patch_size
    maps = relevance_NP.view(-1, 1, grid, grid)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def masked_fill(images: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    """Fill masked pixels from other images of the batch.

    images: uint8 (N, H, W, 3) or float (N, 3, H, W). mask: bool (N, P), row-major patches, or (N, H, W), pixels; True = filled.
    donors: int64 (N,), one donor image per image (single-fill), or (N, P), one per patch (multi-fill), each in 0..N-1.
    Returns images' dtype and shape: at every pixel the image itself or its donor. Raises ValueError on wrong shapes.
    METHOD: paper section 3.3 (single-fill, multi-fill).
    """
    channels_last = images.dtype == torch.uint8
    if images.ndim != 4 or images.shape[3 if channels_last else 1] != 3:
        expected = "uint8 (N, H, W, 3)" if channels_last else "float (N, 3, H, W)"
        raise ValueError(f"images: expected {expected}, got {images.dtype} {tuple(images.shape)}")
    count = len(images)
    side = images.shape[2]
    if mask.dtype != torch.bool or len(mask) != count:
        raise ValueError(f"mask: expected bool with {count} rows, got {mask.dtype} {tuple(mask.shape)}")
    if donors.dtype != torch.int64 or donors.ndim not in (1, 2) or len(donors) != count:
        raise ValueError(f"donors: expected int64 ({count},) or ({count}, P), got {donors.dtype} {tuple(donors.shape)}")
    if mask.ndim == 2:
        mask = upsample_nearest(mask, grid=_grid(mask.shape[1], side), patch_size=side // _grid(mask.shape[1], side))
    if mask.shape != (count, side, side):
        raise ValueError(f"mask: expected (N, P) or ({count}, {side}, {side}), got {tuple(mask.shape)}")
    if donors.ndim == 1:
        filling = images[donors]
    else:
        grid = _grid(donors.shape[1], side)
        blocks = _patch_view(images, grid, channels_last)  # (N, G, p, G, p, 3) or (N, 3, G, p, G, p)
        rows, columns = torch.arange(grid, device=images.device).view(-1, 1), torch.arange(grid, device=images.device)
        donors = donors.view(count, grid, grid)
        if channels_last:  # advanced indices at 0, 1, 3 are gathered in front: (N, G, G, p, p, 3)
            filling = blocks[donors, rows, :, columns].permute(0, 1, 3, 2, 4, 5).reshape(images.shape)
        else:  # (N, G, G, 3, p, p)
            filling = blocks[donors, :, rows, :, columns].permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    return torch.where(mask.unsqueeze(3 if channels_last else 1), filling, images)


def _grid(patches: int, side: int) -> int:
    grid = math.isqrt(patches)
    if grid * grid != patches or side % grid:
        raise ValueError(f"{patches} patches are no square grid that divides an image of {side} pixels")
    return grid


def _patch_view(images: Tensor, grid: int, channels_last: bool) -> Tensor:
    size = images.shape[2] // grid
    if channels_last:
        return images.reshape(len(images), grid, size, grid, size, images.shape[3])
    return images.reshape(len(images), images.shape[1], grid, size, grid, size)

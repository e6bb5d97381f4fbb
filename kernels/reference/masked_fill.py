"""Masked fill in plain PyTorch: take masked pixels from donors, normalise, cut into patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .normalise import normalise
from .pixels import grid_of, image_size, normalised_colour


def fill_pixels(images: Tensor, mask: Tensor, donors: Tensor, *, first: Tensor | None = None) -> Tensor:
    """Fill masked pixels from other images of the batch. Source: paper section 3.3 (single-fill, multi-fill).

    Args:
        images: uint8 (M, H, W, 3) or float (M, 3, H, W), H = W.
        mask: bool (N, P), row-major patches, or (N, H, W), pixels; True = filled.
        donors: int64 (N,), one donor image per image (single-fill), or (N, P), one per patch (multi-fill), each in 0..M-1.
        first: int64 (): row n of mask, donors and result belongs to images[first + n], the other images only donate; without
            it, N = M.

    Returns:
        N images in the layout and dtype of `images`: every pixel is that of the image itself or of its donor.

    Raises:
        ValueError: for wrong shapes or dtypes, and on a CPU for a donor or first outside the batch.
    """
    channels_last = images.dtype == torch.uint8
    every, height, side = image_size(images)
    count = len(mask)
    if height != side:
        raise ValueError(f"images: expected square images, got {height} x {side} pixels")
    if mask.dtype != torch.bool or (first is None and count != every):
        raise ValueError(f"mask: expected bool with {every} rows, got {mask.dtype} {tuple(mask.shape)}")
    if donors.dtype != torch.int64 or donors.ndim not in (1, 2) or len(donors) != count:
        raise ValueError(f"donors: expected int64 ({count},) or ({count}, P), got {donors.dtype} {tuple(donors.shape)}")
    if mask.shape not in ((count, side, side), (count, mask.shape[1])):
        raise ValueError(f"mask: expected (N, P) or ({count}, {side}, {side}), got {tuple(mask.shape)}")
    if donors.device.type == "cpu" and count and not (donors.min() >= 0 and donors.max() < every):
        raise ValueError(f"donors: expected indices in 0..{every - 1}, got {donors.min()}..{donors.max()}")
    over_patches = mask.ndim == 2
    grid = grid_of(mask.shape[1], side) if over_patches else grid_of(donors.shape[1], side) if donors.ndim == 2 else 1
    size = side // grid
    if donors.ndim == 2 and donors.shape[1] != grid * grid:
        raise ValueError(f"donors: expected int64 ({count}, {grid * grid}) to match the mask, got {tuple(donors.shape)}")
    if channels_last:
        pixels = images.contiguous().view(every, grid, size, grid, size * 3)
        if over_patches:
            pixels = pixels.view(_widest_words(size * 3))  # (N, G, p, G, words): a row of a patch at a time
    else:
        pixels = images.reshape(every, 3, grid, size, grid, size)
    if donors.ndim == 1:
        filling = pixels[donors]
    else:
        rows, columns = torch.arange(grid, device=images.device).view(-1, 1), torch.arange(grid, device=images.device)
        donors = donors.reshape(count, grid, grid)
        if channels_last:  # advanced indices at 0, 1, 3 are gathered in front: (N, G, G, p, words)
            filling = pixels[donors, rows, :, columns].permute(0, 1, 3, 2, 4)
        else:  # (N, G, G, 3, p, p)
            filling = pixels[donors, :, rows, :, columns].permute(0, 3, 1, 4, 2, 5)
    pixels = _own(pixels, first, count)
    shape = (count, *images.shape[1:])
    if not over_patches:
        return torch.where(mask.unsqueeze(3 if channels_last else 1), filling.reshape(shape), pixels.view(shape))
    if channels_last:
        filled = torch.where(mask.reshape(count, grid, 1, grid, 1), filling, pixels).view(torch.uint8)
    else:
        filled = torch.where(mask.reshape(count, 1, grid, 1, grid, 1), filling, pixels)
    return filled.contiguous().view(shape)


masked_fill = fill_pixels


def _own(pixels: Tensor, first: Tensor | None, count: int) -> Tensor:
    """The `count` images from `first` on: a view on a CPU, elsewhere a copy, for no host knows where they start."""
    if first is None:
        return pixels
    if pixels.device.type != "cpu":
        return pixels[first + torch.arange(count, device=pixels.device)]
    start = int(first)
    if not 0 <= start <= len(pixels) - count:
        raise ValueError(f"first: expected 0..{len(pixels) - count} for {count} of {len(pixels)} images, got {start}")
    return pixels[start : start + count]


def normalised_fill(
    images: Tensor,
    mask: Tensor,
    donors: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    constant: Sequence[float] | None = None,
    patch_size: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Fill and normalise: normalise(fill_pixels(...)), or without donors a constant colour at masked pixels.

    Args:
        images: as for `fill_pixels`.
        mask: as for `fill_pixels`.
        donors: as for `fill_pixels`; None fills with `constant`.
        dtype: of the result.
        layout: of the result, `nchw` or `patches`.
        constant: RGB in [0, 1], None for CLIP's mean.
        patch_size: pixels per side of a patch; needed only where the mask is over pixels.
        first: as for `fill_pixels`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p), as `normalise`.
    """
    count, side = len(mask), image_size(images)[2]
    if mask.ndim == 2:
        patch_size = side // grid_of(mask.shape[1], side)
    if donors is not None:
        return normalise(fill_pixels(images, mask, donors, first=first), dtype=dtype, layout=layout, patch_size=patch_size)
    assert patch_size is not None
    grid = side // patch_size
    if mask.ndim == 2:
        mask = mask.reshape(count, 1, grid, 1, grid, 1)
    else:
        mask = mask.reshape(count, 1, grid, patch_size, grid, patch_size)
    pixels = normalise(_own(images, first, count), dtype=dtype, layout=layout, patch_size=patch_size)
    colour = torch.tensor(normalised_colour(constant), dtype=dtype, device=images.device)
    if layout == "patches":
        mask, colour = mask.permute(0, 2, 4, 1, 3, 5), colour.view(3, 1, 1)
        blocks = pixels.view(count, grid, grid, 3, patch_size, patch_size)
    else:
        blocks, colour = pixels.view(count, 3, grid, patch_size, grid, patch_size), colour.view(3, 1, 1, 1, 1)
    return torch.where(mask, colour, blocks).view(pixels.shape)


def _widest_words(length: int) -> torch.dtype:
    """The widest integer dtype that a row of `length` bytes is made of."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if length % dtype.itemsize == 0:
            return dtype
    return torch.uint8

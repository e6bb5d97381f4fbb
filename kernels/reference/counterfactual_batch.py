"""Selection, fill and normalisation in plain PyTorch, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked_fill import normalised_fill
from .patch_select import highest, normalise_relevance, patch_select
from .pixels import grid_of, image_size


def upsample_nearest(mask_NP: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """Repeat the values of patches over their pixels.

    Args:
        mask_NP: (N, P), row-major.
        grid: patches per side, G.
        patch_size: pixels per side of a patch, p.

    Returns:
        (N, G * p, G * p).
    """
    count = len(mask_NP)
    pixels = mask_NP.reshape(count, grid, 1, grid, 1).expand(count, grid, patch_size, grid, patch_size)
    return pixels.reshape(count, grid * patch_size, grid * patch_size)


def upsample_bilinear(relevance_NP: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """Interpolate a normalised map to pixels; align_corners=False, edges clamped.

    Args:
        relevance_NP: float (N, P), row-major.
        grid: patches per side, G.
        patch_size: pixels per side of a patch, p.

    Returns:
        (N, G * p, G * p).
    """
    side = grid * patch_size
    maps = relevance_NP.reshape(-1, 1, grid, grid)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def top_pixels(relevance_NP: Tensor, top_k: int, *, grid: int, patch_size: int) -> Tensor:
    """The pixels of the highest interpolated relevance, as many as top_k patches have; ties go to the lower row-major index.

    The map is interpolated as a + w (b - a) along rows and then columns, align_corners=False, edges clamped, so that pixels
    between equal patches are equal to the last bit.

    Args:
        relevance_NP: float (N, P), the raw map, row-major.
        top_k: in 1..P.
        grid: patches per side, G.
        patch_size: pixels per side of a patch, p.

    Returns:
        bool (N, G * p, G * p), top_k * p * p of every image True. In a map with a NaN all pixels tie.
    """
    maps = relevance_NP.reshape(-1, grid, grid)
    inside = torch.arange(grid * patch_size, device=maps.device) % patch_size
    before = (torch.arange(grid * patch_size, device=maps.device) // patch_size) - (2 * inside + 1 < patch_size).int()
    position = (inside.to(maps.dtype) + 0.5) / patch_size
    weight = torch.where(2 * inside + 1 < patch_size, position + 0.5, position - 0.5)
    first, second = before.clamp(min=0), (before + 1).clamp(max=grid - 1)
    rows = maps[:, :, first] + weight * (maps[:, :, second] - maps[:, :, first])  # (N, G, W)
    pixels = rows[:, first] + weight[:, None] * (rows[:, second] - rows[:, first])
    normalised = pixels.flatten(1) / (relevance_NP.amax(1, keepdim=True) + 1e-8)
    return highest(normalised, top_k * patch_size**2).view_as(pixels)


def counterfactual_batch(
    images: Tensor,
    relevance_NP: Tensor,
    donors: Tensor | None,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    context: bool = False,
    upsample: str = "nearest",
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    constant: Sequence[float] | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """The counterfactual of a batch from the raw relevance map: select patches, fill them, normalise pixels.

    Args:
        images: as for `fill_pixels`.
        relevance_NP: float (N, P), not normalised.
        donors: as for `fill_pixels`; None fills with `constant`.
        threshold: as for `patch_select`.
        top_k: as for `patch_select`.
        context: as for `patch_select`.
        upsample: `nearest`, or `bilinear`: the map is interpolated to pixels before it is compared with the threshold, or
            before the top_k * p * p highest pixels are chosen.
        dtype: of the result.
        layout: of the result, `nchw` or `patches`.
        constant: RGB in [0, 1], None for CLIP's mean.
        first: as for `fill_pixels`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p), as `normalise`.
    """
    side = image_size(images)[2]
    grid = grid_of(relevance_NP.shape[1], side)
    size = side // grid
    if upsample == "bilinear" and top_k is not None:
        mask = top_pixels(relevance_NP, top_k, grid=grid, patch_size=size) ^ context
    elif upsample == "bilinear" and threshold is not None:
        pixels = upsample_bilinear(normalise_relevance(relevance_NP), grid=grid, patch_size=size)
        mask = (pixels > threshold) ^ context
    else:
        mask = patch_select(relevance_NP, context=context, threshold=threshold, top_k=top_k).mask
    return normalised_fill(images, mask, donors, dtype=dtype, layout=layout, constant=constant, patch_size=size, first=first)

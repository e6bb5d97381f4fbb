"""Selection, fill and normalisation in plain PyTorch, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked_fill import normalised_fill
from .patch_select import normalise_relevance, patch_select
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
        upsample: `nearest`, or `bilinear`: the normalised map is interpolated to pixels before it is compared with the
            threshold.
        dtype: of the result.
        layout: of the result, `nchw` or `patches`.
        constant: RGB in [0, 1], None for CLIP's mean.
        first: as for `fill_pixels`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p), as `normalise`.

    Raises:
        ValueError: for top_k with bilinear up-sampling.
    """
    side = image_size(images)[2]
    grid = grid_of(relevance_NP.shape[1], side)
    size = side // grid
    if upsample == "bilinear":
        if threshold is None:
            raise ValueError("upsample: bilinear up-sampling takes a threshold, not top_k")
        pixels = upsample_bilinear(normalise_relevance(relevance_NP), grid=grid, patch_size=size)
        mask = (pixels > threshold) ^ context
    else:
        mask = patch_select(relevance_NP, context=context, threshold=threshold, top_k=top_k).mask
    return normalised_fill(images, mask, donors, dtype=dtype, layout=layout, constant=constant, patch_size=size, first=first)

"""The student's counterfactual input in one launch: select patches by relevance, fill them from donors, normalise pixels.

    c = relevance / (max over patches + 1e-8)                              per image
    m = (c > threshold, or c among the top_k highest) xor context          per patch, or per pixel after bilinear up-sampling
                                                                           (there the top_k * p * p highest)
    out[n] = (where(m, images[donor], images[n]) / 255 - mean) / std

Source: paper section 3.3 (masking and filling) and CLIP's pixel normalisation.
Shape letters: `kernels/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import uses_triton
from .launch import Launch, run
from .pixels import (
    check_fill,
    check_first,
    check_grid,
    check_output,
    check_square,
    empty_for,
    pixels_ineligible,
    plan_pixels,
)
from .reference.counterfactual_batch import counterfactual_batch as reference_counterfactual_batch
from .reference.pixels import grid_of, image_size
from .top_pixels import plan_top_pixels

OPTIONS = ("threshold", "top_k", "context", "upsample", "dtype", "layout", "constant", "first")
"""Of the operator, in the order of its schema; they are described at `counterfactual_batch`."""


def plan_counterfactual_batch(
    out: Tensor,
    images: Tensor,
    relevance: Tensor,
    donors: Tensor | None,
    *,
    threshold: float | None = None,
    upsample: str = "nearest",
    layout: str = "nchw",
    **options: Any,
) -> list[Launch]:
    """One launch that writes `counterfactual_batch` into out.

    Args:
        out: the result, `empty_for`.
        images: uint8 (M, H, W, 3) or float (M, 3, H, W).
        relevance: float32 (N, P), the raw map.
        donors: int64 (N,), (N, P) or None.
        threshold: of the object mask; None for top_k.
        upsample: `nearest` or `bilinear`.
        layout: of the result, `nchw` or `patches`.
        **options: top_k, context, constant and first, as for `counterfactual_batch`.

    Returns:
        A list of one launch.
    """
    grid = grid_of(relevance.shape[1], image_size(images)[2])
    if upsample == "bilinear" and threshold is None:
        return [plan_top_pixels(out, images, grid=grid, selector=relevance, donors=donors, layout=layout, **options)]
    select = "top_k" if threshold is None else "bilinear" if upsample == "bilinear" else "threshold"
    shape: dict[str, Any] = {"layout": layout, "grid": (grid, grid)}
    return [plan_pixels(out, images, **shape, select=select, selector=relevance, donors=donors, threshold=threshold, **options)]


def launch_counterfactual_batch(
    images: Tensor, relevance: Tensor, donors: Tensor | None, *, dtype: torch.dtype, layout: str, **options: Any
) -> Tensor:
    """Run the kernel. Arguments are those of `counterfactual_batch`, already checked.

    Args:
        images: uint8 (M, H, W, 3) or float (M, 3, H, W).
        relevance: float32 (N, P), the raw map.
        donors: int64 (N,), (N, P) or None.
        dtype: of the result.
        layout: of the result, `nchw` or `patches`.
        **options: the others of `OPTIONS`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p).
    """
    out = empty_for(relevance, images, dtype, layout)
    run(plan_counterfactual_batch(out, images, relevance, donors, layout=layout, **options))
    return out


@torch.library.custom_op(
    "cammask::counterfactual_batch",
    mutates_args=(),
    schema="(Tensor images, Tensor relevance, Tensor? donors, float? threshold, int? top_k, bool context, str upsample, "
    "ScalarType dtype, str layout, float[]? constant, Tensor? first=None) -> Tensor",
)
def _counterfactual_batch(images: Tensor, relevance: Tensor, donors: Tensor | None, *given: Any) -> Tensor:
    options = dict(zip(OPTIONS, given, strict=False))
    if uses_triton("counterfactual_batch", images.device, pixels_ineligible(images, options["dtype"], relevance)):
        return launch_counterfactual_batch(images, relevance, donors, **options)
    return reference_counterfactual_batch(images, relevance, donors, **options)


@_counterfactual_batch.register_fake
def _(images: Tensor, relevance: Tensor, donors: Tensor | None, *given: Any) -> Tensor:
    options = dict(zip(OPTIONS, given, strict=False))
    return empty_for(relevance, images, options["dtype"], options["layout"])


@register_flop_formula(torch.ops.cammask.counterfactual_batch)
def counterfactual_batch_flops(*shapes: Any, **arguments: Any) -> int:
    """No matrix product, which is all that the counter counts."""
    return 0


def counterfactual_batch(
    images: Tensor,
    relevance: Tensor,
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
    """Select patches by their relevance, fill them, normalise pixels, in one launch.

    Args:
        images: uint8 (M, H, W, 3) or float (M, 3, H, W) in [0, 1], H = W.
        relevance: float32 (N, P), the raw map (float64: reference only). In a map with a NaN every c is NaN: no patch is above
            a threshold, all tie in top_k.
        donors: int64 (N,), (N, P) or None, as for `masked_fill`.
        threshold: in [0, 1]; the object mask is c > threshold (strict). Exactly one of threshold and top_k.
        top_k: in 1..P; the object mask is the top_k patches with the highest c, ties to the lower index; with bilinear
            up-sampling the top_k * p * p pixels with the highest.
        context: mask everything else instead.
        upsample: `nearest`, or `bilinear`: c is interpolated to pixels (align_corners=False, edges clamped) before the
            comparison.
        dtype: of the result, as for `normalise`.
        layout: of the result, as for `normalise`.
        constant: as for `masked_fill`.
        first: as for `masked_fill`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p), as `normalise`.

    Raises:
        ValueError: naming the argument, for wrong shapes, dtypes, devices and option values.
    """
    check_output(dtype, layout)
    side = check_square(images)
    count = check_first(first, relevance, images)
    if relevance.ndim != 2 or relevance.dtype not in (torch.float32, torch.float64) or relevance.shape[0] != count:
        raise ValueError(f"relevance: expected float32 ({count}, P), got {relevance.dtype} {tuple(relevance.shape)}")
    check_grid("relevance", relevance, images, side)
    patches = relevance.shape[1]
    if (threshold is None) == (top_k is None):
        raise ValueError("threshold, top_k: give exactly one of them")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a value in [0, 1], got {threshold}")
    if top_k is not None and not 1 <= top_k <= patches:
        raise ValueError(f"top_k: expected 1..{patches} patches, got {top_k}")
    if upsample not in ("nearest", "bilinear"):
        raise ValueError(f"upsample: expected nearest or bilinear, got {upsample!r}")
    check_fill(donors, constant, images, relevance)
    return torch.ops.cammask.counterfactual_batch(
        images, relevance, donors, threshold, top_k, context, upsample, dtype, layout, constant, first
    )

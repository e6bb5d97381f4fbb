"""Fill masked patches from donor images, and normalise, in one pass over the pixels.

    out[n] = (where(mask, images[donor], images[n]) / 255 - mean) / std

Source: paper section 3.3 (single-fill, multi-fill) and CLIP's pixel normalisation.
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
from .reference.masked_fill import normalised_fill
from .reference.pixels import grid_of, image_size

OPTIONS = ("dtype", "layout", "constant", "first")
"""Of the operator, in the order of its schema; they are described at `masked_fill`."""


def plan_masked_fill(
    out: Tensor, images: Tensor, mask: Tensor, donors: Tensor | None, *, layout: str = "nchw", **fill: Any
) -> list[Launch]:
    """One launch that writes `masked_fill` into out.

    Args:
        out: the result, `empty_for`.
        images: uint8 (M, H, W, 3) or float (M, 3, H, W).
        mask: bool (N, P).
        donors: int64 (N,), (N, P) or None.
        layout: of the result, `nchw` or `patches`.
        **fill: constant and first, as for `masked_fill`.

    Returns:
        A list of one launch.
    """
    grid = grid_of(mask.shape[1], image_size(images)[2])
    return [plan_pixels(out, images, layout=layout, grid=(grid, grid), select="mask", selector=mask, donors=donors, **fill)]


def launch_masked_fill(
    images: Tensor, mask: Tensor, donors: Tensor | None, *, dtype: torch.dtype, layout: str, **fill: Any
) -> Tensor:
    """Run the kernel. Arguments are those of `masked_fill`, already checked.

    Args:
        images: uint8 (M, H, W, 3) or float (M, 3, H, W).
        mask: bool (N, P).
        donors: int64 (N,), (N, P) or None.
        dtype: of the result.
        layout: of the result, `nchw` or `patches`.
        **fill: constant and first.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p).
    """
    out = empty_for(mask, images, dtype, layout)
    run(plan_masked_fill(out, images, mask, donors, layout=layout, **fill))
    return out


@torch.library.custom_op(
    "cammask::masked_fill",
    mutates_args=(),
    schema="(Tensor images, Tensor mask, Tensor? donors, ScalarType dtype, str layout, float[]? constant, "
    "Tensor? first=None) -> Tensor",
)
def _masked_fill(images: Tensor, mask: Tensor, donors: Tensor | None, *given: Any) -> Tensor:
    options = dict(zip(OPTIONS, given, strict=False))
    if uses_triton("masked_fill", images.device, pixels_ineligible(images, options["dtype"], mask)):
        return launch_masked_fill(images, mask, donors, **options)
    return normalised_fill(images, mask, donors, **options)


@_masked_fill.register_fake
def _(images: Tensor, mask: Tensor, donors: Tensor | None, dtype: torch.dtype, layout: str, *_: Any) -> Tensor:
    return empty_for(mask, images, dtype, layout)


@register_flop_formula(torch.ops.cammask.masked_fill)
def masked_fill_flops(*shapes: Any, **arguments: Any) -> int:
    """No matrix product, which is all that the counter counts."""
    return 0


def masked_fill(
    images: Tensor,
    mask: Tensor,
    donors: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
    constant: Sequence[float] | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Fill masked patches and normalise, in one pass over the pixels.

    Args:
        images: uint8 (M, H, W, 3) or float (M, 3, H, W) in [0, 1], H = W.
        mask: bool (N, P), row-major patches, True = filled.
        donors: int64 (N,), one donor image per image (single-fill), or (N, P), one per patch (multi-fill), each in 0..M-1;
            None: masked patches get the colour `constant`.
        dtype: of the result, as for `normalise`.
        layout: of the result, as for `normalise`.
        constant: RGB in [0, 1], None for CLIP's mean, which is 0 after normalisation.
        first: int64 (), on the device of images: row n of mask, donors and result belongs to images[first + n], and all M
            images can donate (0 <= first <= M - N); without it, N = M.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p), as `normalise`. A donor or first outside the batch gives NaN pixels from the
        kernel, without a synchronisation.

    Raises:
        ValueError: naming the argument, for wrong shapes, dtypes and devices; on a CPU also for a donor or first outside the
            batch.
    """
    check_output(dtype, layout)
    side = check_square(images)
    count = check_first(first, mask, images)
    if mask.ndim != 2 or mask.dtype != torch.bool or mask.shape[0] != count:
        raise ValueError(f"mask: expected bool ({count}, P), got {mask.dtype} {tuple(mask.shape)}")
    check_grid("mask", mask, images, side)
    check_fill(donors, constant, images, mask)
    return torch.ops.cammask.masked_fill(images, mask, donors, dtype, layout, constant, first)

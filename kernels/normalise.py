"""CLIP's pixel normalisation.

    out = (images / 255 - mean) / std      per pixel, as one multiply-add in float32

Source: the mean and std that CLIP was trained with. Shape letters: `kernels/__init__.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import uses_triton
from .launch import Launch, run
from .pixels import check_output, empty_result, pixels_ineligible, plan_pixels
from .reference.normalise import normalise as reference_normalise
from .reference.pixels import image_size


def plan_normalise(out: Tensor, images: Tensor, *, layout: str = "nchw", patch_size: int | None = None) -> list[Launch]:
    """One launch that writes `normalise` into out.

    Args:
        out: the result, `empty_result`.
        images: uint8 (N, H, W, 3) or float (N, 3, H, W).
        layout: of the result, `nchw` or `patches`.
        patch_size: pixels per side of a patch, p; needed for `patches`.

    Returns:
        A list of one launch.
    """
    _, height, width = image_size(images)
    if layout == "patches":
        assert patch_size is not None
        return [plan_pixels(out, images, layout=layout, grid=(height // patch_size, width // patch_size))]
    return [plan_pixels(out, images, layout=layout, grid=(1, 1))]


def launch_normalise(images: Tensor, dtype: torch.dtype, layout: str, patch_size: int | None) -> Tensor:
    """Run the kernel. Arguments are those of `normalise`, already checked.

    Args:
        images: uint8 (N, H, W, 3) or float (N, 3, H, W).
        dtype: of the result.
        layout: of the result, `nchw` or `patches`.
        patch_size: pixels per side of a patch, p; None for `nchw`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p).
    """
    out = empty_result(images, dtype, layout, patch_size)
    run(plan_normalise(out, images, layout=layout, patch_size=patch_size))
    return out


@torch.library.custom_op(
    "cammask::normalise",
    mutates_args=(),
    schema="(Tensor images, ScalarType dtype, str layout, int? patch_size) -> Tensor",
)
def _normalise(images: Tensor, dtype: torch.dtype, layout: str, patch_size: int | None) -> Tensor:
    if uses_triton("normalise", images.device, pixels_ineligible(images, dtype)):
        return launch_normalise(images, dtype, layout, patch_size)
    return reference_normalise(images, dtype=dtype, layout=layout, patch_size=patch_size)


@_normalise.register_fake
def _(images: Tensor, dtype: torch.dtype, layout: str, patch_size: int | None) -> Tensor:
    return empty_result(images, dtype, layout, patch_size)


@register_flop_formula(torch.ops.cammask.normalise)
def normalise_flops(*shapes: Any, **arguments: Any) -> int:
    """No matrix product, which is all that the counter counts."""
    return 0


def normalise(
    images: Tensor, *, dtype: torch.dtype = torch.float32, layout: str = "nchw", patch_size: int | None = None
) -> Tensor:
    """(x - mean) / std with CLIP's constants, in one pass.

    Args:
        images: uint8 (N, H, W, 3), or float (N, 3, H, W) in [0, 1].
        dtype: of the result: float32, float16, bfloat16 or (reference only) float64.
        layout: `nchw`, or `patches`: row-major patches of a square image, each flattened in the order channel, y, x, so that
            patches @ conv.weight.flatten(1).T is a patch embedding.
        patch_size: pixels per side of a patch, p; needed for `patches`.

    Returns:
        (N, 3, H, W), or (N, P, 3 * p * p).

    Raises:
        ValueError: for other shapes, dtypes and layouts, and where patch_size does not divide the image.
    """
    _, height, width = image_size(images)
    check_output(dtype, layout)
    if layout == "patches":
        if patch_size is None:
            raise ValueError("patch_size: layout 'patches' needs it")
        if height != width:
            raise ValueError(f"images: expected square images for patches, got {height} x {width} pixels")
        if patch_size < 1 or height % patch_size:
            raise ValueError(f"patch_size: expected a divisor of the image side {height}, got {patch_size}")
    return torch.ops.cammask.normalise(images, dtype, layout, patch_size)

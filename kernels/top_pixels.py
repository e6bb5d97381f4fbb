"""Bilinear up-sampling with top-k: the k * p * p pixels with the highest interpolated relevance, filled in the same launch.

    c = bilinear(relevance) / (max over patches + 1e-8)                          per pixel
    m = (c among the k p^2 highest of the image, ties to the lower index) xor context
    out[n] = (where(m, images[donor], images[n]) / 255 - mean) / std

One program per image. The lowest c that is chosen is found by bisection over the bits of float32: each step counts the pixels
at or above a value, interpolated anew from the map, which stays in the L1 cache. Where several pixels have that c, the last of
them that is chosen is found the same way. Masks equal the reference's bit for bit: both interpolate as a + w (b - a).
Source: paper section 3.3 (masking and filling); top-k is an addition.
Shape letters: `kernels/__init__.py`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .patch_select import divisor_of, order_key
from .pixels import _bilinear, _store_channel, plan_pixels

BLOCK, WARPS = 1024, 16
"""Pixels that a program looks at together, and its warps."""
TAKEN = ("out_ptr", "images_ptr", "donors_ptr", "first_ptr", "stride_image_n", "stride_image_channel", "stride_image_y",
         "stride_image_x", "stride_select_n", "stride_select_patch", "stride_donors_n", "stride_donors_patch", "count",
         "context", "select_ptr", "fill_red", "fill_green", "fill_blue", "HAS_DONORS", "HAS_PATCH_LAYOUT", "SCALE_RED",
         "SCALE_GREEN", "SCALE_BLUE", "SHIFT_RED", "SHIFT_GREEN", "SHIFT_BLUE", "BLOCK_P")  # fmt: skip
"""Arguments that the pass over the pixels has, too."""


@triton.jit
def _key_of(pixel, row_ptr, stride_patch, divisor, GRID: tl.constexpr, PATCH: tl.constexpr):
    """The order of c at pixels, int32, row-major over the image; those beyond it get that of its last row."""
    y, x = pixel // (GRID * PATCH), pixel % (GRID * PATCH)
    raw = _bilinear(row_ptr, stride_patch, y // PATCH, x // PATCH, y % PATCH, x % PATCH, GRID, GRID, PATCH, PATCH)
    return order_key(tl.div_rn(raw, divisor))


@triton.jit
def _count(
    lowest, last, row_ptr, stride_patch, divisor,
    ONLY_EQUAL: tl.constexpr, GRID: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pixels up to `last` whose key is at least `lowest`, or equals it."""
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, GRID * PATCH * GRID * PATCH, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        key = _key_of(pixel, row_ptr, stride_patch, divisor, GRID, PATCH)
        counts = key == lowest if ONLY_EQUAL else key >= lowest
        found += (counts & (pixel <= last)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["count", "chosen", "context"])
def _top_pixels_fwd_kernel(
    out_ptr, images_ptr, select_ptr, donors_ptr, first_ptr,
    stride_image_n, stride_image_channel, stride_image_y, stride_image_x,
    stride_select_n, stride_select_patch, stride_donors_n, stride_donors_patch,
    count, chosen, context, fill_red, fill_green, fill_blue,
    HAS_DONORS: tl.constexpr, HAS_PATCH_LAYOUT: tl.constexpr, GRID: tl.constexpr, PATCH: tl.constexpr, STEPS: tl.constexpr,
    SCALE_RED: tl.constexpr, SCALE_GREEN: tl.constexpr, SCALE_BLUE: tl.constexpr,
    SHIFT_RED: tl.constexpr, SHIFT_GREEN: tl.constexpr, SHIFT_BLUE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One image: its `chosen` highest pixels. first_ptr and donors as for the pass over the pixels; STEPS: bits of an index."""
    SIDE: tl.constexpr = GRID * PATCH
    image = tl.program_id(0).to(tl.int64)
    row_ptr = select_ptr + image * stride_select_n
    divisor = divisor_of(row_ptr, stride_select_patch, GRID * GRID, BLOCK_P)
    last = tl.full((), SIDE * SIDE - 1, tl.int32)
    low = tl.full((), -2147483648, tl.int64)  # the highest key that `chosen` pixels reach is from low to high
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        reach = _count(middle.to(tl.int32), last, row_ptr, stride_select_patch, divisor, False, GRID, PATCH, BLOCK)
        enough = reach >= chosen
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    lowest = low.to(tl.int32)
    reach = _count(lowest, last, row_ptr, stride_select_patch, divisor, False, GRID, PATCH, BLOCK)
    equal = _count(lowest, last, row_ptr, stride_select_patch, divisor, True, GRID, PATCH, BLOCK)
    wanted = chosen - (reach - equal)  # of those that equal the lowest
    if wanted < equal:
        first_index = tl.full((), 0, tl.int32)
        for _ in range(STEPS):
            middle_index = (first_index + last) >> 1
            found = _count(lowest, middle_index, row_ptr, stride_select_patch, divisor, True, GRID, PATCH, BLOCK)
            first_index = tl.where(found >= wanted, first_index, middle_index + 1)
            last = tl.where(found >= wanted, middle_index, last)

    own = image
    if first_ptr is not None:
        own += tl.load(first_ptr)
    CAN_LOSE: tl.constexpr = HAS_DONORS or first_ptr is not None
    AREA: tl.constexpr = PATCH * PATCH
    STRIDE_CHANNEL: tl.constexpr = AREA if HAS_PATCH_LAYOUT else SIDE * SIDE
    out_ptr += image * (3 * SIDE * SIDE)
    for start in range(0, SIDE * SIDE, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < SIDE * SIDE
        y, x = pixel // SIDE, pixel % SIDE
        patch = y // PATCH * GRID + x // PATCH
        key = _key_of(pixel, row_ptr, stride_select_patch, divisor, GRID, PATCH)
        masked = ((key > lowest) | ((key == lowest) & (pixel <= last))) != (context != 0)
        source = tl.zeros((BLOCK,), tl.int64) + own
        lost = inside
        readable = inside
        if HAS_DONORS:
            donor_ptrs = donors_ptr + image * stride_donors_n + patch * stride_donors_patch
            source = tl.where(masked, tl.load(donor_ptrs, mask=inside, other=0), source)
            lost = (source < 0) | (source >= count)
            readable = inside & (lost == 0)
        else:
            readable = inside & (masked == 0)
            if first_ptr is not None:
                lost = (masked == 0) & ((source < 0) | (source >= count))
                readable = readable & (lost == 0)
        pixel_ptrs = images_ptr + source * stride_image_n + (y * stride_image_y + x * stride_image_x)
        red = tl.load(pixel_ptrs, mask=readable, other=0)
        green = tl.load(pixel_ptrs + stride_image_channel, mask=readable, other=0)
        blue = tl.load(pixel_ptrs + 2 * stride_image_channel, mask=readable, other=0)
        at = pixel
        if HAS_PATCH_LAYOUT:
            at = patch * (3 * AREA) + y % PATCH * PATCH + x % PATCH
        out_ptrs = out_ptr + at
        _store_channel(out_ptrs, red, masked, lost, fill_red, inside, SCALE_RED, SHIFT_RED, True, HAS_DONORS, CAN_LOSE)
        out_ptrs += STRIDE_CHANNEL
        _store_channel(out_ptrs, green, masked, lost, fill_green, inside, SCALE_GREEN, SHIFT_GREEN, True, HAS_DONORS, CAN_LOSE)
        out_ptrs += STRIDE_CHANNEL
        _store_channel(out_ptrs, blue, masked, lost, fill_blue, inside, SCALE_BLUE, SHIFT_BLUE, True, HAS_DONORS, CAN_LOSE)


def plan_top_pixels(out: Tensor, images: Tensor, *, grid: int, top_k: int, **options: Any) -> Launch:
    """The launch for the pixels of the highest interpolated relevance.

    Args:
        out: the result, `empty_for`.
        images: uint8 (M, H, W, 3) or float (M, 3, H, W).
        grid: patches per side, G.
        top_k: patches whose number of pixels is chosen.
        **options: layout, selector, donors, context, constant and first, as for `plan_pixels`.

    Returns:
        The launch, to be given to `launch.run`.
    """
    taken = plan_pixels(out, images, grid=(grid, grid), select="bilinear", **options).arguments
    patch = taken["HEIGHT"]
    arguments = {name: taken[name] for name in TAKEN}
    arguments |= {"chosen": top_k * patch**2, "GRID": grid, "PATCH": patch, "STEPS": ((grid * patch) ** 2).bit_length()}
    launch_options = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
    return Launch(_top_pixels_fwd_kernel, (len(out),), arguments | {"BLOCK": BLOCK}, launch_options)

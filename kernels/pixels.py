"""One pass over the pixels: what `normalise`, `masked_fill` and `counterfactual_batch` share.

    c = relevance / (max over patches + 1e-8)                          per image
    m = (c > threshold, or c among the top_k highest) xor context      per patch, or per pixel after bilinear up-sampling
    out[n] = (where(m, images[donor], images[n]) / 255 - mean) / std   per pixel, as one multiply-add in float32

Every output pixel is loaded from exactly one source: the image, or its donor, or (constant fill) nothing at all. uint8 images
whose patches are a multiple of 16 pixels wide (ViT-B/32, ViT-B/16; nearest up-sampling) are read 16 pixels at a time as three
16-byte loads; patches of even width (ViT-L/14) two pixels at a time as three 2-byte loads; everything else byte by byte.
Source: paper section 3.3 (masking and filling) and CLIP's pixel normalisation.
Shape letters: `kernels/__init__.py`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .patch_select import divisor_of, rank_of
from .reference.pixels import CLIP_MEAN, CLIP_STD, LAYOUTS, grid_of, image_size, normalised_colour

MAX_PATCHES = 1024
MAX_WIDTH = 4096
PIXEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS_PER_PROGRAM = {16: 128, 2: 256, 1: 512}
"""Pixel groups that one program of four warps takes, by pixels per group."""


@triton.jit
def _neighbours(pixel, PATCH: tl.constexpr):
    """Up-sampling along one side, align_corners=False: a pixel lies between the centres of two patches, the previous and its
    own, or its own and the next. Returns the offset (-1 or 0) of the first of the two and the weight of the second."""
    position = tl.div_rn(pixel.to(tl.float32) + 0.5, tl.full(pixel.shape, PATCH, tl.float32))
    early = 2 * pixel + 1 < PATCH
    return tl.where(early, -1, 0), tl.where(early, position + 0.5, position - 0.5)


@triton.jit
def _bilinear(
    row_ptr, stride_patch, row, column, y, x,
    GRID_Y: tl.constexpr, GRID_X: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The raw map at the pixels (y, x) inside patches (row, column), edges clamped; a + w (b - a) never leaves [a, b]."""
    offset_y, weight_y = _neighbours(y, HEIGHT)
    offset_x, weight_x = _neighbours(x, WIDTH)
    top = tl.minimum(tl.maximum(row + offset_y, 0), GRID_Y - 1) * GRID_X
    bottom = tl.minimum(tl.maximum(row + offset_y + 1, 0), GRID_Y - 1) * GRID_X
    left = tl.minimum(tl.maximum(column + offset_x, 0), GRID_X - 1)
    right = tl.minimum(tl.maximum(column + offset_x + 1, 0), GRID_X - 1)
    top_left = tl.load(row_ptr + (top + left) * stride_patch).to(tl.float32)
    top_right = tl.load(row_ptr + (top + right) * stride_patch).to(tl.float32)
    bottom_left = tl.load(row_ptr + (bottom + left) * stride_patch).to(tl.float32)
    bottom_right = tl.load(row_ptr + (bottom + right) * stride_patch).to(tl.float32)
    upper = top_left + weight_x * (top_right - top_left)
    lower = bottom_left + weight_x * (bottom_right - bottom_left)
    return upper + weight_y * (lower - upper)


@triton.jit
def _split4(vectors, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_G: tl.constexpr):
    """(..., 4) to its four elements."""
    even, odd = tl.split(tl.reshape(vectors, (BLOCK_Y, BLOCK_X, BLOCK_G, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _stack4(
    first, second, third, fourth, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_G: tl.constexpr, SIZE: tl.constexpr
):
    """Four tensors to one with a last dimension in which they alternate."""
    stacked = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(stacked, (BLOCK_Y, BLOCK_X, BLOCK_G, SIZE))


@triton.jit
def _channel(
    raw0, raw1, raw2, CHANNEL: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One colour of every pixel of each group, (BLOCK_Y, BLOCK_X, BLOCK_G, GROUP), out of what was loaded.

    raw0, raw1, raw2: words: bytes RGBR, GBRG and BRGB of each quartet of pixels; pairs: RG, BR and GB; single: R, G and B.
    """
    if PIXELS == "words":
        if CHANNEL == 0:
            pixel0, pixel1, pixel2, pixel3 = raw0 & 0xFF, raw0 >> 24, (raw1 >> 16) & 0xFF, (raw2 >> 8) & 0xFF
        elif CHANNEL == 1:
            pixel0, pixel1, pixel2, pixel3 = (raw0 >> 8) & 0xFF, raw1 & 0xFF, raw1 >> 24, (raw2 >> 16) & 0xFF
        else:
            pixel0, pixel1, pixel2, pixel3 = (raw0 >> 16) & 0xFF, (raw1 >> 8) & 0xFF, raw2 & 0xFF, raw2 >> 24
        pixels = _stack4(pixel0, pixel1, pixel2, pixel3, BLOCK_Y, BLOCK_X, BLOCK_G, 16)
    elif PIXELS == "pairs":
        if CHANNEL == 0:
            pixels = tl.join(raw0 & 0xFF, raw1 >> 8)
        elif CHANNEL == 1:
            pixels = tl.join(raw0 >> 8, raw2 & 0xFF)
        else:
            pixels = tl.join(raw1 & 0xFF, raw2 >> 8)
    elif CHANNEL == 0:
        pixels = raw0
    elif CHANNEL == 1:
        pixels = raw1
    else:
        pixels = raw2
    return pixels


@triton.jit
def _store_channel(
    out_ptrs, pixels, masked, lost, fill, inside,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, SELECTS: tl.constexpr, HAS_DONORS: tl.constexpr, CAN_LOSE: tl.constexpr,
):  # fmt: skip
    """Normalise one colour channel and store it. pixels: (BLOCK_Y, BLOCK_X, BLOCK_G, GROUP)."""
    values = tl.fma(pixels.to(tl.float32), tl.full(pixels.shape, SCALE, tl.float32), tl.full(pixels.shape, SHIFT, tl.float32))
    if CAN_LOSE:
        values = tl.where(lost, float("nan"), values)
    if SELECTS and not HAS_DONORS:
        values = tl.where(masked, tl.full(pixels.shape, fill, tl.float32), values)
    tl.store(out_ptrs, values.to(out_ptrs.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "top_k", "context"])
def _pixels_fwd_kernel(
    out_ptr, images_ptr, select_ptr, donors_ptr, first_ptr,
    stride_image_n, stride_image_channel, stride_image_y, stride_image_x,
    stride_select_n, stride_select_patch, stride_donors_n, stride_donors_patch,
    count, threshold, top_k, context, fill_red, fill_green, fill_blue,
    SELECT: tl.constexpr, PIXELS: tl.constexpr, HAS_DONORS: tl.constexpr, HAS_PATCH_LAYOUT: tl.constexpr,
    GRID_Y: tl.constexpr, GRID_X: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SCALE_RED: tl.constexpr, SCALE_GREEN: tl.constexpr, SCALE_BLUE: tl.constexpr,
    SHIFT_RED: tl.constexpr, SHIFT_GREEN: tl.constexpr, SHIFT_BLUE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK_P: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_Y pixel rows of one row of patches of an image; tiles are (rows, patches, groups, GROUP pixels).

    Row n of masks, donors and result belongs to image first + n of the `count` images, all of which can donate. first_ptr: one
    int64, read on the device so that a captured graph sees its new value; None is 0. Pixels of no image are NaN.
    SELECT: none, mask (select_ptr is a bool mask over patches), threshold, top_k or bilinear (select_ptr is the raw relevance).
    PIXELS: words (16 RGB pixels as three vectors of four 32-bit words), pairs (2 as three 16-bit words) or single.
    """
    CHUNKS: tl.constexpr = (HEIGHT + BLOCK_Y - 1) // BLOCK_Y
    program = tl.program_id(0)
    image = (program // (CHUNKS * GRID_Y)).to(tl.int64)
    row = program // CHUNKS % GRID_Y
    y = (program % CHUNKS * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None, None]
    column = tl.arange(0, BLOCK_X)
    x = (tl.arange(0, BLOCK_G) * GROUP)[None, None, :]
    patch = row * GRID_X + column  # (BLOCK_X,)
    exists = column < GRID_X
    column = column[None, :, None]
    inside = (y < HEIGHT) & (column < GRID_X) & (x < WIDTH)

    own = image
    if first_ptr is not None:
        own += tl.load(first_ptr)
    source = tl.zeros((1, BLOCK_X, 1), tl.int64) + own
    readable = inside
    masked = inside
    lost = inside
    if SELECT != "none":
        row_ptr = select_ptr + image * stride_select_n
        if SELECT == "mask":
            chosen = tl.load(row_ptr + patch * stride_select_patch, mask=exists, other=0) != 0
            masked = chosen[None, :, None]
        else:
            divisor = divisor_of(row_ptr, stride_select_patch, GRID_Y * GRID_X, BLOCK_P)
            if SELECT == "bilinear":
                raw = _bilinear(row_ptr, stride_select_patch, row, column, y, x, GRID_Y, GRID_X, HEIGHT, WIDTH)
                masked = (tl.div_rn(raw, divisor) > tl.full(raw.shape, threshold, tl.float32)) != (context != 0)
            else:
                raw = tl.load(row_ptr + patch * stride_select_patch, mask=exists, other=0.0).to(tl.float32)
                c = tl.div_rn(raw, divisor)
                if SELECT == "top_k":
                    rank = rank_of(c, patch, row_ptr, stride_select_patch, divisor, GRID_Y * GRID_X, CHUNK_P)
                    chosen = (rank < top_k) != (context != 0)
                else:
                    chosen = (c > tl.full(c.shape, threshold, tl.float32)) != (context != 0)
                masked = chosen[None, :, None]
        if HAS_DONORS:
            donor_ptrs = donors_ptr + image * stride_donors_n + patch * stride_donors_patch
            donor = tl.load(donor_ptrs, mask=exists, other=0)[None, :, None]
            source = tl.where(masked, donor, own)
            lost = (source < 0) | (source >= count)
            readable = inside & (lost == 0)
        else:
            if first_ptr is not None:
                lost = (masked == 0) & ((source < 0) | (source >= count))
                readable = inside & (masked == 0) & (lost == 0)
            else:
                readable = inside & (masked == 0)

    image_y = row * HEIGHT + y
    image_x = column * WIDTH + x
    if PIXELS == "words":
        at = images_ptr + (source * stride_image_n + (image_y * stride_image_y + image_x * 3))
        words = at.to(tl.pointer_type(tl.uint32))[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
        vectors0 = tl.load(words, mask=readable[:, :, :, None], other=0)
        vectors1 = tl.load(words + 4, mask=readable[:, :, :, None], other=0)
        vectors2 = tl.load(words + 8, mask=readable[:, :, :, None], other=0)
        w0, w1, w2, w3 = _split4(vectors0, BLOCK_Y, BLOCK_X, BLOCK_G)
        w4, w5, w6, w7 = _split4(vectors1, BLOCK_Y, BLOCK_X, BLOCK_G)
        w8, w9, w10, w11 = _split4(vectors2, BLOCK_Y, BLOCK_X, BLOCK_G)
        raw0 = _stack4(w0, w3, w6, w9, BLOCK_Y, BLOCK_X, BLOCK_G, 4)  # RGBR of four quartets of pixels
        raw1 = _stack4(w1, w4, w7, w10, BLOCK_Y, BLOCK_X, BLOCK_G, 4)  # GBRG
        raw2 = _stack4(w2, w5, w8, w11, BLOCK_Y, BLOCK_X, BLOCK_G, 4)  # BRGB
    elif PIXELS == "pairs":
        at = images_ptr + (source * stride_image_n + (image_y * stride_image_y + image_x * 3))
        halves = at.to(tl.pointer_type(tl.uint16))
        raw0 = tl.load(halves, mask=readable, other=0).to(tl.int32)  # RG
        raw1 = tl.load(halves + 1, mask=readable, other=0).to(tl.int32)  # BR
        raw2 = tl.load(halves + 2, mask=readable, other=0).to(tl.int32)  # GB
    else:
        at = source * stride_image_n + (image_y * stride_image_y + image_x * stride_image_x)
        pixel_ptrs = images_ptr + at[:, :, :, None] + tl.arange(0, GROUP)[None, None, None, :] * stride_image_x
        raw0 = tl.load(pixel_ptrs, mask=readable[:, :, :, None], other=0)
        raw1 = tl.load(pixel_ptrs + stride_image_channel, mask=readable[:, :, :, None], other=0)
        raw2 = tl.load(pixel_ptrs + 2 * stride_image_channel, mask=readable[:, :, :, None], other=0)

    AREA: tl.constexpr = HEIGHT * WIDTH
    STRIDE_CHANNEL: tl.constexpr = AREA if HAS_PATCH_LAYOUT else GRID_Y * GRID_X * AREA
    if HAS_PATCH_LAYOUT:
        out_offset = (row * GRID_X + column) * (3 * AREA) + y * WIDTH + x
    else:
        out_offset = image_y * (GRID_X * WIDTH) + image_x
    out_ptr += image * (3 * GRID_Y * GRID_X * AREA)
    out_offset = out_offset[:, :, :, None] + tl.arange(0, GROUP)[None, None, None, :]
    masked, lost, inside = masked[:, :, :, None], lost[:, :, :, None], inside[:, :, :, None]
    SELECTS: tl.constexpr = SELECT != "none"
    CAN_LOSE: tl.constexpr = HAS_DONORS or first_ptr is not None
    pixels = _channel(raw0, raw1, raw2, 0, PIXELS, BLOCK_Y, BLOCK_X, BLOCK_G)
    _store_channel(
        out_ptr + 0 * STRIDE_CHANNEL + out_offset,
        pixels,
        masked,
        lost,
        fill_red,
        inside,
        SCALE_RED,
        SHIFT_RED,
        SELECTS,
        HAS_DONORS,
        CAN_LOSE,
    )
    pixels = _channel(raw0, raw1, raw2, 1, PIXELS, BLOCK_Y, BLOCK_X, BLOCK_G)
    _store_channel(
        out_ptr + 1 * STRIDE_CHANNEL + out_offset,
        pixels,
        masked,
        lost,
        fill_green,
        inside,
        SCALE_GREEN,
        SHIFT_GREEN,
        SELECTS,
        HAS_DONORS,
        CAN_LOSE,
    )
    pixels = _channel(raw0, raw1, raw2, 2, PIXELS, BLOCK_Y, BLOCK_X, BLOCK_G)
    _store_channel(
        out_ptr + 2 * STRIDE_CHANNEL + out_offset,
        pixels,
        masked,
        lost,
        fill_blue,
        inside,
        SCALE_BLUE,
        SHIFT_BLUE,
        SELECTS,
        HAS_DONORS,
        CAN_LOSE,
    )


def plan_pixels(
    out: Tensor,
    images: Tensor,
    *,
    layout: str,
    grid: tuple[int, int],
    select: str = "none",
    selector: Tensor | None = None,
    donors: Tensor | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    context: bool = False,
    constant: Sequence[float] | None = None,
    first: Tensor | None = None,
) -> Launch:
    """The launch of one pass over the pixels.

    Args:
        out: the result, `empty_result`.
        images: uint8 (M, H, W, 3) or float (M, 3, H, W).
        layout: of the result, `nchw` or `patches`.
        grid: rows and columns of patches.
        select: `none` (normalise alone), `mask`, `threshold`, `top_k` or `bilinear`.
        selector: the mask, bool (N, P), or the raw relevance, float32 (N, P); None for `none`.
        donors: int64 (N,) or (N, P); None: a constant colour.
        threshold: of the selection, as for `counterfactual_batch`.
        top_k: of the selection, as for `counterfactual_batch`.
        context: of the selection, as for `counterfactual_batch`.
        constant: RGB colour in [0, 1], None for CLIP's mean.
        first: int64 (), as for `masked_fill`.

    Returns:
        The launch, to be given to `launch.run`.
    """
    count, image_height, image_width = image_size(images)
    rows, columns = grid
    height, width = image_height // rows, image_width // columns
    if images.dtype == torch.uint8:
        image_strides = (images.stride(0), images.stride(3), images.stride(1), images.stride(2))
    else:
        image_strides = (images.stride(0), images.stride(1), images.stride(2), images.stride(3))
    group = _pixels_per_group(images, width, per_pixel=select == "bilinear")
    packed = images.dtype == torch.uint8 and group > 1
    block_x, block_g = triton.next_power_of_2(columns), triton.next_power_of_2(width // group)
    lanes = GROUPS_PER_PROGRAM[group]
    block_y = min(max(1, lanes // (block_x * block_g)), triton.next_power_of_2(height))
    block_p = triton.next_power_of_2(rows * columns)
    unit = 255 if images.dtype == torch.uint8 else 1
    fill = normalised_colour(constant)
    arguments: dict[str, Any] = {
        "out_ptr": out,
        "images_ptr": images,
        "select_ptr": selector,
        "donors_ptr": donors,
        "first_ptr": first,
        "stride_image_n": image_strides[0],
        "stride_image_channel": image_strides[1],
        "stride_image_y": image_strides[2],
        "stride_image_x": image_strides[3],
        "stride_select_n": 0 if selector is None else selector.stride(0),
        "stride_select_patch": 0 if selector is None else selector.stride(1),
        "stride_donors_n": 0 if donors is None else donors.stride(0),
        "stride_donors_patch": 0 if donors is None or donors.ndim == 1 else donors.stride(1),
        "count": count,
        "threshold": 0.0 if threshold is None else float(threshold),
        "top_k": 0 if top_k is None else top_k,
        "context": int(context),
        "fill_red": fill[0],
        "fill_green": fill[1],
        "fill_blue": fill[2],
        "SELECT": select,
        "PIXELS": ("words" if group == 16 else "pairs") if packed else "single",
        "HAS_DONORS": donors is not None,
        "HAS_PATCH_LAYOUT": layout == "patches",
        "GRID_Y": rows,
        "GRID_X": columns,
        "HEIGHT": height,
        "WIDTH": width,
        "SCALE_RED": 1 / (unit * CLIP_STD[0]),
        "SCALE_GREEN": 1 / (unit * CLIP_STD[1]),
        "SCALE_BLUE": 1 / (unit * CLIP_STD[2]),
        "SHIFT_RED": -CLIP_MEAN[0] / CLIP_STD[0],
        "SHIFT_GREEN": -CLIP_MEAN[1] / CLIP_STD[1],
        "SHIFT_BLUE": -CLIP_MEAN[2] / CLIP_STD[2],
        "GROUP": group,
        "BLOCK_P": block_p,
        "CHUNK_P": min(block_p, 128),
        "BLOCK_Y": block_y,
        "BLOCK_X": block_x,
        "BLOCK_G": block_g,
    }
    warps = min(16, max(4, 4 * block_y * block_x * block_g // lanes))
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    if group == 16 and out.dtype == torch.float32:
        options["maxnreg"] = 72  # 16 float32 values per thread: left to itself, ptxas aims at 48 registers and spills
    return Launch(_pixels_fwd_kernel, (len(out) * rows * triton.cdiv(height, block_y),), arguments, options)


def _pixels_per_group(images: Tensor, width: int, *, per_pixel: bool) -> int:
    """16, 2 or 1: the pixels that share a source and are loaded together from patches of `width` pixels."""
    sizes = () if per_pixel else (16, 2)
    if images.dtype != torch.uint8:
        return next((size for size in sizes if width % size == 0), 1)
    if (images.stride(2), images.stride(3)) != (3, 1):
        return 1
    start = images.storage_offset() if images.device.type == "meta" else images.data_ptr()
    starts = (start, images.stride(0), images.stride(1))  # bytes
    return next((size for size in sizes if width % size == 0 and all(at % size == 0 for at in starts)), 1)


def pixels_ineligible(images: Tensor, dtype: torch.dtype, selector: Tensor | None = None) -> str | None:
    """Why the kernel cannot take these images.

    Args:
        images: the batch.
        dtype: of the result.
        selector: the mask or the relevance map (N, P); None for normalisation alone.

    Returns:
        The reason in words; None if the kernel can take them.
    """
    if images.dtype not in (torch.uint8, *PIXEL_DTYPES):
        return f"images are {images.dtype}, the kernel takes uint8, float32, float16 and bfloat16"
    if dtype not in PIXEL_DTYPES:
        return f"dtype is {dtype}, the kernel writes float32, float16 and bfloat16"
    if images.shape[1 if images.dtype == torch.uint8 else 2] > MAX_WIDTH or image_size(images)[2] > MAX_WIDTH:
        return f"images of {tuple(images.shape)} are larger than {MAX_WIDTH} pixels"
    if sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True)) >= 2**31:
        return "an image spans 2**31 elements or more"
    if selector is not None and selector.dtype not in (torch.bool, torch.float32):
        return f"relevance is {selector.dtype}, the kernel takes float32"
    if selector is not None and selector.shape[1] > MAX_PATCHES:
        return f"{selector.shape[1]} patches, the kernel takes up to {MAX_PATCHES}"
    return None


def empty_for(selector: Tensor, images: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """An uninitialised result with a row for each row of a mask or relevance map.

    Args:
        selector: the mask or the relevance map (N, P).
        images: gives size and device.
        dtype: of the result.
        layout: `nchw` or `patches`.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p).
    """
    side = image_size(images)[2]
    return empty_result(images, dtype, layout, side // grid_of(selector.shape[1], side), count=selector.shape[0])


def empty_result(
    images: Tensor, dtype: torch.dtype, layout: str, patch_size: int | None, *, count: int | None = None
) -> Tensor:
    """An uninitialised result.

    Args:
        images: gives size and device.
        dtype: of the result.
        layout: `nchw` or `patches`.
        patch_size: pixels per side of a patch, p; needed for `patches`.
        count: rows, N; None for as many as there are images.

    Returns:
        `dtype` (N, 3, H, W) or (N, P, 3 * p * p).
    """
    every, height, width = image_size(images)
    count = every if count is None else count
    if layout == "patches":
        assert patch_size is not None
        patches = (height // patch_size) * (width // patch_size)
        return torch.empty((count, patches, 3 * patch_size**2), dtype=dtype, device=images.device)
    return torch.empty((count, 3, height, width), dtype=dtype, device=images.device)


def check_output(dtype: torch.dtype, layout: str) -> None:
    """Raise ValueError on a dtype or layout that no result has."""
    if dtype not in (*PIXEL_DTYPES, torch.float64):
        raise ValueError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def check_square(images: Tensor) -> int:
    """The side of the images in pixels. Raises ValueError where they are not square."""
    _, height, width = image_size(images)
    if height != width:
        raise ValueError(f"images: expected square images, got {height} x {width} pixels")
    return width


def check_first(first: Tensor | None, selector: Tensor, images: Tensor) -> int:
    """Check `first`, whose value stays on the device.

    Args:
        first: int64 () on the device of the images, or None.
        selector: the mask or the relevance map.
        images: the batch.

    Returns:
        The number of rows that masks and donors must have, N.

    Raises:
        ValueError: for another dtype, shape or device.
    """
    if first is None:
        return images.shape[0]
    if first.dtype != torch.int64 or first.ndim or first.device != images.device:
        got = f"{first.dtype} {tuple(first.shape)} on {first.device}"
        raise ValueError(f"first: expected int64 () on {images.device}, got {got}")
    return selector.shape[0]


def check_grid(name: str, selector: Tensor, images: Tensor, side: int) -> None:
    """Check that a mask or relevance map divides the images into patches and lies on their device.

    Args:
        name: of the argument, for the message.
        selector: the mask or the relevance map (N, P).
        images: the batch.
        side: of the images, pixels.

    Raises:
        ValueError: for another device or a P that is no square grid dividing the side.
    """
    if selector.device != images.device:
        raise ValueError(f"{name}: expected the device of images, {images.device}, got {selector.device}")
    try:
        grid_of(selector.shape[1], side)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_fill(donors: Tensor | None, constant: Sequence[float] | None, images: Tensor, selector: Tensor) -> None:
    """Check donors or constant colour.

    Args:
        donors: int64 (N,) or (N, P) on the device of the images, or None.
        constant: RGB in [0, 1], or None; only without donors.
        images: the batch.
        selector: the mask or the relevance map (N, P).

    Raises:
        ValueError: naming the argument. The values of donors are not read.
    """
    count, patches = selector.shape[0], selector.shape[1]
    if donors is None:
        if constant is not None and (len(constant) != 3 or not all(0.0 <= value <= 1.0 for value in constant)):
            raise ValueError(f"constant: expected an RGB colour in [0, 1], got {constant}")
        return
    if constant is not None:
        raise ValueError("constant: give donors or a constant colour, not both")
    if donors.dtype != torch.int64 or donors.ndim not in (1, 2) or donors.shape[0] != count:
        raise ValueError(f"donors: expected int64 ({count},) or ({count}, {patches}), got {donors.dtype} {tuple(donors.shape)}")
    if donors.ndim == 2 and donors.shape[1] != patches:
        raise ValueError(f"donors: expected int64 ({count},) or ({count}, {patches}), got {donors.dtype} {tuple(donors.shape)}")
    if donors.device != images.device:
        raise ValueError(f"donors: expected the device of images, {images.device}, got {donors.device}")

"""Masked fill in plain PyTorch: up-sample the patch mask, take masked pixels from donors, normalise, cut into patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .patch_select import normalise_relevance, patch_select

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LAYOUTS = ("nchw", "patches")


def normalise(
    images: Tensor, *, dtype: torch.dtype = torch.float32, layout: str = "nchw", patch_size: int | None = None
) -> Tensor:
    """(x - mean) / std with CLIP's constants.

    images: uint8 (N, H, W, 3), or float (N, 3, H, W) in [0, 1]. Returns `dtype` (N, 3, H, W), or with layout="patches"
    (N, P, 3 * patch_size**2): patches row-major, each flattened in the order channel, y, x. Raises ValueError on other shapes.
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


def normalised_colour(constant: Sequence[float] | None) -> tuple[float, float, float]:
    """An RGB colour in [0, 1] after normalisation; None is CLIP's mean, exactly 0."""
    if constant is None:
        return 0.0, 0.0, 0.0
    red, green, blue = ((value - mean) / std for value, mean, std in zip(constant, CLIP_MEAN, CLIP_STD, strict=True))
    return red, green, blue


def upsample_nearest(mask_NP: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """Patch values (N, P), row-major, to pixels (N, grid * patch_size, grid * patch_size)."""
    count = len(mask_NP)
    pixels = mask_NP.reshape(count, grid, 1, grid, 1).expand(count, grid, patch_size, grid, patch_size)
    return pixels.reshape(count, grid * patch_size, grid * patch_size)


def upsample_bilinear(relevance_NP: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """Normalised relevance (N, P) to pixels (N, H, W); align_corners=False, edges clamped."""
    side = grid * patch_size
    maps = relevance_NP.reshape(-1, 1, grid, grid)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def fill_pixels(images: Tensor, mask: Tensor, donors: Tensor, *, first: Tensor | None = None) -> Tensor:
    """Fill masked pixels from other images of the batch.

    images: uint8 (M, H, W, 3) or float (M, 3, H, W). mask: bool (N, P), row-major patches, or (N, H, W), pixels; True = filled.
    donors: int64 (N,), one donor image per image (single-fill), or (N, P), one per patch (multi-fill), each in 0..M-1.
    first: int64 (): row n of mask, donors and result belongs to images[first + n], the other images only donate; else N = M.
    Returns images' dtype and shape: at every pixel the image itself or its donor. Raises ValueError on wrong shapes, and on a
    CPU for a donor or first outside the batch. METHOD: paper section 3.3 (single-fill, multi-fill).
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
    """The filled batch, normalised: normalise(fill_pixels(...)), or for donors=None the colour `constant` at masked pixels.

    images, mask, donors, first: as `fill_pixels`. constant: RGB in [0, 1], None for CLIP's mean. patch_size: of
    layout="patches" where the mask is over pixels. Returns `dtype` (N, 3, H, W) or (N, P, 3 * p * p), as `normalise`.
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
    """The counterfactual of a batch, from the raw relevance map: select patches, fill them, normalise pixels.

    images, donors, first: as `fill_pixels`; donors None for a constant colour. relevance_NP: float (N, P), not normalised.
    threshold, top_k, context: as `patch_select`. upsample: `nearest`, or `bilinear`: the normalised map is interpolated to
    pixels before it is compared with the threshold. Returns `dtype`, shapes as `normalise`.
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


def image_size(images: Tensor) -> tuple[int, int, int]:
    """(N, H, W) of uint8 (N, H, W, 3) or float (N, 3, H, W) images. Raises ValueError on anything else."""
    if images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images: expected uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        return images.shape[0], images.shape[1], images.shape[2]
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected float (N, 3, H, W) or uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    return images.shape[0], images.shape[2], images.shape[3]


def grid_of(patches: int, side: int) -> int:
    """Patches per side. Raises ValueError where they are no square grid whose patches divide the image."""
    grid = 1
    while grid * grid < patches:  # not math.isqrt, which torch.compile cannot trace on a symbolic size
        grid += 1
    if grid * grid != patches or side % grid:
        raise ValueError(f"{patches} patches are no square grid that divides an image of {side} pixels")
    return grid


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


def _widest_words(length: int) -> torch.dtype:
    """The widest integer dtype that a row of `length` bytes is made of."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if length % dtype.itemsize == 0:
            return dtype
    return torch.uint8

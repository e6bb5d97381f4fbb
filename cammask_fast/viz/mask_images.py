"""Photographs for the eye, and what masking and filling makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cammask_fast.data.loaders.torch_loader import UNREADABLE, error_reason
from cammask_fast.data.transforms import Transform, decode, opened, placed, to_pixels, to_rgb
from cammask_fast.masking import MaskRandomness, Strategy, counterfactual, sample_mask_randomness

REMOVED = 255


def photograph(path: Path, size: int) -> Tensor:
    """One image file as uint8 (size, size, 3), see `decode`. Raises ValueError naming a file that cannot be read."""
    try:
        return decode(path.read_bytes(), Transform(size=size))
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def whole_photograph(path: Path) -> Image.Image:
    """One image file at its own size, upright, RGB. Raises ValueError naming a file that cannot be read."""
    try:
        return to_rgb(opened(path.read_bytes()))
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"cannot read the image {path} ({error_reason(error)}): remove or replace it")


class Photograph(NamedTuple):
    """A photograph's centre as the model sees it, uint8 (S, S, 3), and as it is shown, uint8 (D, D, 3); its own width and
    height in pixels."""

    path: Path
    seen: Tensor
    shown: Tensor
    width: int
    height: int


def read_photographs(paths: Sequence[Path], *, size: int, shown: int) -> tuple[list[Photograph], list[Path]]:
    """Read photographs.

    Args:
        paths: files.
        size: pixels per side of what the model sees, S.
        shown: pixels per side of what is shown, D.

    Returns:
        Those that can be read, and the files that cannot.
    """
    found, unread = [], []
    for path in paths:
        try:
            image = whole_photograph(path)
        except ValueError:
            unread.append(path)
            continue
        pixels = to_pixels(image)
        seen, large = (placed(pixels, Transform(size=one).sample_params(0, 0, *image.size), one) for one in (size, shown))
        found.append(Photograph(path, seen, large, *image.size))
    return found, unread


def apply(
    strategy: Strategy, pool: Tensor, count: int, relevance: Tensor, generator: torch.Generator, *, grid: int
) -> tuple[Tensor, Tensor]:
    """Mask and fill the first images of a pool. Donors come from the whole pool and are never the image itself.

    Args:
        strategy: which patches are masked and how they are filled.
        pool: uint8 (M, H, W, 3).
        count: images to mask, N.
        relevance: float (N, P), not normalised.
        generator: advances.
        grid: patches per side, G.

    Returns:
        Masks, bool (N, G, G), and counterfactuals, uint8 (N, H, W, 3); removed patches of a no-fill are white.
    """
    return filled(strategy, pool, count, relevance, other_donors(strategy, len(pool), grid * grid, generator), grid=grid)


def filled(
    strategy: Strategy, pool: Tensor, count: int, relevance: Tensor, draws: MaskRandomness, *, grid: int
) -> tuple[Tensor, Tensor]:
    """Mask and fill the first images of a pool.

    Args:
        strategy: which patches are masked and how they are filled.
        pool: uint8 (M, H, W, 3), of any size that the grid divides.
        count: images to mask, N.
        relevance: float (N, P), not normalised.
        draws: donors and random masks of all M images.
        grid: patches per side, G.

    Returns:
        As `apply`.
    """
    images = pool[:count]
    padded = torch.cat([relevance, relevance.new_zeros(len(pool) - count, grid * grid)])
    made = counterfactual(pool, padded, strategy, draws, grid=grid)
    squares = made.mask[:count].view(count, grid, grid)
    side = images.shape[1] // grid
    if strategy.fill != "none":
        return squares, made.images[:count]
    removed = squares.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    return squares, images.masked_fill(removed, REMOVED)


def other_donors(strategy: Strategy, count: int, patches: int, generator: torch.Generator, *, given: int = 0) -> MaskRandomness:
    """Draw so that no single-fill donor is the image itself: a picture without a change would show nothing.

    Args:
        strategy: decides what is drawn.
        count: images of the pool, M.
        patches: patches per image, P.
        generator: advances.
        given: the last images of the pool, from which alone donors come; 0: they come from all of it.

    Returns:
        The draws.
    """
    draws = sample_mask_randomness(strategy, count=count, patches=patches, generator=generator)
    if strategy.fill == "none":
        return draws
    if given:
        shape = (count,) if strategy.fill == "single" else (count, patches)
        return draws._replace(donors=count - given + torch.randint(given, shape, generator=generator))
    if strategy.fill == "single":
        shift = torch.randint(1, count, (count,), generator=generator)
        draws = draws._replace(donors=(torch.arange(count) + shift) % count)
    return draws

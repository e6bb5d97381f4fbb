"""From a batch, its relevance and the draws to the counterfactual input of student and teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.patch_select import patch_select
from cammask_fast.kernels.reference import PatchSelection, fill_pixels, normalise_relevance, top_pixels, upsample_bilinear
from cammask_fast.masking.randomness import MaskRandomness
from cammask_fast.strategy import Strategy


class MaskedInput(NamedTuple):
    """What student and teacher see. pixels: filled and normalised, in the layout asked for; None for no-fill: the clean ones.
    kept_tokens, key_mask: what no-fill drops, as `VisionTransformer.forward` takes them; a threshold gives both, the kept
    tokens in front and a mask over those behind."""

    pixels: Tensor | None
    kept_tokens: Tensor | None = None
    key_mask: Tensor | None = None


def masked_input(
    images: Tensor,
    relevance_NP: Tensor | None,
    strategy: Strategy,
    draws: MaskRandomness,
    *,
    grid: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "nchw",
) -> MaskedInput:
    """Apply a strategy in as few passes over the pixels as possible: none for no-fill, one for a fill.

    Args:
        images: uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1].
        relevance_NP: float (N, P), not normalised; None for random masks.
        strategy: which patches are masked and how they are filled.
        draws: from `sample_mask_randomness`.
        grid: patches per side, G.
        dtype: of the pixels, as for `normalise`.
        layout: of the pixels, `nchw` or `patches`, as for `normalise`.

    Returns:
        Filled pixels, or for no-fill the kept tokens or the key mask.

    Raises:
        ValueError: relevance or draws do not fit the strategy.
    """
    _check(images, relevance_NP, strategy, draws, grid)
    if strategy.fill == "none":
        if strategy.selection == "random":
            return MaskedInput(None, kept_tokens=draws.kept_tokens)
        selected = _select(relevance_NP, strategy, grid)
        if selected.kept_tokens is not None:
            return MaskedInput(None, selected.kept_tokens)
        return MaskedInput(None, *_kept_first(selected.mask))
    pool = images if draws.pool is None else draws.pool
    if strategy.selection == "random":
        mask = _random_mask(strategy, draws)
        return MaskedInput(masked_fill(pool, mask, draws.donors, dtype=dtype, layout=layout, first=draws.first))
    assert relevance_NP is not None
    return MaskedInput(
        counterfactual_batch(
            pool,
            relevance_NP,
            draws.donors,
            threshold=strategy.threshold,
            top_k=None if strategy.threshold is not None else strategy.k(grid * grid),
            context=strategy.selection == "context",
            upsample=strategy.upsample,
            dtype=dtype,
            layout=layout,
            first=draws.first,
        )
    )


class Counterfactual(NamedTuple):
    """For visualisation and tests.

    images: the filled batch in the input's format (the input itself for no-fill). mask: bool (N, P) patches or (N, H, W) pixels
    (bilinear), True = masked.
    """

    images: Tensor
    mask: Tensor


def counterfactual(
    images: Tensor, relevance_NP: Tensor | None, strategy: Strategy, draws: MaskRandomness, *, grid: int
) -> Counterfactual:
    """The result of `masked_input`, step by step in plain PyTorch, with the mask and the pixels before normalisation.

    Args:
        images: uint8 (N, H, W, 3) or float (N, 3, H, W) in [0, 1].
        relevance_NP: float (N, P), not normalised; None for random masks.
        strategy: which patches are masked and how they are filled.
        draws: from `sample_mask_randomness`.
        grid: patches per side, G.

    Returns:
        The filled images and their masks.

    Raises:
        ValueError: relevance or draws do not fit the strategy.
    """
    _check(images, relevance_NP, strategy, draws, grid)
    if strategy.selection == "random" and strategy.fill == "none":
        assert draws.kept_tokens is not None
        mask = torch.ones(len(images), grid * grid, dtype=torch.bool, device=images.device)
        return Counterfactual(images, mask.scatter_(1, draws.kept_tokens[:, 1:] - 1, False))
    if strategy.selection == "random":
        mask = _random_mask(strategy, draws)
    elif strategy.upsample == "bilinear":
        mask = _pixel_mask(relevance_NP, strategy, grid=grid, patch_size=images.shape[2] // grid)
    else:
        mask = _select(relevance_NP, strategy, grid).mask
    if strategy.fill == "none":
        return Counterfactual(images, mask)
    assert draws.donors is not None
    pool = images if draws.pool is None else draws.pool
    return Counterfactual(fill_pixels(pool, mask, draws.donors, first=draws.first), mask)


def _kept_first(mask_NP: Tensor) -> tuple[Tensor, Tensor]:
    """A threshold keeps another number of patches in every image: all tokens with the kept patches first, ascending, and the
    key mask of the rest, so that shapes stay as they are and no count leaves the device."""
    order = mask_NP.to(torch.uint8).argsort(dim=1, stable=True)
    return F.pad(order + 1, (1, 0)), mask_NP.gather(1, order)


def _select(relevance_NP: Tensor | None, strategy: Strategy, grid: int) -> PatchSelection:
    assert relevance_NP is not None
    top_k = None if strategy.threshold is not None else strategy.k(grid * grid)
    return patch_select(relevance_NP, context=strategy.selection == "context", threshold=strategy.threshold, top_k=top_k)


def _pixel_mask(relevance_NP: Tensor | None, strategy: Strategy, *, grid: int, patch_size: int) -> Tensor:
    """bool (N, H, W): by the relevance interpolated to pixels."""
    assert relevance_NP is not None
    if strategy.threshold is None:
        of_object = top_pixels(relevance_NP, strategy.k(grid * grid), grid=grid, patch_size=patch_size)
    else:
        pixels = upsample_bilinear(normalise_relevance(relevance_NP), grid=grid, patch_size=patch_size)
        of_object = pixels > strategy.threshold
    return of_object ^ (strategy.selection == "context")


def _random_mask(strategy: Strategy, draws: MaskRandomness) -> Tensor:
    assert draws.uniform is not None
    assert strategy.threshold is not None
    return draws.uniform < strategy.threshold


def _check(images: Tensor, relevance_NP: Tensor | None, strategy: Strategy, draws: MaskRandomness, grid: int) -> None:
    expected = (len(images), grid * grid)
    if strategy.needs_cam and (relevance_NP is None or relevance_NP.shape != expected):
        got = None if relevance_NP is None else tuple(relevance_NP.shape)
        raise ValueError(f"relevance: expected {expected} for the {strategy.selection} mask, got {got}")
    needed = {
        "donors": strategy.fill != "none",
        "uniform": strategy.selection == "random" and strategy.fill != "none",
        "kept_tokens": strategy.selection == "random" and strategy.fill == "none",
    }
    for name, is_needed in needed.items():
        if is_needed and getattr(draws, name) is None:
            raise ValueError(
                f"draws: {strategy.selection} mask with {strategy.fill}-fill needs {name}; use sample_mask_randomness"
            )

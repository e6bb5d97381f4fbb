"""From a batch, its relevance and the draws to the counterfactual input of student and teacher."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cammask_fast.kernels.reference import masked_fill, normalise_relevance, patch_select, upsample_bilinear
from cammask_fast.masking.draws import Draws
from cammask_fast.masking.strategy import Strategy


class Counterfactual(NamedTuple):
    """images: the filled batch in the input's format (the input itself for no-fill). mask: bool (N, P) patches or (N, H, W)
    pixels (bilinear), True = masked. kept_tokens, key_mask: how the image tower drops patches in no-fill, or None."""

    images: Tensor
    mask: Tensor | None
    kept_tokens: Tensor | None = None
    key_mask: Tensor | None = None


def counterfactual(
    images: Tensor, relevance_NP: Tensor | None, strategy: Strategy, draws: Draws, *, grid: int
) -> Counterfactual:
    """Apply a strategy.

    images: uint8 (N, H, W, 3) or float (N, 3, H, W). relevance_NP: float (N, P), None for random masks. draws: from
    `draw_masking`. grid: patches per side. Raises ValueError where the relevance does not fit the strategy.
    """
    patches = grid * grid
    if strategy.needs_cam and (relevance_NP is None or relevance_NP.shape != (len(images), patches)):
        got = None if relevance_NP is None else tuple(relevance_NP.shape)
        raise ValueError(f"relevance: expected ({len(images)}, {patches}) for the {strategy.selection} mask, got {got}")
    if strategy.selection == "random" and strategy.fill == "none":
        assert draws.kept_tokens is not None
        return Counterfactual(images, None, kept_tokens=draws.kept_tokens)
    kept = None
    if strategy.selection == "random":
        assert draws.uniform is not None
        assert strategy.threshold is not None
        mask = draws.uniform < strategy.threshold
    elif strategy.upsample == "bilinear":
        assert relevance_NP is not None
        assert strategy.threshold is not None
        pixels = upsample_bilinear(normalise_relevance(relevance_NP), grid=grid, patch_size=images.shape[2] // grid)
        mask = (pixels > strategy.threshold) ^ (strategy.selection == "context")
    else:
        assert relevance_NP is not None
        top_k = None if strategy.threshold is not None else strategy.k(patches)
        selection = patch_select(
            relevance_NP, context=strategy.selection == "context", threshold=strategy.threshold, top_k=top_k
        )
        mask, kept = selection.mask, selection.kept_tokens
    if strategy.fill == "none":
        return Counterfactual(images, mask, kept_tokens=kept, key_mask=mask if kept is None else None)
    assert draws.donors is not None
    return Counterfactual(masked_fill(images, mask, draws.donors), mask)

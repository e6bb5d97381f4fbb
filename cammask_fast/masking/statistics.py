"""What a run logs of its masks and maps: scalars on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking.randomness import MaskRandomness
from cammask_fast.strategy import Strategy


def mask_share(relevance_NP: Tensor | None, strategy: Strategy, draws: MaskRandomness, *, patches: int) -> Tensor:
    """The share of the patches that a strategy masks in a batch.

    Args:
        relevance_NP: float (N, P), not normalised; None for random masks.
        strategy: which patches are masked. With bilinear up-sampling and a threshold the share is that of patches above it, not
            that of pixels.
        draws: from `sample_mask_randomness`.
        patches: patches per image, P.

    Returns:
        float scalar, 0 to 1.

    Raises:
        ValueError: the map or the draws that the strategy needs are missing.
    """
    if strategy.selection == "random" and draws.uniform is not None:
        return (draws.uniform < (strategy.threshold or 0.0)).float().mean()
    if strategy.selection == "random":
        if draws.kept_tokens is None:
            raise ValueError("draws: a random mask needs uniform or kept_tokens; use sample_mask_randomness")
        kept = draws.kept_tokens.shape[1] - 1
        return torch.full((), 1 - kept / patches, device=draws.kept_tokens.device)
    if relevance_NP is None:
        raise ValueError(f"relevance: expected (N, {patches}) for the {strategy.selection} mask, got None")
    if strategy.threshold is None:
        of_object = torch.full((), strategy.k(patches) / patches, device=relevance_NP.device)
    else:
        of_object = (normalise_relevance(relevance_NP) > strategy.threshold).float().mean()
    return 1 - of_object if strategy.selection == "context" else of_object


def entropy(relevance_NP: Tensor) -> Tensor:
    """Entropy of a relevance map over its patches in units of log P, mean over the batch: 1 for an even map, 0 for one patch.

    A map that is zero everywhere counts as 0.
    """
    weights = relevance_NP.clamp(min=0)
    share = weights / (weights.sum(1, keepdim=True) + 1e-12)
    return -torch.special.xlogy(share, share).sum(1).mean() / math.log(relevance_NP.shape[1])

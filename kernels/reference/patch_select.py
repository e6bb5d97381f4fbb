"""Per-image normalisation of a relevance map and the choice of patches, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Selection(NamedTuple):
    """normalised: (N, P), relevance / (max + 1e-8). mask: bool (N, P), True = masked. counts: int64 (N,), masked patches.
    kept_tokens: int64 (N, n_keep + 1), 0 (CLS) first, then 1 + patch of the unmasked patches ascending, for top-k; else None."""

    normalised: Tensor
    mask: Tensor
    counts: Tensor
    kept_tokens: Tensor | None


def normalise_relevance(relevance_NP: Tensor) -> Tensor:
    """c = relevance / (max over patches + 1e-8), per image; an all-zero map stays zero."""
    return relevance_NP / (relevance_NP.amax(1, keepdim=True) + 1e-8)


def patch_select(
    relevance_NP: Tensor, *, context: bool = False, threshold: float | None = None, top_k: int | None = None
) -> Selection:
    """Select the patches to mask.

    relevance_NP: float (N, P). threshold: the object mask is c > threshold (strict). top_k: the object mask is the k highest,
    ties go to the lower patch index. context: mask everything else instead. Exactly one of threshold and top_k is given.
    Raises ValueError on a wrong rank, a threshold outside [0, 1], k outside 1..P.
    """
    if relevance_NP.ndim != 2:
        raise ValueError(f"relevance: expected (N, P), got {tuple(relevance_NP.shape)}")
    patches = relevance_NP.shape[1]
    if (threshold is None) == (top_k is None):
        raise ValueError("give exactly one of threshold and top_k")
    normalised = normalise_relevance(relevance_NP)
    if threshold is not None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold: expected a value in [0, 1], got {threshold}")
        mask = (normalised > threshold) ^ context
        return Selection(normalised, mask, mask.sum(1), None)
    assert top_k is not None
    if not 1 <= top_k <= patches:
        raise ValueError(f"k: expected 1..{patches} patches, got {top_k}")
    order = torch.argsort(normalised, dim=1, descending=True, stable=True)
    chosen, others = order[:, :top_k], order[:, top_k:]
    mask = torch.zeros_like(normalised, dtype=torch.bool).scatter_(1, others if context else chosen, True)
    kept = (chosen if context else others).sort(1).values
    return Selection(normalised, mask, mask.sum(1), F.pad(kept + 1, (1, 0)))

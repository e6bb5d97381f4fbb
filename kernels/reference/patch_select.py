"""Per-image normalisation of a relevance map and the choice of patches, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Selection(NamedTuple):
    """normalised: (N, P), relevance / (max + 1e-8). mask: bool (N, P), True = masked. counts: int64 (N,), masked patches.
    kept_tokens: int64 (N, n_keep + 1), for top-k: 0 (CLS), then 1 + patch of the unmasked patches ascending; else None."""

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
    Raises ValueError on a wrong rank or dtype, a threshold outside [0, 1], k outside 1..P.
    """
    check_selection(relevance_NP, threshold=threshold, top_k=top_k)
    normalised = normalise_relevance(relevance_NP)
    if threshold is not None:
        mask = (normalised > threshold) ^ context
        return Selection(normalised, mask, mask.sum(1), None)
    assert top_k is not None
    order = torch.argsort(normalised, dim=1, descending=True, stable=True)
    chosen, others = order[:, :top_k], order[:, top_k:]
    mask = torch.zeros_like(normalised, dtype=torch.bool).scatter_(1, others if context else chosen, True)
    kept = (chosen if context else others).sort(1).values
    return Selection(normalised, mask, mask.sum(1), F.pad(kept + 1, (1, 0)))


def check_selection(relevance: Tensor, *, threshold: float | None, top_k: int | None) -> None:
    """Raise ValueError where `patch_select` cannot work; looks at shapes and options only."""
    if relevance.ndim != 2 or relevance.dtype not in (torch.float32, torch.float64) or relevance.shape[1] == 0:
        raise ValueError(f"relevance: expected float32 (N, P), got {relevance.dtype} {tuple(relevance.shape)}")
    patches = relevance.shape[1]
    if (threshold is None) == (top_k is None):
        raise ValueError("threshold, top_k: give exactly one of them")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a value in [0, 1], got {threshold}")
    if top_k is not None and not 1 <= top_k <= patches:
        raise ValueError(f"top_k: expected 1..{patches} patches, got {top_k}")

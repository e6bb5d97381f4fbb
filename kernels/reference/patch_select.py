"""Per-image normalisation of a relevance map and the choice of patches, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PatchSelection(NamedTuple):
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
) -> PatchSelection:
    """Select the patches to mask. Source: paper section 3.3; top-k is an addition.

    Args:
        relevance_NP: float (N, P), the raw map.
        context: mask everything but the object.
        threshold: in [0, 1]; the object mask is c > threshold (strict), c = relevance / (max over patches + 1e-8).
        top_k: in 1..P; the object mask is the top_k highest, ties go to the lower patch index. Exactly one of threshold and
            top_k.

    Returns:
        The normalised map c, the mask, the number of masked patches per image, and with top_k the kept tokens.

    Raises:
        ValueError: for a wrong rank or dtype, a threshold outside [0, 1] or a k outside 1..P.
    """
    check_selection(relevance_NP, threshold=threshold, top_k=top_k)
    normalised = normalise_relevance(relevance_NP)
    if threshold is not None:
        mask = (normalised > threshold) ^ context
        return PatchSelection(normalised, mask, mask.sum(1), None)
    assert top_k is not None
    mask = highest(normalised, top_k) ^ context
    kept_count = top_k if context else mask.shape[1] - top_k
    return PatchSelection(normalised, mask, mask.sum(1), kept_tokens(~mask, kept_count))


def highest(values_NP: Tensor, k: int) -> Tensor:
    """bool (N, P): the k highest of each row; ties go to the lower index. NaN is the highest, as a sort has it; NaN and +inf
    tie, and a normalised map never has both. Without a sort: everything above the k-th value, then the first that equal it."""
    ranked = torch.where(values_NP.isnan(), math.inf, values_NP)
    kth = ranked.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = ranked > kth, ranked == kth
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))


def kept_tokens(kept_NP: Tensor, kept_count: int) -> Tensor:
    """int64 (N, kept_count + 1): 0, then 1 + patch where kept_NP, ascending; every row of kept_NP keeps kept_count patches."""
    count, patches = kept_NP.shape
    tokens = torch.arange(1, patches + 1, device=kept_NP.device)
    columns = torch.zeros(count, kept_count + 1, dtype=torch.int64, device=kept_NP.device)
    return columns.scatter_(1, kept_NP.cumsum(1) * kept_NP, tokens * kept_NP)


def check_selection(relevance: Tensor, *, threshold: float | None, top_k: int | None) -> None:
    """Check the arguments of `patch_select`: shape, dtype and options, no values.

    Args:
        relevance: expected float32 or float64 (N, P).
        threshold: expected in [0, 1], or None.
        top_k: expected in 1..P, or None.

    Raises:
        ValueError: naming the argument.
    """
    if relevance.ndim != 2 or relevance.dtype not in (torch.float32, torch.float64) or relevance.shape[1] == 0:
        raise ValueError(f"relevance: expected float32 (N, P), got {relevance.dtype} {tuple(relevance.shape)}")
    patches = relevance.shape[1]
    if (threshold is None) == (top_k is None):
        raise ValueError("threshold, top_k: give exactly one of them")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a value in [0, 1], got {threshold}")
    if top_k is not None and not 1 <= top_k <= patches:
        raise ValueError(f"top_k: expected 1..{patches} patches, got {top_k}")

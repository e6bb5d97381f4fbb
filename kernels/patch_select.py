"""Patch selection in one launch, one program per image.

    c = relevance / (max over patches + 1e-8)
    mask = (c > threshold, or c among the top_k highest) xor context

Top-k is a rank count: patch i is masked when fewer than k patches come before it, by higher c or, at equal c, lower index. The
kept tokens are written at the running count of unmasked patches, behind the CLS token. Source: paper section 3.3.
Shape letters: `kernels/__init__.py`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import uses_triton
from .launch import Launch, run
from .reference.patch_select import PatchSelection, check_selection
from .reference.patch_select import patch_select as reference_patch_select

MAX_PATCHES = 576


@triton.jit
def order_key(c):
    """int32 keys in the order of float32 values: -0.0 equals 0.0, every NaN is the greatest."""
    bits = (c + 0.0).to(tl.int32, bitcast=True)
    return tl.where(c != c, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def divisor_of(row_ptr, stride_patch, PATCHES: tl.constexpr, BLOCK_P: tl.constexpr):
    """max over the patches of one image + 1e-8; NaN if any patch is NaN.

    Args:
        row_ptr: float32, the map of one image.
        stride_patch: elements from one patch to the next.
        PATCHES: P.
        BLOCK_P: a power of two, at least P.

    Returns:
        float32 scalar.
    """
    patches = tl.arange(0, BLOCK_P)
    row = tl.load(row_ptr + patches.to(tl.int64) * stride_patch, mask=patches < PATCHES, other=float("-inf")).to(tl.float32)
    any_nan = tl.max((row != row).to(tl.int32), axis=0) > 0
    highest = tl.max(tl.where(row != row, float("-inf"), row), axis=0)
    return tl.where(any_nan, float("nan"), highest) + 1e-8


@triton.jit
def rank_of(c, patch, row_ptr, stride_patch, divisor, PATCHES: tl.constexpr, CHUNK_P: tl.constexpr):
    """How many patches of the image come before each of `patch`: a higher c, or the same c and a lower index.

    Args:
        c: float32, the normalised map at `patch`.
        patch: int32, indices of patches, shaped like c.
        row_ptr: float32, the raw map of the image.
        stride_patch: elements from one patch to the next.
        divisor: of the map, `divisor_of`.
        PATCHES: P.
        CHUNK_P: patches that are compared at a time.

    Returns:
        int32, shaped like c; 0 for the highest.
    """
    key = order_key(c)
    rank = tl.zeros_like(patch)
    for start in range(0, PATCHES, CHUNK_P):
        others = start + tl.arange(0, CHUNK_P)
        values = tl.load(row_ptr + others.to(tl.int64) * stride_patch, mask=others < PATCHES, other=0.0).to(tl.float32)
        other_key = order_key(tl.div_rn(values, divisor))[None, :]
        before = (other_key > key[:, None]) | ((other_key == key[:, None]) & (others[None, :] < patch[:, None]))
        rank += tl.sum((before & (others < PATCHES)[None, :]).to(tl.int32), axis=1)
    return rank


@triton.jit
def _patch_select_fwd_kernel(
    normalised_ptr, mask_ptr, counts_ptr, kept_tokens_ptr, relevance_ptr,
    stride_relevance_n, stride_relevance_patch, columns, threshold, top_k, context,
    HAS_TOP_K: tl.constexpr, PATCHES: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK_P: tl.constexpr,
):  # fmt: skip
    """One image. Outputs are contiguous; columns: of kept_tokens, CLS included."""
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK_P)
    exists = patch < PATCHES
    row_ptr = relevance_ptr + image * stride_relevance_n
    divisor = divisor_of(row_ptr, stride_relevance_patch, PATCHES, BLOCK_P)
    raw = tl.load(row_ptr + patch.to(tl.int64) * stride_relevance_patch, mask=exists, other=0.0).to(tl.float32)
    c = tl.div_rn(raw, divisor)
    if HAS_TOP_K:
        rank = rank_of(c, patch, row_ptr, stride_relevance_patch, divisor, PATCHES, CHUNK_P)
        masked = (rank < top_k) != (context != 0)
    else:
        masked = (c > tl.full(c.shape, threshold, tl.float32)) != (context != 0)
    masked = masked & exists
    tl.store(normalised_ptr + image * PATCHES + patch, c, mask=exists)
    tl.store(mask_ptr + image * PATCHES + patch, masked, mask=exists)
    tl.store(counts_ptr + image, tl.sum(masked.to(tl.int32), axis=0).to(tl.int64))
    if HAS_TOP_K:
        kept = exists & (masked == 0)
        column = tl.cumsum(kept.to(tl.int32), axis=0)
        tokens_ptr = kept_tokens_ptr + image * columns
        tl.store(tokens_ptr + tl.where(kept, column, 0), (patch + 1).to(tl.int64), mask=kept & (column < columns))
        tl.store(tokens_ptr, tl.full((), 0, tl.int64))


def plan_patch_select(
    normalised: Tensor,
    mask: Tensor,
    counts: Tensor,
    kept_tokens: Tensor,
    relevance: Tensor,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    context: bool = False,
) -> list[Launch]:
    """One launch that writes a selection.

    Args:
        normalised: float32 (N, P), contiguous; written, the map over its maximum.
        mask: bool (N, P), contiguous; written.
        counts: int64 (N,); written, masked patches per image.
        kept_tokens: int64 (N, n_keep + 1) for top_k, (N, 0) for a threshold; contiguous, written.
        relevance: float32 (N, P), the raw map, any strides.
        threshold: of the object mask; None for top_k.
        top_k: patches of the object mask; None for a threshold.
        context: mask everything but the object.

    Returns:
        A list of one launch.
    """
    count, patches = relevance.shape
    block_p = triton.next_power_of_2(patches)
    arguments: dict[str, Any] = {
        "normalised_ptr": normalised,
        "mask_ptr": mask,
        "counts_ptr": counts,
        "kept_tokens_ptr": kept_tokens,
        "relevance_ptr": relevance,
        "stride_relevance_n": relevance.stride(0),
        "stride_relevance_patch": relevance.stride(1),
        "columns": kept_tokens.shape[1],
        "threshold": 0.0 if threshold is None else float(threshold),
        "top_k": 0 if top_k is None else top_k,
        "context": int(context),
        "HAS_TOP_K": top_k is not None,
        "PATCHES": patches,
        "BLOCK_P": block_p,
        "CHUNK_P": min(block_p, 16),
    }
    options = {"num_warps": min(max(block_p // 32, 1), 16), "num_stages": 1, "enable_fp_fusion": False}
    return [Launch(_patch_select_fwd_kernel, (count,), arguments, options)]


def patch_select_ineligible(relevance: Tensor) -> str | None:
    """Why the kernel cannot select from this map; None if it can."""
    if relevance.dtype != torch.float32:
        return f"relevance is {relevance.dtype}, the kernel takes float32"
    if relevance.shape[1] > MAX_PATCHES:
        return f"{relevance.shape[1]} patches, the kernel takes up to {MAX_PATCHES}"
    return None


def _empty(relevance: Tensor, top_k: int | None, context: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, patches = relevance.shape
    columns = 0 if top_k is None else (top_k if context else patches - top_k) + 1
    return (
        torch.empty(count, patches, dtype=relevance.dtype, device=relevance.device),
        torch.empty(count, patches, dtype=torch.bool, device=relevance.device),
        torch.empty(count, dtype=torch.int64, device=relevance.device),
        torch.empty(count, columns, dtype=torch.int64, device=relevance.device),
    )


def launch_patch_select(
    relevance: Tensor, threshold: float | None, top_k: int | None, context: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel. Arguments are those of `patch_select`, already checked.

    Args:
        relevance: float32 (N, P).
        threshold: of the object mask, or None.
        top_k: patches of the object mask, or None.
        context: mask everything but the object.

    Returns:
        The normalised map (N, P), the mask (N, P), the counts (N,) and the kept tokens, (N, 0) for a threshold.
    """
    out = _empty(relevance, top_k, context)
    run(plan_patch_select(*out, relevance, threshold=threshold, top_k=top_k, context=context))
    return out


@torch.library.custom_op(
    "cammask::patch_select",
    mutates_args=(),
    schema="(Tensor relevance, float? threshold, int? top_k, bool context) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _patch_select(
    relevance: Tensor, threshold: float | None, top_k: int | None, context: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if uses_triton("patch_select", relevance.device, patch_select_ineligible(relevance)):
        return launch_patch_select(relevance, threshold, top_k, context)
    selection = reference_patch_select(relevance, context=context, threshold=threshold, top_k=top_k)
    kept_tokens = selection.kept_tokens
    if kept_tokens is None:
        kept_tokens = torch.empty(relevance.shape[0], 0, dtype=torch.int64, device=relevance.device)
    return selection.normalised.contiguous(), selection.mask.contiguous(), selection.counts, kept_tokens


@_patch_select.register_fake
def _(relevance: Tensor, threshold: float | None, top_k: int | None, context: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(relevance, top_k, context)


@register_flop_formula(torch.ops.cammask.patch_select)
def _patch_select_flops(*_: Any, **__: Any) -> int:
    return 0


def patch_select(
    relevance: Tensor, *, context: bool = False, threshold: float | None = None, top_k: int | None = None
) -> PatchSelection:
    """Select the patches to mask. Source: paper section 3.3; top-k is an addition.

    Args:
        relevance: float32 (N, P), or float64 in plain PyTorch. In a map with a NaN every c is NaN: nothing is above a
            threshold, all tie in top_k.
        context: mask everything but the object.
        threshold: in [0, 1]; the object mask is c > threshold (strict), c = relevance / (max over patches + 1e-8).
        top_k: in 1..P; the object mask is the top_k highest, ties go to the lower patch index. Exactly one of threshold and
            top_k.

    Returns:
        The normalised map c, the mask, the number of masked patches per image, and with top_k the kept tokens.

    Raises:
        ValueError: naming the argument, for another rank, dtype or option value.
    """
    check_selection(relevance, threshold=threshold, top_k=top_k)
    normalised, mask, counts, kept_tokens = torch.ops.cammask.patch_select(relevance, threshold, top_k, context)
    return PatchSelection(normalised, mask, counts, None if top_k is None else kept_tokens)

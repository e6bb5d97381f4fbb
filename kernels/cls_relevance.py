"""One layer of the relevance rollout, read at the CLS row; nothing of size L x L reaches memory.

    r_out = r + (1 / A) sum over heads of r (P * relu(dO V^T)),   P = softmax(Q K^T / sqrt(d))

P and dP = dO V^T are recomputed tile by tile from q, k, v and dO, as in FlashAttention. With 16-bit inputs and up to 257
tokens a program has all keys of one head of one image: q, k, v and dO are read once, and the statistics of a row are at hand
with its scores. Otherwise a program has some of the keys and is given lse, or the statistics of a launch before it. The last
layer, where only the CLS row of dO is not zero, takes O(L d) per head.
Heads are averaged by whoever reads r next: the result of a layer is the r that it was given and what each head adds to it, and
all programs of the next layer sum that in the same order. So a layer is one launch, and as there are no atomics, equal inputs
give equal bits. Statistics keep a row's highest score and the logarithm of its sum apart, so that confident attention is as
exact as torch.softmax.
Source: MM-CAM's rollout R += A_bar R, of which only the CLS row is used (r A_bar, from the last layer to the first).
Shape letters: `kernels/__init__.py`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import uses_triton
from .launch import Launch, run
from .reference.cls_relevance import check_cls_relevance
from .reference.cls_relevance import cls_relevance as reference_cls_relevance

HEAD_WIDTHS = (32, 64)
MAX_LENGTH = 577
LOG2_E = tl.constexpr(1.4426950408889634)


class Tiles(NamedTuple):
    """A program owns block_keys keys and goes over block_queries queries at a time; a launch of statistics does the reverse."""

    block_keys: int
    block_queries: int
    num_warps: int
    num_stages: int


TILES = {
    # (bytes per element, head width): an inner loop of 32 pads little: 256 x 224 products for L = 197
    (2, 64): Tiles(64, 32, 4, 2),
    (2, 32): Tiles(64, 32, 4, 2),
    (4, 64): Tiles(32, 32, 4, 1),
    (4, 32): Tiles(32, 16, 8, 1),
}
"""Chosen by counted padding, registers and shared memory (see `cammask bench kernels --static`); not yet swept on a GPU."""

ALL_KEYS = {
    # block of keys
    256: Tiles(256, 32, 8, 2),
    128: Tiles(128, 32, 8, 2),
    64: Tiles(64, 32, 4, 2),
}
"""The same for 16-bit inputs where one program has all keys of a head."""
SHARED = 99 * 1024
"""Bytes of shared memory that a program can have on every GPU since sm_80; sm_80 itself has 163 KiB, sm_90 and sm_100 227."""


def all_keys(length: int, width: int, itemsize: int, shared: int = SHARED) -> tuple[Tiles, bool] | None:
    """Tiles with which one program takes all keys of a head.

    Args:
        length: L.
        width: d.
        itemsize: bytes per element of k.
        shared: bytes of shared memory that a program can have; it holds keys, values and the blocks of queries in flight.

    Returns:
        The tiles, and whether CLS goes beside them as a vector: 257 keys would pad a block of 512. None where there are too
        many keys or `shared` is too little.
    """
    apart = length > 64 and (length - 1) & (length - 2) == 0
    tiles = ALL_KEYS.get(max(64, triton.next_power_of_2(length - apart)))
    if (
        tiles is None
        or itemsize != 2
        or 2 * itemsize * width * (tiles.block_keys + tiles.num_stages * tiles.block_queries) + 4096 > shared
    ):
        return None
    return tiles, apart


@triton.jit
def _load_rows(ptr, stride_row, rows, length, HEAD_DIM: tl.constexpr):
    """Rows (BLOCK,) of a (length, HEAD_DIM) matrix, zero beyond the end."""
    columns = tl.arange(0, HEAD_DIM)
    return tl.load(ptr + rows[:, None] * stride_row + columns[None, :], mask=rows[:, None] < length, other=0.0)


@triton.jit
def _load_relevance(ptr, stride, added_ptr, tokens, heads, length, HAS_ADDED: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """r at some tokens (BLOCK,) of an image: what it was, and the mean over heads of what the layer above has added."""
    inside = tokens < length
    r = tl.load(ptr + tokens * stride, mask=inside, other=0.0)
    if HAS_ADDED:
        every = tl.arange(0, BLOCK_HEADS)[:, None]
        added_ptrs = added_ptr + every * length + tokens[None, :]
        added = tl.load(added_ptrs, mask=(every < heads) & inside[None, :], other=0.0)
        r += tl.sum(added, axis=0) / tl.full((), heads, tl.float32)
    return r


@triton.jit
def _cls_relevance_statistics_fwd_kernel(
    m_ptr, log_l_ptr, q_ptr, k_ptr,
    stride_q_n, stride_q_head, stride_q_l, stride_k_n, stride_k_head, stride_k_l,
    heads, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Highest raw score of a query's row, and log2 sum exp2 of the scaled distances to it; scale holds log2(e) / sqrt(d).

    The tiles are those of the sum over queries, (keys, queries) with the same edges: both round a score alike, as a probability
    needs that is exact where scores are huge."""
    tiles = tl.cdiv(length, BLOCK_Q)
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    queries = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load_rows(q_ptr + image * stride_q_n + head * stride_q_head, stride_q_l, queries, length, HEAD_DIM)
    k_base = k_ptr + image * stride_k_n + head * stride_k_head
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    scale = tl.full((), scale, tl.float32)
    for start in range(0, length, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = _load_rows(k_base, stride_k_l, keys, length, HEAD_DIM)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        scores = tl.where(keys[:, None] < length, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=0))
        total = total * tl.exp2((m - m_new) * scale)
        total += tl.sum(tl.exp2((scores - m_new[None, :]) * scale), axis=0)
        m = m_new
    offset = (image * heads + head) * length
    tl.store(m_ptr + offset + queries, m, mask=queries < length)
    tl.store(log_l_ptr + offset + queries, tl.log2(total), mask=queries < length)


@triton.jit
def _cls_relevance_fwd_kernel(
    out_ptr, out_added_ptr, relevance_ptr, added_ptr, q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, m_ptr, log_l_ptr,
    stride_relevance_n, stride_relevance_l,
    stride_q_n, stride_q_head, stride_q_l, stride_k_n, stride_k_head, stride_k_l,
    stride_v_n, stride_v_head, stride_v_l, stride_grad_n, stride_grad_head, stride_grad_l,
    stride_lse_n, stride_lse_head, stride_lse_l,
    heads, length, scale,
    STATISTICS: tl.constexpr, HAS_ADDED: tl.constexpr, CLS_APART: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """sum over queries i of r_i P_ij relu(dP_ij) for BLOCK_K keys j of one head; tiles are transposed, (keys, queries).

    STATISTICS: `lse` (given), `scratch` (m and log_l of the launch before) or `inside` (the tile has all keys). CLS_APART: key
    0 is a vector beside the tile. The first program of an image stores the r that all of them have summed.
    FLOAT32: its products take the registers that r would wait in; for 16 bits r waits, or shared memory grows by a third."""
    tiles = tl.cdiv(length - CLS_APART, BLOCK_K)
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    tile = tl.program_id(0) % tiles
    keys = CLS_APART + tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_base = k_ptr + image * stride_k_n + head * stride_k_head
    v_base = v_ptr + image * stride_v_n + head * stride_v_head
    k = _load_rows(k_base, stride_k_l, keys, length, HEAD_DIM)
    v = _load_rows(v_base, stride_v_l, keys, length, HEAD_DIM)
    if CLS_APART:
        columns = tl.arange(0, HEAD_DIM)
        k_cls = tl.load(k_base + columns).to(tl.float32)
        v_cls = tl.load(v_base + columns).to(tl.float32)
        total_cls = tl.full((), 0.0, tl.float32)
    q_base = q_ptr + image * stride_q_n + head * stride_q_head
    grad_base = grad_out_ptr + image * stride_grad_n + head * stride_grad_head
    offset = (image * heads + head) * length
    relevance_base = relevance_ptr + image * stride_relevance_n
    added_base = added_ptr
    if HAS_ADDED:
        added_base += image * heads * length
    scale = tl.full((), scale, tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    if FLOAT32:  # noqa: SIM102  (a constant: the branch is compiled or not)
        if (head == 0) & (tile == 0):
            for start in range(0, length, BLOCK_Q):
                tokens = start + tl.arange(0, BLOCK_Q)
                r_in = _load_relevance(
                    relevance_base, stride_relevance_l, added_base, tokens, heads, length, HAS_ADDED, BLOCK_HEADS
                )
                tl.store(out_ptr + image * length + tokens, r_in, mask=tokens < length)
    for start in range(0, length, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        q = _load_rows(q_base, stride_q_l, queries, length, HEAD_DIM)
        grad = _load_rows(grad_base, stride_grad_l, queries, length, HEAD_DIM)
        if not FLOAT32:
            r = _load_relevance(relevance_base, stride_relevance_l, added_base, queries, heads, length, HAS_ADDED, BLOCK_HEADS)
            if (head == 0) & (tile == 0):
                tl.store(out_ptr + image * length + queries, r, mask=queries < length)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        grads = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        if FLOAT32:
            r = _load_relevance(relevance_base, stride_relevance_l, added_base, queries, heads, length, HAS_ADDED, BLOCK_HEADS)
        if CLS_APART:
            scores_cls = tl.sum(q.to(tl.float32) * k_cls[None, :], axis=1)
            grads_cls = tl.sum(grad.to(tl.float32) * v_cls[None, :], axis=1)
        if STATISTICS == "inside":
            scores = tl.where(keys[:, None] < length, scores, float("-inf"))
            m = tl.max(scores, axis=0)
            if CLS_APART:
                m = tl.maximum(m, scores_cls)
            probabilities = tl.exp2((scores - m[None, :]) * scale)
            row_sum = tl.sum(probabilities, axis=0)
            if CLS_APART:
                probabilities_cls = tl.exp2((scores_cls - m) * scale)
                row_sum += probabilities_cls
            r = r / row_sum
        elif STATISTICS == "lse":
            lse_ptrs = lse_ptr + image * stride_lse_n + head * stride_lse_head + queries * stride_lse_l
            lse = tl.load(lse_ptrs, mask=queries < length, other=0.0).to(tl.float32) * LOG2_E
            exponents = scores * scale - lse[None, :]
            probabilities = tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))
            if CLS_APART:
                exponents_cls = scores_cls * scale - lse
                probabilities_cls = tl.exp2(tl.minimum(exponents_cls, 0.0, propagate_nan=tl.PropagateNan.ALL))
        else:
            m = tl.load(m_ptr + offset + queries, mask=queries < length, other=0.0)
            log_l = tl.load(log_l_ptr + offset + queries, mask=queries < length, other=0.0)
            exponents = (scores - m[None, :]) * scale - log_l[None, :]
            probabilities = tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))
        positive = tl.maximum(grads, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total += tl.sum(probabilities * positive * r[None, :], axis=1)
        if CLS_APART:
            total_cls += tl.sum(probabilities_cls * tl.maximum(grads_cls, 0.0, propagate_nan=tl.PropagateNan.ALL) * r)
    tl.store(out_added_ptr + offset + keys, total, mask=keys < length)
    if CLS_APART:
        tl.store(out_added_ptr + offset, total_cls)


@triton.jit
def _cls_relevance_row_fwd_kernel(
    out_ptr, out_added_ptr, relevance_ptr, added_ptr, q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr,
    stride_relevance_n, stride_relevance_l,
    stride_q_n, stride_q_head, stride_k_n, stride_k_head, stride_k_l,
    stride_v_n, stride_v_head, stride_v_l, stride_grad_n, stride_grad_head, stride_lse_n, stride_lse_head,
    heads, length, scale,
    HAS_LSE: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The last layer: one query, the CLS token, of one head of one image; products of vectors in float32."""
    image = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    columns = tl.arange(0, HEAD_DIM)
    scale = tl.full((), scale, tl.float32)
    q = tl.load(q_ptr + image * stride_q_n + head * stride_q_head + columns).to(tl.float32)
    grad = tl.load(grad_out_ptr + image * stride_grad_n + head * stride_grad_head + columns).to(tl.float32)
    k_base = k_ptr + image * stride_k_n + head * stride_k_head
    v_base = v_ptr + image * stride_v_n + head * stride_v_head
    relevance_base = relevance_ptr + image * stride_relevance_n
    added_base = added_ptr
    if HAS_ADDED:
        added_base += image * heads * length
    if HAS_LSE:
        m = tl.full((), 0.0, tl.float32)
        log_l = tl.load(lse_ptr + image * stride_lse_n + head * stride_lse_head).to(tl.float32) * LOG2_E
    else:
        m = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, length, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            k = _load_rows(k_base, stride_k_l, keys, length, HEAD_DIM).to(tl.float32)
            scores = tl.where(keys < length, tl.sum(k * q[None, :], axis=1), float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=0))
            total = total * tl.exp2((m - m_new) * scale)
            total += tl.sum(tl.exp2((scores - m_new) * scale), axis=0)
            m = m_new
        log_l = tl.log2(total)
    offset = (image * heads + head) * length
    first = tl.arange(0, 16)
    r_first = _load_relevance(relevance_base, stride_relevance_l, added_base, first, heads, length, HAS_ADDED, BLOCK_HEADS)
    r_cls = tl.sum(tl.where(first == 0, r_first, 0.0), axis=0)
    for start in range(0, length, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        if head == 0:
            r = _load_relevance(relevance_base, stride_relevance_l, added_base, keys, heads, length, HAS_ADDED, BLOCK_HEADS)
            tl.store(out_ptr + image * length + keys, r, mask=keys < length)
        k = _load_rows(k_base, stride_k_l, keys, length, HEAD_DIM).to(tl.float32)
        v = _load_rows(v_base, stride_v_l, keys, length, HEAD_DIM).to(tl.float32)
        scores = tl.sum(k * q[None, :], axis=1)
        exponents = (scores - m) * scale - log_l
        probabilities = tl.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))
        positive = tl.maximum(tl.sum(v * grad[None, :], axis=1), 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_added_ptr + offset + keys, probabilities * positive * r_cls, mask=keys < length)


def plan_cls_relevance(
    out: Tensor,
    out_added: Tensor,
    statistics: Tensor | None,
    relevance: Tensor,
    added: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor | None,
    *,
    shared: int = SHARED,
) -> list[Launch]:
    """The launches of one layer.

    Args:
        out: float32 (N, L), contiguous; written, r as it came down.
        out_added: float32 (N, A, L), contiguous; written, what each head adds to it.
        statistics: float32 (2, N, A, L), contiguous; scratch, row maxima and log sums. None unless `needs_statistics`.
        relevance: float32 (N, L), any strides.
        added: float32 (N, A, L), contiguous, what the heads of the layer above have added; None at the top.
        q: (N, A, L, d), or (N, A, 1, d) in the last layer; stride 1 along d, as k, v and grad_out.
        k: (N, A, L, d).
        v: (N, A, L, d).
        grad_out: shaped like q, the gradient at the attention output.
        lse: float32 (N, A, rows of q), natural log of the softmax denominators, or None.
        shared: bytes of shared memory that a program can have.

    Returns:
        Launches in their order, to be given to `launch.run`.
    """
    count, heads, length, width = k.shape
    rows = q.shape[2]
    common: dict[str, Any] = {
        "out_ptr": out,
        "out_added_ptr": out_added,
        "relevance_ptr": relevance,
        "added_ptr": added,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "grad_out_ptr": grad_out,
        "lse_ptr": lse,
        "stride_relevance_n": relevance.stride(0),
        "stride_relevance_l": relevance.stride(1),
        "stride_q_n": q.stride(0),
        "stride_q_head": q.stride(1),
        "stride_k_n": k.stride(0),
        "stride_k_head": k.stride(1),
        "stride_k_l": k.stride(2),
        "stride_v_n": v.stride(0),
        "stride_v_head": v.stride(1),
        "stride_v_l": v.stride(2),
        "stride_grad_n": grad_out.stride(0),
        "stride_grad_head": grad_out.stride(1),
        "stride_lse_n": 0 if lse is None else lse.stride(0),
        "stride_lse_head": 0 if lse is None else lse.stride(1),
        "heads": heads,
        "length": length,
        "scale": LOG2_E.value / math.sqrt(width),
        "HAS_ADDED": added is not None,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "HEAD_DIM": width,
    }
    if rows == 1:
        arguments = {**common, "HAS_LSE": lse is not None, "BLOCK_K": 64}
        row_options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        return [Launch(_cls_relevance_row_fwd_kernel, (count * heads,), arguments, row_options)]
    found = all_keys(length, width, k.dtype.itemsize, shared)
    tiles, apart = found or (TILES[k.dtype.itemsize, width], False)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    blocks = {"BLOCK_K": tiles.block_keys, "BLOCK_Q": tiles.block_queries, "PRECISION": "ieee"}  # 16-bit inputs ignore that
    launches = []
    if statistics is not None:
        names = ("q_ptr", "k_ptr", "stride_q_n", "stride_q_head", "stride_k_n", "stride_k_head", "stride_k_l", "heads",
                 "length", "scale", "HEAD_DIM")  # fmt: skip
        arguments = {"m_ptr": statistics[0], "log_l_ptr": statistics[1], "stride_q_l": q.stride(2)}
        arguments |= {name: common[name] for name in names} | blocks
        grid = (triton.cdiv(length, tiles.block_queries) * count * heads,)
        launches.append(Launch(_cls_relevance_statistics_fwd_kernel, grid, arguments, options))
    arguments = {
        **common,
        **blocks,
        "m_ptr": None if statistics is None else statistics[0],
        "log_l_ptr": None if statistics is None else statistics[1],
        "stride_q_l": q.stride(2),
        "stride_grad_l": grad_out.stride(2),
        "stride_lse_l": 0 if lse is None else lse.stride(2),
        "STATISTICS": "lse" if lse is not None else "scratch" if statistics is not None else "inside",
        "CLS_APART": int(apart),
        "FLOAT32": k.dtype == torch.float32,
    }
    grid = (triton.cdiv(length - apart, tiles.block_keys) * count * heads,)
    launches.append(Launch(_cls_relevance_fwd_kernel, grid, arguments, options))
    return launches


def needs_statistics(q: Tensor, k: Tensor, lse: Tensor | None, shared: int = SHARED) -> bool:
    """Whether a launch of row statistics has to come before that of a layer.

    Args:
        q: (N, A, L, d) or (N, A, 1, d).
        k: (N, A, L, d).
        lse: float32 (N, A, rows of q), or None.
        shared: bytes of shared memory that a program can have.

    Returns:
        False with `lse`, in the last layer, and where a program has all keys.
    """
    length, width = k.shape[2:]
    return lse is None and q.shape[2] > 1 and all_keys(length, width, k.dtype.itemsize, shared) is None


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _SHARED_MEMORY:
        properties = triton.runtime.driver.active.utils.get_device_properties(index)
        _SHARED_MEMORY[index] = int(properties["max_shared_mem"])
    return _SHARED_MEMORY[index]


_SHARED_MEMORY: dict[int, int] = {}
"""By the index of the GPU."""


def cls_relevance_ineligible(relevance: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> str | None:
    """Why the kernels cannot take a layer.

    Args:
        relevance: (N, L).
        q: (N, A, L, d) or (N, A, 1, d).
        k: (N, A, L, d).
        v: (N, A, L, d).
        grad_out: shaped like q.

    Returns:
        The reason in words; None if the kernels can take it.
    """
    if relevance.dtype != torch.float32:
        return f"relevance is {relevance.dtype}, the kernels take float32"
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"q, k, v are {k.dtype}, the kernels take float32, float16 and bfloat16"
    length, width = k.shape[2], k.shape[3]
    if width not in HEAD_WIDTHS:
        return f"heads are {width} wide, the kernels take {' and '.join(map(str, HEAD_WIDTHS))}"
    if length > MAX_LENGTH:
        return f"{length} tokens, the kernels take up to {MAX_LENGTH}"
    if relevance.stride(1) * (length - 1) >= 2**31:
        return "relevance spans 2**31 elements per image or more"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("grad_out", grad_out)):
        if tensor.stride(3) != 1:
            return f"{name} has stride {tensor.stride(3)} along the head, the kernels take 1"
        if tensor.stride(2) * (length - 1) >= 2**31 - width:
            return f"{name} spans 2**31 elements per head or more"
    return None


def launch_cls_relevance(
    relevance: Tensor, added: Tensor | None, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernels on one layer. Arguments are those of `cls_relevance_layer`, already checked.

    Args:
        relevance: float32 (N, L).
        added: float32 (N, A, L), contiguous, or None.
        q: (N, A, L, d) or (N, A, 1, d).
        k: (N, A, L, d).
        v: (N, A, L, d).
        grad_out: shaped like q.
        lse: float32 (N, A, rows of q), or None.

    Returns:
        float32 (N, L) and (N, A, L).
    """
    count, heads, length, _ = k.shape
    shared = _shared_memory(k.device)
    out = torch.empty(count, length, dtype=torch.float32, device=k.device)
    out_added = torch.empty(count, heads, length, dtype=torch.float32, device=k.device)
    needed = needs_statistics(q, k, lse, shared)
    statistics = torch.empty(2, count, heads, length, dtype=torch.float32, device=k.device) if needed else None
    run(plan_cls_relevance(out, out_added, statistics, relevance, added, q, k, v, grad_out, lse, shared=shared))
    return out, out_added


@torch.library.custom_op(
    "cammask::cls_relevance",
    mutates_args=(),
    schema="(Tensor relevance, Tensor? added, Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor? lse) -> (Tensor, Tensor)",
)
def _cls_relevance(
    relevance: Tensor, added: Tensor | None, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    if uses_triton("cls_relevance", k.device, cls_relevance_ineligible(relevance, q, k, v, grad_out)):
        added = None if added is None else added.contiguous()
        return launch_cls_relevance(relevance, added, q, k, v, grad_out, lse)
    out = reference_cls_relevance(averaged(relevance, added), q, k, v, grad_out, lse=lse).contiguous()
    return out, torch.zeros(k.shape[:3], dtype=out.dtype, device=k.device)  # plain PyTorch has averaged the heads


@_cls_relevance.register_fake
def _(
    relevance: Tensor, added: Tensor | None, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty(relevance.shape, dtype=relevance.dtype, device=relevance.device)
    return out, torch.empty(k.shape[:3], dtype=relevance.dtype, device=relevance.device)


def averaged(relevance: Tensor, added: Tensor | None) -> Tensor:
    """(N, L): r of what a layer has returned."""
    return relevance if added is None else relevance + added.mean(1)


@register_flop_formula(torch.ops.cammask.cls_relevance)
def cls_relevance_flops(
    relevance_shape: Any,
    added_shape: Any,
    q_shape: Any,
    k_shape: Any,
    v_shape: Any,
    grad_shape: Any,
    lse_shape: Any = None,
    **_: Any,
) -> int:
    """Floating-point operations of the operator, two per multiply-add.

    Counted are Q K^T, dO V^T and the sum over queries, as in the reference, and Q K^T once more where the kernels of 16-bit
    inputs have, without lse, a launch for row statistics.

    Args:
        relevance_shape: (N, L).
        added_shape: (N, A, L), or None.
        q_shape: (N, A, rows, d).
        k_shape: (N, A, L, d).
        v_shape: (N, A, L, d).
        grad_shape: shaped like q.
        lse_shape: (N, A, rows), or None.
        **_: what PyTorch's counter passes besides.

    Returns:
        The number of operations.
    """
    count, heads, length, width = k_shape
    rows = q_shape[2]
    product = 2 * count * heads * rows * length * width
    again = lse_shape is None and rows > 1 and all_keys(length, width, 2) is None
    return (3 if again else 2) * product + 2 * count * rows * length


def cls_relevance(relevance: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, lse: Tensor | None = None) -> Tensor:
    """One layer of the CLS row of the relevance rollout: r + r A_bar, A_bar = mean over heads of P * relu(dP).

    Source: MM-CAM, R += A_bar R, read at its CLS row.

    Args:
        relevance: float32 (N, L) (float64 in plain PyTorch), the row r that came down from the layers above; e_CLS at the top.
        q: float32, float16 or bfloat16 (N, A, L, d), or (N, A, 1, d) in the last layer, where only the CLS row of the gradient
            is not zero. Any strides; the kernels take stride 1 along d, as views of a packed projection have it, d = 32 or 64,
            and L up to 577.
        k: (N, A, L, d), as q.
        v: (N, A, L, d), as q.
        grad_out: shaped like q, the gradient of the class score at the attention output, before out_proj.
        lse: float32 (N, A, rows of q), natural log of the softmax denominators of the scores Q K^T / sqrt(d), if at hand.

    Returns:
        (N, L) in relevance's dtype, accumulated in float32; no gradient.

    Raises:
        ValueError: naming the argument, for other shapes, dtypes or devices.
    """
    return averaged(*cls_relevance_layer(relevance, None, q, k, v, grad_out, lse=lse))


def cls_relevance_layer(
    relevance: Tensor,
    added: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    *,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`cls_relevance` for a stack of layers, without a launch between two of them that averages the heads.

    A row r is the pair (relevance, added): `averaged` makes it relevance + mean over heads of added, and so does the next call.

    Args:
        relevance: (N, L), as `cls_relevance` takes it.
        added: (N, A, L) in relevance's dtype, what the heads of the layer above have added; None at the top.
        q: as for `cls_relevance`.
        k: as for `cls_relevance`.
        v: as for `cls_relevance`.
        grad_out: as for `cls_relevance`.
        lse: as for `cls_relevance`.

    Returns:
        r of the layer as such a pair.

    Raises:
        ValueError: naming the argument, on other shapes, dtypes or devices.
    """
    check_cls_relevance(relevance, q, k, v, grad_out, lse)
    if added is not None and (added.shape != k.shape[:3] or added.dtype != relevance.dtype or added.device != k.device):
        found = f"{added.dtype} {tuple(added.shape)} on {added.device}"
        raise ValueError(f"added: expected {relevance.dtype} {tuple(k.shape[:3])} on {k.device}, got {found}")
    result: tuple[Tensor, Tensor] = torch.ops.cammask.cls_relevance(relevance, added, q, k, v, grad_out, lse)
    return result

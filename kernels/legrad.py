"""One layer of LeGrad's sum over queries; nothing of size L x L reaches memory, and there is no softmax.

    t_out = t + sum over queries of relu(dO V^T),   per head

dO V^T is the gradient of a class score at the attention probabilities, with dO the gradient at the attention output. Its tiles
are computed, clipped and summed where they are. Heads and queries are averaged by whoever reads the last layer's sum, and each
program adds to the numbers that it owns: a layer is one launch without atomics, and equal inputs give equal bits.
Source: LeGrad (ICCV 2025), relu of the gradient at the attention map, averaged over heads and queries, summed over layers.
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
from .cls_relevance import ALL_KEYS, HEAD_WIDTHS, MAX_LENGTH, TILES, Tiles, _load_rows
from .launch import Launch, run
from .reference.legrad import check_legrad
from .reference.legrad import legrad as reference_legrad


@triton.jit
def _legrad_fwd_kernel(
    out_ptr, total_ptr, v_ptr, grad_out_ptr,
    stride_v_n, stride_v_head, stride_v_l, stride_grad_n, stride_grad_head, stride_grad_l,
    heads, length,
    ONE_ROW: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """t + sum over queries i of relu(dP_ij) for BLOCK_K keys j of one head of one image; tiles are (keys, queries). Queries
    beyond the end are zero and add nothing. ONE_ROW: the CLS query alone, a product of vectors in float32."""
    tiles = tl.cdiv(length, BLOCK_K)
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    keys = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    v = _load_rows(v_ptr + image * stride_v_n + head * stride_v_head, stride_v_l, keys, length, HEAD_DIM)
    grad_base = grad_out_ptr + image * stride_grad_n + head * stride_grad_head
    if ONE_ROW:
        grad = tl.load(grad_base + tl.arange(0, HEAD_DIM)).to(tl.float32)
        total = tl.maximum(tl.sum(v.to(tl.float32) * grad[None, :], axis=1), 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        positive = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)  # summed over queries once, at the end
        for start in range(0, length, BLOCK_Q):
            grad = _load_rows(grad_base, stride_grad_l, start + tl.arange(0, BLOCK_Q), length, HEAD_DIM)
            grads = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            positive += tl.maximum(grads, 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = tl.sum(positive, axis=1)
    offset = (image * heads + head) * length
    if HAS_TOTAL:
        total += tl.load(total_ptr + offset + keys, mask=keys < length, other=0.0)
    tl.store(out_ptr + offset + keys, total, mask=keys < length)


def tiles_for(length: int, width: int, itemsize: int) -> Tiles:
    """Tiles of a launch. Each program reads all of dO, so that few are good; keys that fill up a block are computed in vain.

    Args:
        length: L.
        width: d.
        itemsize: bytes per element of v.

    Returns:
        For 16 bits the largest of `ALL_KEYS` that pads the keys by half at most, else the smallest; for float32 `TILES`.
    """
    if itemsize != 2:
        return TILES[itemsize, width]
    fitting = [block for block in ALL_KEYS if 2 * triton.cdiv(length, block) * block <= 3 * length]
    return ALL_KEYS[max(fitting, default=min(ALL_KEYS))]


def plan_legrad(out: Tensor, total: Tensor | None, v: Tensor, grad_out: Tensor) -> list[Launch]:
    """The launch of one layer.

    Args:
        out: float32 (N, A, L), contiguous; written.
        total: float32 (N, A, L), contiguous, the layers before; None is zero.
        v: (N, A, L, d); stride 1 along d, as grad_out.
        grad_out: (N, A, L, d) or (N, A, 1, d).

    Returns:
        Launches in their order, to be given to `launch.run`.
    """
    count, heads, length, width = v.shape
    tiles = tiles_for(length, width, v.dtype.itemsize)
    arguments: dict[str, Any] = {
        "out_ptr": out,
        "total_ptr": total,
        "v_ptr": v,
        "grad_out_ptr": grad_out,
        "stride_v_n": v.stride(0),
        "stride_v_head": v.stride(1),
        "stride_v_l": v.stride(2),
        "stride_grad_n": grad_out.stride(0),
        "stride_grad_head": grad_out.stride(1),
        "stride_grad_l": grad_out.stride(2),
        "heads": heads,
        "length": length,
        "ONE_ROW": grad_out.shape[2] == 1,
        "HAS_TOTAL": total is not None,
        "HEAD_DIM": width,
        "BLOCK_K": tiles.block_keys,
        "BLOCK_Q": tiles.block_queries,
        "PRECISION": "ieee",  # 16-bit inputs ignore that
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    return [Launch(_legrad_fwd_kernel, (triton.cdiv(length, tiles.block_keys) * count * heads,), arguments, options)]


def legrad_ineligible(v: Tensor, grad_out: Tensor) -> str | None:
    """Why the kernel cannot take a layer, in words; None if it can. Arguments as for `legrad`."""
    if v.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"v is {v.dtype}, the kernel takes float32, float16 and bfloat16"
    length, width = v.shape[2:]
    if width not in HEAD_WIDTHS:
        return f"heads are {width} wide, the kernel takes {' and '.join(map(str, HEAD_WIDTHS))}"
    if length > MAX_LENGTH:
        return f"{length} tokens, the kernel takes up to {MAX_LENGTH}"
    for name, tensor in (("v", v), ("grad_out", grad_out)):
        if tensor.stride(3) != 1:
            return f"{name} has stride {tensor.stride(3)} along the head, the kernel takes 1"
        if tensor.stride(2) * (length - 1) >= 2**31 - width:
            return f"{name} spans 2**31 elements per head or more"
    return None


@torch.library.custom_op(
    "cammask::legrad",
    mutates_args=(),
    schema="(Tensor? total, Tensor v, Tensor grad_out) -> Tensor",
)
def _legrad(total: Tensor | None, v: Tensor, grad_out: Tensor) -> Tensor:
    if not uses_triton("legrad", v.device, legrad_ineligible(v, grad_out)):
        return reference_legrad(total, v, grad_out).contiguous()
    out = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
    run(plan_legrad(out, None if total is None else total.contiguous(), v, grad_out))
    return out


@_legrad.register_fake
def _(total: Tensor | None, v: Tensor, grad_out: Tensor) -> Tensor:
    return torch.empty(v.shape[:3], dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)


@register_flop_formula(torch.ops.cammask.legrad)
def legrad_flops(total_shape: Any, v_shape: Any, grad_shape: Any, **_: Any) -> int:
    """Floating-point operations of dO V^T, two per multiply-add.

    Args:
        total_shape: (N, A, L), or None.
        v_shape: (N, A, L, d).
        grad_shape: (N, A, rows, d).
        **_: what PyTorch's counter passes besides.

    Returns:
        The number of operations.
    """
    count, heads, length, width = v_shape
    return int(2 * count * heads * grad_shape[2] * length * width)


def legrad(total: Tensor | None, v: Tensor, grad_out: Tensor) -> Tensor:
    """One layer of LeGrad's sum: total + sum over queries of relu(dP), dP = grad_out v^T.

    Source: LeGrad (ICCV 2025); dP is the gradient at the attention probabilities.

    Args:
        total: float32 (N, A, L) (float64 for float64, in plain PyTorch), the layers before; None is zero.
        v: float32, float16 or bfloat16 (N, A, L, d). Any strides; the kernel takes stride 1 along d, as views of a packed
            projection have it, d = 32 or 64, and L up to 577.
        grad_out: (N, A, L, d), or (N, A, 1, d) where only the CLS row is not zero: the gradient of a class score at the
            attention output, before out_proj.

    Returns:
        (N, A, L), accumulated in float32; no gradient.

    Raises:
        ValueError: naming the argument, for other shapes, dtypes or devices.
    """
    check_legrad(total, v, grad_out)
    result: Tensor = torch.ops.cammask.legrad(total, v, grad_out)
    return result

"""The CLS row of the relevance rollout, one layer at a time, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cls_relevance(
    relevance_NL: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, lse: Tensor | None = None
) -> Tensor:
    """r + r A_bar, with A_bar = mean over heads of P * relu(dP), P = softmax(q k^T / sqrt(d)), dP = grad_out v^T.

    Source: MM-CAM, R += A_bar R, read at its CLS row (r A instead of A R).

    Args:
        relevance_NL: float (N, L), the row r that came down from the layers above; e_CLS at the top.
        q: float (N, A, L, d), or (N, A, 1, d) in the last layer, where only the CLS row of the gradient is not zero.
        k: (N, A, L, d).
        v: (N, A, L, d).
        grad_out: shaped like q, the gradient of the class score at the attention output, before out_proj.
        lse: (N, A, rows of q), natural log of the softmax denominators, if at hand. 16-bit scores do without: theirs are
            those of rounded scores.

    Returns:
        (N, L) in relevance_NL's dtype.

    Raises:
        ValueError: for mismatched shapes, dtypes or devices.
    """
    check_cls_relevance(relevance_NL, q, k, v, grad_out, lse)
    rows, width = q.shape[2], q.shape[3]
    scores = (q @ k.mT).mul_(width**-0.5)  # (N, A, rows, L); fresh memory costs a CPU as much as the arithmetic: in place
    if lse is not None and lse.dtype == scores.dtype:
        probabilities = scores.sub_(lse[..., None]).clamp_(max=0).exp_()
    else:
        probabilities = torch.softmax(scores, dim=-1)
    attended = probabilities.mul_((grad_out @ v.mT).relu_()).mean(1).to(relevance_NL.dtype)  # (N, rows, L)
    return relevance_NL + (relevance_NL[:, None, :rows] @ attended)[:, 0]


def check_cls_relevance(
    relevance: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor | None = None
) -> None:
    """Check the arguments of `cls_relevance`: shapes, dtypes and devices, no values.

    Args:
        relevance: expected float (N, L).
        q: expected (N, A, L, d) or (N, A, 1, d).
        k: expected float (N, A, L, d).
        v: expected like k.
        grad_out: expected like q.
        lse: expected (N, A, rows of q) or None.

    Raises:
        ValueError: naming the argument.
    """
    if k.ndim != 4 or not k.is_floating_point():
        raise ValueError(f"k: expected float (N, A, L, d), got {k.dtype} {tuple(k.shape)}")
    count, heads, length, width = k.shape
    rows = q.shape[2] if q.ndim == 4 else 0
    if relevance.shape != (count, length):
        raise ValueError(f"relevance: expected ({count}, {length}) to match k, got {tuple(relevance.shape)}")
    if relevance.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"relevance: expected float32, got {relevance.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if rows not in (1, length) or q.shape != (count, heads, rows, width):
        raise ValueError(f"q: expected ({count}, {heads}, {length} or 1, {width}), got {tuple(q.shape)}")
    if grad_out.shape != q.shape:
        raise ValueError(f"grad_out: expected q's shape {tuple(q.shape)}, got {tuple(grad_out.shape)}")
    if lse is not None and (lse.shape != (count, heads, rows) or lse.dtype != relevance.dtype):
        raise ValueError(f"lse: expected {relevance.dtype} ({count}, {heads}, {rows}), got {lse.dtype} {tuple(lse.shape)}")
    for name, tensor in (("q", q), ("v", v), ("grad_out", grad_out)):
        if tensor.dtype != k.dtype:
            raise ValueError(f"{name}: expected k's dtype {k.dtype}, got {tensor.dtype}")
    for name, other in (("relevance", relevance), ("q", q), ("v", v), ("grad_out", grad_out), ("lse", lse)):
        if other is not None and other.device != k.device:
            raise ValueError(f"{name}: expected the device of k, {k.device}, got {other.device}")

"""The CLS row of the relevance rollout, one layer at a time, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cls_relevance(relevance_NL: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> Tensor:
    """r + r A_bar, with A_bar = mean over heads of P * relu(dP), P = softmax(q k^T / sqrt(d)), dP = grad_out v^T.

    relevance_NL: (N, L), the row r that came down from the layers above (e_CLS at the top). k, v: (N, A, L, d). q, grad_out:
    (N, A, L, d), or (N, A, 1, d) in the last layer, where only the CLS row of the gradient is non-zero; grad_out is the
    gradient of the class score at the attention output, before out_proj. Returns (N, L) in relevance_NL's dtype.
    Raises ValueError on mismatched shapes. Source: MM-CAM rules read at the CLS row only (r A instead of A R).
    """
    count, heads, length, width = k.shape
    rows = q.shape[2]
    if relevance_NL.shape != (count, length):
        raise ValueError(f"relevance: expected ({count}, {length}) to match k, got {tuple(relevance_NL.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if rows not in (1, length) or q.shape != (count, heads, rows, width):
        raise ValueError(f"q: expected ({count}, {heads}, {length} or 1, {width}), got {tuple(q.shape)}")
    if grad_out.shape != q.shape:
        raise ValueError(f"grad_out: expected q's shape {tuple(q.shape)}, got {tuple(grad_out.shape)}")
    probabilities = torch.softmax(q @ k.mT * width**-0.5, dim=-1)  # (N, A, rows, L)
    attended = (probabilities * torch.relu(grad_out @ v.mT)).mean(1)  # (N, rows, L)
    return relevance_NL + (relevance_NL[:, None, :rows] @ attended)[:, 0]

"""One layer of LeGrad's sum, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def legrad(total: Tensor | None, v: Tensor, grad_out: Tensor) -> Tensor:
    """total + sum over queries of relu(dP), dP = grad_out v^T: the gradient at the attention probabilities, of one layer.

    Source: LeGrad (ICCV 2025). Its map is the mean over heads and queries of this sum over layers.

    Args:
        total: float32 (N, A, L), float64 for float64; the layers before. None is zero.
        v: float (N, A, L, d).
        grad_out: (N, A, L, d), or (N, A, 1, d) where only the CLS row is not zero: the gradient of a class score at the
            attention output, before out_proj.

    Returns:
        (N, A, L), in float32 or float64.

    Raises:
        ValueError: for mismatched shapes, dtypes or devices.
    """
    check_legrad(total, v, grad_out)
    dtype = torch.promote_types(v.dtype, torch.float32)
    added = (grad_out @ v.mT).relu_().sum(2, dtype=dtype)
    return added if total is None else total + added


def check_legrad(total: Tensor | None, v: Tensor, grad_out: Tensor) -> None:
    """Check the arguments of `legrad`: shapes, dtypes and devices, no values.

    Args:
        total: expected float32 (N, A, L), float64 for float64, or None.
        v: expected float (N, A, L, d).
        grad_out: expected (N, A, L, d) or (N, A, 1, d), of v's dtype.

    Raises:
        ValueError: naming the argument.
    """
    if v.ndim != 4 or not v.is_floating_point():
        raise ValueError(f"v: expected float (N, A, L, d), got {v.dtype} {tuple(v.shape)}")
    count, heads, length, width = v.shape
    rows = grad_out.shape[2] if grad_out.ndim == 4 else 0
    if rows not in (1, length) or grad_out.shape != (count, heads, rows, width):
        raise ValueError(f"grad_out: expected ({count}, {heads}, {length} or 1, {width}), got {tuple(grad_out.shape)}")
    if grad_out.dtype != v.dtype:
        raise ValueError(f"grad_out: expected v's dtype {v.dtype}, got {grad_out.dtype}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    if total is not None and (total.shape != v.shape[:3] or total.dtype != dtype):
        raise ValueError(f"total: expected {dtype} {tuple(v.shape[:3])}, got {total.dtype} {tuple(total.shape)}")
    for name, other in (("grad_out", grad_out), ("total", total)):
        if other is not None and other.device != v.device:
            raise ValueError(f"{name}: expected the device of v, {v.device}, got {other.device}")

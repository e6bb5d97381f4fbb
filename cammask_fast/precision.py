"""The type of the products: bf16, tf32 or fp32; everything that decides a result stays float32."""

from __future__ import annotations

import torch

from cammask_fast.config import Precision


def resolve(precision: Precision, device: torch.device | str) -> Precision:
    """`auto` is bf16 on a CUDA device and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def compute_dtype(precision: Precision, weights: torch.Tensor) -> torch.dtype:
    """bfloat16, or the weights' own type. precision: as in `TrainConfig`."""
    return torch.bfloat16 if resolve(precision, weights.device) == "bf16" else weights.dtype


def set_matmul_precision(precision: str) -> None:
    """Let float32 products run on TF32 matrix units, or forbid it, for the whole process. Without CUDA it changes nothing.

    By `allow_tf32` alone: it sets the state of the newer `fp32_precision` too. After a setter of that one,
    `torch.get_float32_matmul_precision` and the getters of `allow_tf32`, which others read, would raise.
    """
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed

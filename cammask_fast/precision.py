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
    """Let float32 products run on TF32 matrix units, or forbid it, for the whole process. Without CUDA it changes nothing."""
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]

"""The type of the products: bf16, tf32 or fp32; everything that decides a result stays float32."""

from __future__ import annotations

from functools import cache

import torch

from cammask_fast.config import Precision
from cammask_fast.runtime.notices import remark

BF16_SINCE = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bf16 products; older ones emulate them slowly."""


def resolve(precision: Precision, device: torch.device | str) -> Precision:
    """`auto` is bf16 on a CUDA device that has it, and fp32 elsewhere; on an older GPU that is said once."""
    if precision != "auto":
        return precision
    if torch.device(device).type != "cuda":
        return "fp32"
    older = _older_gpu(torch.device(device).index)
    if older:
        _say_once(older)
    return "fp32" if older else "bf16"


def _older_gpu(index: int | None) -> str:
    """A GPU without bf16 in words; empty for one that has it, and for AMD's."""
    if torch.version.hip or torch.cuda.get_device_capability(index) >= BF16_SINCE:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}) has no bf16 products: --precision auto is fp32 here"


@cache
def _say_once(message: str) -> None:
    remark(message)


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

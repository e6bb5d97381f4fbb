"""How fast this machine multiplies matrices: the yardstick for the arithmetic of a step."""

from __future__ import annotations

import torch

from bench.records import Function

SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices: large enough for the full rate, short enough to be timed between two steps."""


def matrix_product(device: str, precision: str) -> tuple[Function, int]:
    """A product of two square matrices and its floating-point operations. device: cpu or cuda. precision: bf16, tf32 or fp32;
    whether float32 runs on TF32 units is the process's setting (`precision.set_matmul_precision`)."""
    side, dtype = SIDE[device], torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3

"""legrad: Triton against PyTorch (eager, compiled) on a GPU; the reference against autograd through the attention on a CPU.

Run: python -m pytest bench/kernels/bench_legrad.py --benchmark-only. Outputs are compared before anything is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels.bench_cls_relevance import CPU_ONLY, CUDA_ONLY, SHAPES, cores, layer, measure
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.legrad import legrad, legrad_flops
from cammask_fast.kernels.reference import legrad as reference_legrad

__all__ = ["cores"]  # a fixture


def inputs_of(count: int, length: int, heads: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded inputs of one layer.

    Args:
        count: images, N.
        length: tokens, L.
        heads: A.
        device: of the tensors.
        dtype: of v and grad_out.

    Returns:
        total, v and grad_out.
    """
    relevance, _, _, v, grad_out = layer(count, length, heads, device, dtype)
    return relevance[:, None].repeat(1, heads, 1), v, grad_out


def check(ours: Tensor, inputs: tuple[Tensor, Tensor, Tensor], pytorch: Tensor) -> None:
    """Assert that the error against float64 is at most twice PyTorch's in the same dtype, plus one float32 epsilon of the
    largest value.

    Args:
        ours: the kernel's result.
        inputs: from `inputs_of`.
        pytorch: the reference's result in the same dtype.
    """
    gold = reference_legrad(*(x[:2].double() for x in inputs))
    error, allowed = ((x[:2].double() - gold).abs().max().item() for x in (ours, pytorch))
    assert error <= 2 * allowed + torch.finfo(torch.float32).eps * gold.abs().max().item()


def by_autograd(total: Tensor, v: Tensor, grad_out: Tensor) -> Tensor:
    """The same with the whole gradient at the attention probabilities, as published implementations have it.

    Args:
        total: (N, A, L).
        v: (N, A, L, d).
        grad_out: (N, A, L, d).

    Returns:
        (N, A, L).
    """
    probabilities = torch.zeros(*v.shape[:3], v.shape[2], dtype=v.dtype, device=v.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(probabilities @ v, probabilities, grad_out)
    return total + gradient.clamp(min=0).sum(2)


@CUDA_ONLY
@pytest.mark.parametrize("provider", ["triton", "reference", "compiled"])
@pytest.mark.parametrize("count", [64, 512])
@pytest.mark.parametrize("model", SHAPES)
def test_legrad_cuda(benchmark: Any, model: str, count: int, provider: str) -> None:
    inputs = inputs_of(count, *SHAPES[model], "cuda", torch.bfloat16)
    flops, pytorch = legrad_flops(*(x.shape for x in inputs)), reference_legrad(*inputs)
    functions = {"triton": legrad, "reference": reference_legrad, "compiled": torch.compile(reference_legrad)}
    previous = set_backend("triton")
    check(functions[provider](*inputs), inputs, pytorch)
    measure(benchmark, lambda: functions[provider](*inputs), flops)
    set_backend(previous)


@CPU_ONLY
@pytest.mark.parametrize("provider", ["reference", "autograd"])
@pytest.mark.parametrize("model", ["ViT-B/32", "ViT-B/16"])
@pytest.mark.usefixtures("cores")
def test_legrad_cpu(benchmark: Any, model: str, provider: str) -> None:
    inputs = inputs_of(4, *SHAPES[model], "cpu", torch.float32)
    torch.testing.assert_close(legrad(*inputs), by_autograd(*inputs))
    function = by_autograd if provider == "autograd" else legrad
    measure(benchmark, lambda: function(*inputs), legrad_flops(*(x.shape for x in inputs)))

"""cls_relevance: Triton against PyTorch (eager, compiled) on a GPU; the reference against the L x L rollout on a CPU.

Run: python -m pytest bench/kernels/bench_cls_relevance.py --benchmark-only. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels.cpu import rollout_op_by_op
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import cls_relevance, cls_relevance_flops
from cammask_fast.kernels.reference import cls_relevance as reference_cls_relevance

SHAPES = {"ViT-B/32": (50, 12), "ViT-B/16": (197, 12), "ViT-L/14": (257, 16)}
WIDTH = 64
CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path is measured on a machine without a GPU")


def layer(count: int, length: int, heads: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Seeded inputs of one layer; q, k and v are views of a packed projection.

    Args:
        count: images, N.
        length: tokens, L.
        heads: A.
        device: of the tensors.
        dtype: of q, k, v and grad_out.

    Returns:
        relevance, q, k, v and grad_out.
    """
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(count, length, 3 * heads * WIDTH, generator=generator).to(device, dtype)
    q, k, v = (part.unflatten(-1, (heads, WIDTH)).transpose(1, 2) for part in packed.chunk(3, -1))
    grad_out = torch.randn(count, heads, length, WIDTH, generator=generator).to(device, dtype)
    return torch.rand(count, length, generator=generator).to(device), q, k, v, grad_out


def check(ours: Tensor, inputs: tuple[Tensor, ...], pytorch: Tensor) -> None:
    """Assert that the error against float64 is at most twice PyTorch's in the same dtype, plus one float32 epsilon of the
    largest value.

    Args:
        ours: the kernel's result.
        inputs: from `layer`.
        pytorch: the reference's result in the same dtype.
    """
    gold = reference_cls_relevance(*(x[:2].double() for x in inputs))
    error, allowed = ((x[:2].double() - gold).abs().max().item() for x in (ours, pytorch))
    assert error <= 2 * allowed + torch.finfo(torch.float32).eps * gold.abs().max().item()


def measure(benchmark: Any, function: Callable[[], Tensor], flops: int) -> None:
    """Time a function after a warm-up, waiting for the GPU where there is one; achieved TFLOP/s goes into the record.

    Args:
        benchmark: pytest-benchmark's fixture.
        function: to time.
        flops: floating-point operations of a call.
    """

    def waiting() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(waiting, rounds=15, warmup_rounds=3)
    benchmark.extra_info["tflop_per_s"] = flops / benchmark.stats.stats.median / 1e12


@pytest.fixture
def cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@CUDA_ONLY
@pytest.mark.parametrize("provider", ["triton", "reference", "compiled"])
@pytest.mark.parametrize("count", [64, 512])
@pytest.mark.parametrize("model", SHAPES)
def test_cls_relevance_cuda(benchmark: Any, model: str, count: int, provider: str) -> None:
    inputs = layer(count, *SHAPES[model], "cuda", torch.bfloat16)
    flops = cls_relevance_flops(*(x.shape for x in inputs))
    pytorch = reference_cls_relevance(*inputs)
    if provider == "triton":
        previous = set_backend("triton")
        check(cls_relevance(*inputs), inputs, pytorch)
        measure(benchmark, lambda: cls_relevance(*inputs), flops)
        set_backend(previous)
        return
    function = torch.compile(reference_cls_relevance) if provider == "compiled" else reference_cls_relevance
    check(function(*inputs), inputs, pytorch)
    measure(benchmark, lambda: function(*inputs), flops)


@CPU_ONLY
@pytest.mark.parametrize("provider", ["reference", "op-by-op"])
@pytest.mark.parametrize("model", ["ViT-B/32", "ViT-B/16"])
@pytest.mark.usefixtures("cores")
def test_cls_relevance_cpu(benchmark: Any, model: str, provider: str) -> None:
    """One layer; op by op carries the whole (N, L, L) rollout and multiplies it."""
    length, heads = SHAPES[model]
    inputs = layer(4, length, heads, "cpu", torch.float32)
    rollout = torch.eye(length).expand(4, length, length).contiguous()
    top = torch.zeros(4, length).index_fill(1, torch.tensor([0]), 1.0)
    whole = rollout_op_by_op(rollout, *inputs[1:])
    torch.testing.assert_close(cls_relevance(top, *inputs[1:]), whole)
    function = rollout_op_by_op if provider == "op-by-op" else cls_relevance
    first = rollout if provider == "op-by-op" else top
    measure(benchmark, lambda: function(first, *inputs[1:]), cls_relevance_flops(*(x.shape for x in inputs)))

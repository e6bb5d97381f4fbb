"""patch_select: Triton against PyTorch (eager, compiled) on a GPU; the reference against operators in a chain on a CPU.

Run: python -m pytest bench/kernels/bench_patch_select.py --benchmark-only. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.patch_select import patch_select
from cammask_fast.kernels.reference import PatchSelection
from cammask_fast.kernels.reference import patch_select as reference_patch_select

PATCHES = {"ViT-B/32": 49, "ViT-B/16": 196, "ViT-L/14": 256}
CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path is measured on a machine without a GPU")


def maps(count: int, patches: int, device: str) -> Tensor:
    """Seeded maps with ties, as a map that is mostly zero has them.

    Args:
        count: images, N.
        patches: per image, P.
        device: of the maps.

    Returns:
        float32 (N, P).
    """
    relevance = torch.rand(count, patches, generator=torch.Generator().manual_seed(0)) - 0.3
    return relevance.clamp_min_(0).to(device)


def select_op_by_op(relevance: Tensor, top_k: int) -> PatchSelection:
    """Object mask of the top_k patches and the kept tokens: one stable sort of the map, a scatter, and a sort of the rest."""
    normalised = relevance / (relevance.amax(1, keepdim=True) + 1e-8)
    order = torch.argsort(normalised, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(normalised, dtype=torch.bool).scatter(1, order[:, :top_k], True)
    kept = torch.sort(order[:, top_k:], dim=1).values + 1
    return PatchSelection(normalised, mask, mask.sum(1), torch.cat([torch.zeros_like(kept[:, :1]), kept], 1))


def moved_bytes(selection: PatchSelection) -> int:
    """The floor: the map read once, every output written once."""
    written = sum(output.numel() * output.itemsize for output in selection if output is not None)
    return selection.normalised.numel() * 4 + written


def check(ours: PatchSelection, expected: PatchSelection) -> None:
    """Bit for bit, every output."""
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine, theirs)


def measure(benchmark: Any, function: Callable[[], PatchSelection]) -> None:
    """Time `function` after a warm-up, waiting for the GPU where there is one; achieved GB/s goes into the record."""

    def waiting() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    moved = moved_bytes(function())
    benchmark.pedantic(waiting, rounds=50, warmup_rounds=5)
    benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9


@pytest.fixture
def threads() -> Iterator[None]:
    """All cores, as the CPU path of the demo has them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """The op runs its kernel or raises."""
    previous = set_backend("triton")
    yield
    set_backend(previous)


@CUDA_ONLY
@pytest.mark.parametrize("provider", ["triton", "reference", "compiled"])
@pytest.mark.parametrize("count", [512, 64])
@pytest.mark.parametrize("arch", PATCHES)
@pytest.mark.parametrize("by", ["threshold", "top-k"])
@pytest.mark.usefixtures("triton_backend")
def test_patch_select(benchmark: Any, arch: str, count: int, provider: str, by: str) -> None:
    relevance = maps(count, PATCHES[arch], "cuda")
    options: dict[str, Any] = {"threshold": 0.3} if by == "threshold" else {"top_k": PATCHES[arch] // 2}
    functions: dict[str, Callable[[], PatchSelection]] = {
        "triton": lambda: patch_select(relevance, **options),
        "reference": lambda: reference_patch_select(relevance, **options),
        "compiled": torch.compile(lambda: reference_patch_select(relevance, **options)),
    }
    check(functions["triton"](), functions["reference"]())
    measure(benchmark, functions[provider])


@CPU_ONLY
@pytest.mark.parametrize("provider", ["reference", "op-by-op"])
@pytest.mark.parametrize("patches", PATCHES.values())
@pytest.mark.usefixtures("threads")
def test_patch_select_on_a_cpu(benchmark: Any, patches: int, provider: str) -> None:
    relevance = maps(64, patches, "cpu")
    functions: dict[str, Callable[[], PatchSelection]] = {
        "reference": lambda: patch_select(relevance, top_k=patches // 2),
        "op-by-op": lambda: select_op_by_op(relevance, patches // 2),
    }
    check(functions["reference"](), functions["op-by-op"]())
    measure(benchmark, functions[provider])

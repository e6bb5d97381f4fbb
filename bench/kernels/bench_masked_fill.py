"""normalise, masked_fill and counterfactual_batch: Triton against PyTorch on a GPU; reference against op-by-op on a CPU.

Run: python -m pytest bench/kernels/bench_masked_fill.py --benchmark-only. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels.op_by_op import counterfactual_op_by_op
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference.counterfactual_batch import counterfactual_batch as counterfactual_reference
from cammask_fast.kernels.reference.masked_fill import normalised_fill
from cammask_fast.kernels.reference.normalise import normalise as normalise_reference

SIDE = 224
THRESHOLD = 0.3
PATCH_SIZES = {"ViT-B/32": 32, "ViT-B/16": 16, "ViT-L/14": 14}
CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path is measured on a machine without a GPU")


def inputs(count: int, patches: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded images, map and donors.

    Args:
        count: images, N.
        patches: per image, P.
        device: of the tensors.

    Returns:
        uint8 (N, 224, 224, 3), float32 (N, P) and int64 (N,), single-fill.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    relevance = torch.rand(count, patches, generator=generator)
    donors = torch.randperm(count, generator=generator)
    return images.to(device), relevance.to(device), donors.to(device)


def moved_bytes(count: int, patches: int, dtype: torch.dtype) -> int:
    """The least traffic: every output pixel read once as a byte and written once, the map and the donors read once.

    Args:
        count: images, N.
        patches: per image, P.
        dtype: of the result.

    Returns:
        Bytes.
    """
    return count * (3 * SIDE * SIDE * (1 + dtype.itemsize) + patches * 4 + 8)


@pytest.fixture
def threads() -> Iterator[None]:
    """All cores, as the CPU path of the demo has them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def check(ours: Tensor, pytorch: Tensor, gold: Tensor) -> None:
    """Assert that the largest error is at most twice PyTorch's in the same dtype.

    Args:
        ours: the kernel's result.
        pytorch: the reference's result in the same dtype.
        gold: the reference's result in float64.
    """
    assert (ours.double() - gold).abs().max() <= 2 * (pytorch.double() - gold).abs().max()


def measure(benchmark: Any, function: Callable[[], Tensor], moved: int) -> None:
    """Time a function after a warm-up, waiting for the GPU where there is one; achieved GB/s goes into the record.

    Args:
        benchmark: pytest-benchmark's fixture.
        function: to time.
        moved: bytes per call.
    """

    def waiting() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(waiting, rounds=20, warmup_rounds=3)
    benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9


@CUDA_ONLY
@pytest.mark.parametrize("provider", ["triton", "reference", "compiled"])
@pytest.mark.parametrize("count", [512, 64])
@pytest.mark.parametrize("arch", PATCH_SIZES)
@pytest.mark.parametrize("options", [{"threshold": THRESHOLD}, {"top_k": 24}], ids=["threshold", "top-k"])
def test_counterfactual_batch(benchmark: Any, arch: str, count: int, provider: str, options: dict[str, Any]) -> None:
    patches, dtype = (SIDE // PATCH_SIZES[arch]) ** 2, torch.bfloat16
    images, relevance, donors = inputs(count, patches, "cuda")

    def ours() -> Tensor:
        return counterfactual_batch(images, relevance, donors, dtype=dtype, layout="patches", **options)

    def reference(dtype: torch.dtype = dtype) -> Tensor:
        return counterfactual_reference(images, relevance, donors, dtype=dtype, layout="patches", **options)

    previous = set_backend("triton")
    check(ours(), reference(), reference(torch.float64))
    functions = {"triton": ours, "reference": reference, "compiled": torch.compile(reference)}
    measure(benchmark, functions[provider], moved_bytes(count, patches, dtype))
    set_backend(previous)


@CUDA_ONLY
@pytest.mark.parametrize("provider", ["triton", "reference", "compiled"])
@pytest.mark.parametrize("count", [512, 64])
@pytest.mark.parametrize("arch", PATCH_SIZES)
def test_normalise(benchmark: Any, arch: str, count: int, provider: str) -> None:
    dtype = torch.bfloat16
    options: dict[str, Any] = {"layout": "patches", "patch_size": PATCH_SIZES[arch]}
    images = inputs(count, 1, "cuda")[0]
    previous = set_backend("triton")
    functions: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: normalise(images, dtype=dtype, **options),
        "reference": lambda: normalise_reference(images, dtype=dtype, **options),
        "compiled": torch.compile(lambda: normalise_reference(images, dtype=dtype, **options)),
    }
    check(functions["triton"](), functions["reference"](), normalise_reference(images, dtype=torch.float64, **options))
    measure(benchmark, functions[provider], moved_bytes(count, 0, dtype))
    set_backend(previous)


@CUDA_ONLY
@pytest.mark.parametrize("provider", ["triton", "reference", "compiled"])
@pytest.mark.parametrize("count", [512, 64])
@pytest.mark.parametrize("arch", PATCH_SIZES)
def test_masked_fill(benchmark: Any, arch: str, count: int, provider: str) -> None:
    patches, options = (SIDE // PATCH_SIZES[arch]) ** 2, {"dtype": torch.bfloat16, "layout": "patches"}
    images, relevance, donors = inputs(count, patches, "cuda")
    mask = relevance > THRESHOLD
    previous = set_backend("triton")
    functions: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: masked_fill(images, mask, donors, **options),  # type: ignore[arg-type]
        "reference": lambda: normalised_fill(images, mask, donors, **options),  # type: ignore[arg-type]
        "compiled": torch.compile(lambda: normalised_fill(images, mask, donors, **options)),  # type: ignore[arg-type]
    }
    gold = normalised_fill(images, mask, donors, dtype=torch.float64, layout="patches")
    check(functions["triton"](), functions["reference"](), gold)
    measure(benchmark, functions[provider], moved_bytes(count, patches, torch.bfloat16))
    set_backend(previous)


@CPU_ONLY
@pytest.mark.parametrize("provider", ["reference", "op-by-op"])
@pytest.mark.parametrize("patches", [49, 196])
@pytest.mark.usefixtures("threads")
def test_counterfactual_batch_on_a_cpu(benchmark: Any, patches: int, provider: str) -> None:
    count = 64
    images, relevance, donors = inputs(count, patches, "cpu")
    functions: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: counterfactual_batch(images, relevance, donors, threshold=THRESHOLD),
        "op-by-op": lambda: counterfactual_op_by_op(images, relevance, donors, THRESHOLD),
    }
    assert torch.equal(functions["reference"](), functions["op-by-op"]())
    measure(benchmark, functions[provider], moved_bytes(count, patches, torch.float32))

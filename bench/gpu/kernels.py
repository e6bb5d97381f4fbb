"""Every kernel against its reference, eager and under torch.compile, on a GPU.

A case is one op, model and provider, at a batch of 512 before one of 64. Outputs are compared with float64 before anything is
timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.step import rates
from bench.gpu.timer import CudaTimer, Timed
from bench.records import Function, gpu_environment
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.kernels.legrad import legrad
from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.patch_select import patch_select
from cammask_fast.kernels.reference.cls_relevance import cls_relevance as reference_cls_relevance
from cammask_fast.kernels.reference.counterfactual_batch import counterfactual_batch as reference_counterfactual_batch
from cammask_fast.kernels.reference.legrad import legrad as reference_legrad
from cammask_fast.kernels.reference.masked_fill import normalised_fill
from cammask_fast.kernels.reference.normalise import normalise as reference_normalise
from cammask_fast.kernels.reference.patch_select import PatchSelection
from cammask_fast.kernels.reference.patch_select import patch_select as reference_patch_select

SIDE, THRESHOLD, HEAD_WIDTH = 224, 0.3, 64
BATCHES = (512, 64)
PATCH_SIZES, HEADS = {"ViT-B/32": 32, "ViT-B/16": 16, "ViT-L/14": 14}, {"ViT-B/32": 12, "ViT-B/16": 12, "ViT-L/14": 16}
OPS = (
    "counterfactual_batch threshold",
    "cls_relevance layer",
    "counterfactual_batch top-k",
    "cls_relevance last-layer",
    "normalise",
    "masked_fill multi",
    "patch_select top-k",
    "legrad layer",
)
"""An op and its mode."""
COMPARED = 8
"""The last images of the batch, which are compared with float64; their donors are among themselves."""


class Case(NamedTuple):
    op: str
    arch: str
    batch: int
    provider: str


class Work(NamedTuple):
    """One op on one set of inputs. ours: the op. reference: the same in PyTorch, gold: in float64. tail: the inputs of the last
    COMPARED images. bytes: inputs read once and outputs written once. flops: of the reference's matrix products, or 0."""

    ours: Callable[..., Sequence[Tensor]]
    reference: Callable[..., Sequence[Tensor]]
    gold: Callable[..., Sequence[Tensor]]
    inputs: tuple[Tensor, ...]
    tail: tuple[Tensor, ...]
    dtype: torch.dtype
    bytes: int
    flops: int = 0


class Meter(NamedTuple):
    """How a device is measured. time(function): seconds of a call. peak(function): bytes beyond what was held. copy, product:
    its own bytes and floating-point operations per second."""

    device: torch.device
    time: Callable[[Function], Timed]
    peak: Callable[[Function], int]
    copy: float
    product: float
    environment: dict[str, Any]


def build(op: str, arch: str, batch: int, device: torch.device) -> Work:
    """Seeded inputs of an op at a model's shapes, bfloat16 where the training step has it.

    Args:
        op: name, and after a blank its mode.
        arch: key of `PATCH_SIZES`.
        batch: images.
        device: of the inputs.

    Returns:
        Implementations, inputs, gold results and counts of the op.
    """
    name, _, mode = op.partition(" ")
    generator = torch.Generator(device).manual_seed(0)
    size = PATCH_SIZES[arch]
    patches = (SIDE // size) ** 2
    if name == "cls_relevance":
        return _relevance(patches + 1, HEADS[arch], batch, 1 if mode == "last-layer" else patches + 1, generator)
    if name == "legrad":
        return _legrad(patches + 1, HEADS[arch], batch, generator)
    relevance = torch.rand(batch, patches, generator=generator, device=device)
    if name == "patch_select":
        return _selection(relevance.clamp(min=0.3), patches // 2)  # ties, as a map that is mostly zero has them
    images = torch.randint(0, 256, (batch, SIDE, SIDE, 3), generator=generator, device=device, dtype=torch.uint8)
    group = torch.arange(batch, device=device) // COMPARED * COMPARED  # of COMPARED images that are donors to each other
    if mode == "multi":
        donors = group[:, None] + torch.randint(0, COMPARED, (batch, patches), generator=generator, device=device)
    else:
        donors = group + (torch.arange(batch, device=device) + 1) % COMPARED
    first = batch - COMPARED
    output = images.numel() * 2
    if name == "normalise":
        return Work(
            ours=lambda x: (normalise(x, dtype=torch.bfloat16, layout="patches", patch_size=size),),
            reference=lambda x: (reference_normalise(x, dtype=torch.bfloat16, layout="patches", patch_size=size),),
            gold=lambda x: (reference_normalise(x, dtype=torch.float64, layout="patches", patch_size=size),),
            inputs=(images,), tail=(images[first:],), dtype=torch.bfloat16, bytes=images.numel() + output,
        )  # fmt: skip
    if name == "masked_fill":
        mask = relevance > THRESHOLD
        return Work(
            ours=lambda x, m, d: (masked_fill(x, m, d, dtype=torch.bfloat16, layout="patches"),),
            reference=lambda x, m, d: (normalised_fill(x, m, d, dtype=torch.bfloat16, layout="patches"),),
            gold=lambda x, m, d: (normalised_fill(x, m, d, dtype=torch.float64, layout="patches"),),
            inputs=(images, mask, donors), tail=(images[first:], mask[first:], donors[first:] - first),
            dtype=torch.bfloat16, bytes=images.numel() + output + mask.nbytes + donors.nbytes,
        )  # fmt: skip
    options: dict[str, Any] = {"top_k": patches // 2} if mode == "top-k" else {"threshold": THRESHOLD}
    options["layout"] = "patches"
    return Work(
        ours=lambda x, r, d: (counterfactual_batch(x, r, d, dtype=torch.bfloat16, **options),),
        reference=lambda x, r, d: (reference_counterfactual_batch(x, r, d, dtype=torch.bfloat16, **options),),
        gold=lambda x, r, d: (reference_counterfactual_batch(x, r, d, dtype=torch.float64, **options),),
        inputs=(images, relevance, donors), tail=(images[first:], relevance[first:], donors[first:] - first),
        dtype=torch.bfloat16, bytes=images.numel() + output + relevance.nbytes + donors.nbytes,
    )  # fmt: skip


def _relevance(length: int, heads: int, batch: int, rows: int, generator: torch.Generator) -> Work:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=generator.device).to(torch.bfloat16)

    packed = normal(batch, length, 3 * heads * HEAD_WIDTH)
    q, k, v = (part.unflatten(-1, (heads, HEAD_WIDTH)).transpose(1, 2) for part in packed.chunk(3, -1))
    grad = normal(batch, length, heads, HEAD_WIDTH).transpose(1, 2)
    relevance = torch.rand(batch, length, generator=generator, device=generator.device)
    inputs = (relevance, q[:, :, :rows], k, v, grad[:, :, :rows])
    product = 2 * batch * heads * rows * length * HEAD_WIDTH
    return Work(
        ours=lambda *x: (cls_relevance(*x),),
        reference=lambda *x: (reference_cls_relevance(*x),),
        gold=lambda *x: (reference_cls_relevance(*(tensor.double() for tensor in x)),),
        inputs=inputs, tail=tuple(tensor[-COMPARED:] for tensor in inputs), dtype=torch.bfloat16,
        bytes=sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, relevance)),
        flops=2 * product + 2 * batch * rows * length if rows > 1 else 0,
    )  # fmt: skip


def _legrad(length: int, heads: int, batch: int, generator: torch.Generator) -> Work:
    packed, grad = (
        torch.randn(batch, length, parts * heads * HEAD_WIDTH, generator=generator, device=generator.device).to(torch.bfloat16)
        for parts in (3, 1)
    )
    v, grad = (x.unflatten(-1, (heads, HEAD_WIDTH)).transpose(1, 2) for x in (packed.chunk(3, -1)[2], grad))
    inputs = (torch.rand(batch, heads, length, generator=generator, device=generator.device), v, grad)
    return Work(
        ours=lambda *x: (legrad(*x),),
        reference=lambda *x: (reference_legrad(*x),),
        gold=lambda *x: (reference_legrad(*(tensor.double() for tensor in x)),),
        inputs=inputs, tail=tuple(tensor[-COMPARED:] for tensor in inputs), dtype=torch.bfloat16,
        bytes=sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, inputs[0])),
        flops=2 * batch * heads * length * length * HEAD_WIDTH,
    )  # fmt: skip


def _selection(relevance: Tensor, top_k: int) -> Work:
    def tensors(selection: PatchSelection) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in selection if tensor is not None)

    batch, patches = relevance.shape
    return Work(
        ours=lambda r: tensors(patch_select(r, top_k=top_k)),
        reference=lambda r: tensors(reference_patch_select(r, top_k=top_k)),
        gold=lambda r: tensors(reference_patch_select(r, top_k=top_k)),  # exact: in the same dtype
        inputs=(relevance,), tail=(relevance[-COMPARED:],), dtype=torch.float32,
        bytes=batch * (patches * (4 + 4 + 1) + 8 + 8 * (patches - top_k + 1)),
    )  # fmt: skip


def compare(outputs: Sequence[Tensor], work: Work) -> None:
    """Raise ValueError unless the error of the last images against float64 is at most twice that of PyTorch in the same dtype,
    and one unit in the last place of float32 where PyTorch is exact."""
    for ours, pytorch, gold in zip(outputs, work.reference(*work.tail), work.gold(*work.tail), strict=True):
        exact = gold.double()
        error, allowed = ((tensor[-COMPARED:].double() - exact).abs().max().item() for tensor in (ours, pytorch))
        unit = torch.finfo(torch.float32).eps * exact.abs().max().item() if gold.is_floating_point() else 0.0
        if not error <= 2 * allowed + unit:
            raise ValueError(f"not timed: error {error:.3e} against float64, PyTorch's is {allowed:.3e}")


def measure(case: Case, work: Work, meter: Meter) -> dict[str, Any]:
    """Check and time one case.

    Args:
        case: op, model, batch and provider.
        work: from `build`.
        meter: measures time and memory.

    Returns:
        The record.

    Raises:
        ValueError: the output is wrong.
    """
    implementation = work.ours if case.provider == "triton" else work.reference
    if case.provider == "compiled":
        torch._dynamo.reset()
        implementation = torch.compile(work.reference, dynamic=False)
    previous = set_backend("triton" if case.provider == "triton" else "reference")
    try:
        started = time.perf_counter()
        outputs = implementation(*work.inputs)
        compare(outputs, work)
        first_call = time.perf_counter() - started
        del outputs

        def call() -> object:
            return implementation(*work.inputs)

        peak = meter.peak(call)
        timed = meter.time(call)
    finally:
        set_backend(previous)
    record = describe(case) | {"shape": list(work.inputs[0].shape), "dtype": str(work.dtype).removeprefix("torch.")}
    seconds = timed.seconds
    record |= timed.fields() | {"first_call_seconds": round(first_call, 2), "peak_memory_bytes": peak}
    record |= {"gigabytes_per_second": work.bytes / seconds.p50 / 1e9, "share_of_copy": work.bytes / seconds.p50 / meter.copy}
    if work.flops:
        record |= {"teraflops": work.flops / seconds.p50 / 1e12, "share_of_matmul": work.flops / seconds.p50 / meter.product}
    return record


def describe(case: Case) -> dict[str, Any]:
    op, _, mode = case.op.partition(" ")
    return {"op": op, "provider": case.provider, "mode": mode or "forward", "arch": case.arch, "batch": case.batch}


def run(*, op: str, arch: str, providers: Sequence[str], batches: Sequence[int] = BATCHES) -> Iterator[dict[str, Any]]:
    """Check and time an op.

    Args:
        op: name, and after a blank its mode.
        arch: key of `PATCH_SIZES`.
        providers: `triton`, `reference`, `compiled`.
        batches: numbers of images.

    Yields:
        A record per batch and provider; one that cannot be measured has an `error`.

    Raises:
        RuntimeError: the device is lost.
    """
    meter = cuda_meter()
    for batch in batches:
        work = build(op, arch, batch, meter.device)
        for provider in providers:
            yield measured(Case(op, arch, batch, provider), work, meter)
        del work  # before the next one is built


def measured(case: Case, work: Work, meter: Meter) -> dict[str, Any]:
    """Check and time one case, and go on where it fails.

    Args:
        case: op, model, batch and provider.
        work: from `build`.
        meter: measures time and memory.

    Returns:
        The record; with `error` instead of times where it failed.

    Raises:
        Exception: a CUDA error, after which this process cannot use the device.
    """
    try:
        return measure(case, work, meter) | meter.environment
    except Exception as error:  # the other providers are still worth measuring
        if "CUDA error" in str(error):
            raise  # this process can do nothing more with the device
        return {**describe(case), "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], **meter.environment}


def cuda_meter() -> Meter:
    """Of the current CUDA device; measures its copy and its bf16 product first."""
    product, copy = rates("bf16")
    return Meter(torch.device("cuda"), CudaTimer(), _peak, copy, product, gpu_environment())


def _peak(function: Function) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held

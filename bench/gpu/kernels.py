"""Every kernel against its reference, eager and under torch.compile, on a GPU; the device's own rates are measured first.

A case is one op, model, batch and provider. The batch of 512 comes before that of 64, Triton and the reference before
torch.compile, and the pixels before the rest. Outputs are compared with float64 before anything is timed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.records import ROOT, Function, Spread, append, gpu_environment, spread
from bench.step.matrix_rate import matrix_product
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.patch_select import patch_select
from cammask_fast.kernels.reference.cls_relevance import cls_relevance as reference_cls_relevance
from cammask_fast.kernels.reference.counterfactual_batch import counterfactual_batch as reference_counterfactual_batch
from cammask_fast.kernels.reference.masked_fill import normalised_fill
from cammask_fast.kernels.reference.normalise import normalise as reference_normalise
from cammask_fast.kernels.reference.patch_select import PatchSelection
from cammask_fast.kernels.reference.patch_select import patch_select as reference_patch_select

SECONDS = 480.0
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
    """How a device is measured. times(function, repeats): seconds of each call. peak(function): bytes beyond what was held.
    healthy(): whether the device still answers. copy, product: its own bytes and floating-point operations per second."""

    device: torch.device
    times: Callable[[Function, int], list[float]]
    peak: Callable[[Function], int]
    healthy: Callable[[], bool]
    copy: float
    product: float
    environment: dict[str, Any]


def cases(archs: Sequence[str], batches: Sequence[int] = BATCHES) -> list[Case]:
    """The most valuable first."""
    return [
        Case(op, arch, batch, provider)
        for batch in batches
        for providers in (("triton", "reference"), ("compiled",))
        for op in OPS
        for arch in archs
        for provider in providers
    ]


def build(op: str, arch: str, batch: int, device: torch.device) -> Work:
    """Seeded inputs at a model's shapes, bfloat16 where the training step has it."""
    name, _, mode = op.partition(" ")
    generator = torch.Generator(device).manual_seed(0)
    size = PATCH_SIZES[arch]
    patches = (SIDE // size) ** 2
    if name == "cls_relevance":
        return _relevance(patches + 1, HEADS[arch], batch, 1 if mode == "last-layer" else patches + 1, generator)
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


def time_call(function: Function, times: Callable[[Function, int], list[float]], *, budget: float = 0.4) -> Spread:
    """Warm up, then repeat for about `budget` seconds, 10 to 200 times."""
    typical = spread(times(function, 3)).p50
    return spread(times(function, min(200, max(10, int(budget / max(typical, 1e-9))))))


def measure(case: Case, work: Work, meter: Meter) -> dict[str, Any]:
    """The record of one case. Raises ValueError on wrong output."""
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
        seconds = time_call(call, meter.times)
    finally:
        set_backend(previous)
    record = describe(case) | {"shape": list(work.inputs[0].shape), "dtype": str(work.dtype).removeprefix("torch.")}
    record |= seconds.fields() | {"first_call_seconds": round(first_call, 2), "peak_memory_bytes": peak}
    record |= {"gigabytes_per_second": work.bytes / seconds.p50 / 1e9, "share_of_copy": work.bytes / seconds.p50 / meter.copy}
    if work.flops:
        record |= {"teraflops": work.flops / seconds.p50 / 1e12, "share_of_matmul": work.flops / seconds.p50 / meter.product}
    return record


def describe(case: Case) -> dict[str, Any]:
    op, _, mode = case.op.partition(" ")
    return {"op": op, "provider": case.provider, "mode": mode or "forward", "arch": case.arch, "batch": case.batch}


def run(
    out: Path,
    *,
    archs: Sequence[str],
    first: int = 0,
    seconds: float = SECONDS,
    batches: Sequence[int] = BATCHES,
    meter: Meter | None = None,
    clock: Callable[[], float] = time.monotonic,
    restart: Callable[[Sequence[str]], int] | None = None,
) -> int:
    """Append a record per case to DIR/kernels.jsonl until `seconds` have passed. Returns 0, or 1 if a case failed.

    A failed case is a record with `error`. Where it took the device down with it (an illegal access), a new process goes on
    with the next case."""
    started, path = clock(), out / "kernels.jsonl"
    meter = meter or cuda_meter()
    if first == 0:
        rates = {"copy_gigabytes_per_second": meter.copy / 1e9, "bf16_matmul_teraflops": meter.product / 1e12}
        append(path, {"op": "device", "provider": "torch", **rates, **meter.environment})
    todo = cases(archs, batches)
    code, work, built = 0, None, None
    for index, case in enumerate(todo[first:], first):
        if clock() - started > seconds:
            append(path, {"op": "stopped", "reason": f"{seconds:.0f} s have passed", "next": index, "cases": len(todo)})
            break
        try:
            if work is None or built != case[:3]:
                work = None  # frees the memory of the last one first
                work, built = build(case.op, case.arch, case.batch, meter.device), case[:3]
            record = measure(case, work, meter)
        except Exception as error:
            code, work = 1, None
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            append(path, {**describe(case), "error": message, **meter.environment})
            if not meter.healthy():
                left = seconds - (clock() - started)
                command = ["--out", str(out), "--first", str(index + 1), "--seconds", str(int(left)), "--arch", *archs]
                (restart or _restart)(command)
                return 1
            continue
        append(path, record | meter.environment)
    return code


def _restart(arguments: Sequence[str]) -> int:
    command = [sys.executable, "-m", "bench", "gpu", "--part", "kernels", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def cuda_meter() -> Meter:
    """Of the current CUDA device; measures its copy and its bf16 product first."""
    device = torch.device("cuda")
    times = cuda_timer(device)
    return Meter(device, times, _peak, _healthy, *_rates(device, times), gpu_environment())


def _rates(device: torch.device, times: Callable[[Function, int], list[float]]) -> tuple[float, float]:
    """Bytes per second of a copy of 1 GiB (read and written), floating-point operations per second of a bf16 product."""
    source, target = (torch.zeros(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 2 * 2**30 / time_call(lambda: target.copy_(source), times).p50
    product, flops = matrix_product("cuda", "bf16")
    return copy, flops / time_call(product, times).p50


def cuda_timer(device: torch.device) -> Callable[[Function, int], list[float]]:
    """times(function, repeats) by CUDA events. Before each call 512 MB are overwritten: that empties the caches, and the launch
    of the call is already queued when its start event comes."""
    flush = torch.empty(2**27, dtype=torch.int32, device=device)

    def times(function: Function, repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    return times


def _peak(function: Function) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _healthy() -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True

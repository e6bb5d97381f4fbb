"""The whole step on a GPU: every provider at the largest batch that fits, or at a small one, in a process of its own."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.gpu import memory
from bench.gpu.child import Skipped
from bench.gpu.prediction import COUNTED, predict, static_bytes
from bench.gpu.profiler import attention_calls, attention_of, profiled, summary, top
from bench.gpu.timer import CudaTimer
from bench.records import Function, gpu_environment, spread
from bench.step.matrix_rate import matrix_product
from bench.step.race import COMPILED, Race, counted, optimiser_step, split, trained_bytes
from cammask_fast.config import Compile, Precision, TrainConfig
from cammask_fast.precision import resolve, set_matmul_precision

WARMUP, REPEATS = 3, 10
COUNTED_BATCH = 8
"""Work is counted at this batch and is proportional to it."""
COPIED = 2**30
Rates = Callable[[str], tuple[float, float]]


def rates(precision: str) -> tuple[float, float]:
    """Of this card: floating-point operations per second of a large product, bytes per second of a copy of 1 GiB (read and
    written)."""
    timer = CudaTimer(budget=0.2)
    product, flops = matrix_product("cuda", precision)
    source, target = (torch.randint(0, 256, (COPIED,), dtype=torch.uint8, device="cuda") for _ in range(2))
    return flops / timer(product).seconds.p50, 2 * COPIED / timer(lambda: target.copy_(source)).seconds.p50


def step_times(run: Function, repeats: int, *, quiet: bool) -> tuple[list[float], list[float]]:
    """Time steps that follow each other without a wait in between.

    Args:
        run: a step.
        repeats: number of steps.
        quiet: make a synchronisation inside a step an error.

    Returns:
        Seconds from step to step on the device, and seconds that Python takes to start each.
    """
    events, host = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)], []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if quiet else "default")
    try:
        events[0].record()
        for event in events[1:]:
            started = time.perf_counter()
            run()
            host.append(time.perf_counter() - started)
            event.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)], host


def measure(race: Race, provider: str, run: Function, speed: tuple[float, float]) -> dict[str, Any]:
    """Measure the step of one provider.

    Args:
        race: model, method and batch.
        provider: of the step.
        run: a step.
        speed: the card's matrix and copy rates.

    Returns:
        Seconds, memory, compile time, attention's backend and the prediction. `activation_mb` is the peak beyond the gradients
        and what is held between steps (weights, eagerly also in the compute dtype, optimiser state, batch).
    """
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    held = torch.cuda.memory_allocated() + (trained_bytes(race.vit) if provider == "ours-compiled" else 0)
    for _ in range(WARMUP):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, host = step_times(run, REPEATS, quiet=provider == "ours-compiled")
    peak, figures = torch.cuda.max_memory_allocated(), spread(times)
    matrix_rate, copy_rate = speed
    work = counted(replace(race, batch=COUNTED_BATCH), provider)
    flops = work["flops"] * race.batch / COUNTED_BATCH
    record: dict[str, Any] = {
        **figures.fields(), "images_per_second": race.batch / figures.p50, "host_seconds": statistics.median(host),
        "forward_units": work["forward_units"], "teraflops": flops / figures.p50 / 1e12,
        "matmul_teraflops": matrix_rate / 1e12, "copy_gigabytes_per_second": copy_rate / 1e9,
        "share_of_matmul": flops / figures.p50 / matrix_rate, "activation_mb": (peak - held) / 1e6, "peak_mb": peak / 1e6,
        "model_mb": memory.step_bytes(provider, race.arch, race.batch) / 1e6, "first_step_seconds": first,
        "precision": race.precision_of(provider), "compile": race.config.compile, **attention_of(run),
    }  # fmt: skip
    if provider in COMPILED:
        record |= {"compile_seconds": first, "compiled_graphs_from_cache": counters["inductor"]["fxgraph_cache_hit"]}
    predicted = predict(race.arch, race.config.method, race.batch, matrix_rate=matrix_rate, copy_rate=copy_rate)
    if provider == "ours-compiled" and record["precision"] == "bf16" and predicted is not None:
        record |= {"predicted": predicted.fields(race.batch), "measured_over_predicted": figures.p50 / predicted.seconds}
    return record


def profile(race: Race, run: Function, copy_rate: float) -> dict[str, Any]:
    """Profile a step.

    Args:
        race: model, method and batch.
        run: a step.
        copy_rate: bytes/s, as measured on the card.

    Returns:
        The longest kernels, seconds by class, and the compiler's kernels against the bytes counted for them.
    """
    found = profiled(run)
    classes = summary(found.kernels)
    record: dict[str, Any] = {
        "op": "profile", "arch": race.arch, "mode": race.config.method, "batch": race.batch, "kernel_seconds": found.seconds,
        "classes": classes, "top": top(found.kernels), "attention": attention_calls(found),
    }  # fmt: skip
    work, triton = COUNTED.get((race.arch, race.config.method)), classes.get("compiler's Triton kernels")
    if work is not None and triton is not None:
        counted_bytes = static_bytes(work, race.batch)
        record |= {
            "counted_bytes": counted_bytes, "bytes_at_copy_rate": triton["seconds"] * copy_rate,
            "share_of_copy": counted_bytes / triton["seconds"] / copy_rate,
        }  # fmt: skip
    return record


def run(
    *,
    provider: str,
    arch: str,
    mode: str,
    batches: Sequence[int],
    op: str = "step",
    compile: Compile = "auto",
    precision: Precision = "auto",
    with_profile: bool = False,
    with_stages: bool = False,
    rates: Rates = rates,
) -> Iterator[dict[str, Any]]:
    """Measure a step at the largest batch that the card holds.

    Args:
        provider: of the step.
        arch: key of `ARCHS`.
        mode: method, a key of `METHODS`.
        batches: numbers of images, the largest first.
        op: of the record.
        compile: mode of the compiled step.
        precision: of the step.
        with_profile: add a record of the longest kernels.
        with_stages: add seconds per stage.
        rates: measures the card's matrix and copy rates.

    Yields:
        The records.

    Raises:
        Skipped: no batch can fit by the static model.
        torch.OutOfMemoryError: no batch fits.
    """
    config = TrainConfig(method=mode, compile=compile, precision=precision)
    race = Race(arch=arch, config=config, batch=batches[0], device="cuda")
    set_matmul_precision(resolve(precision, race.device))
    speed, environment = rates(race.precision_of(provider)), gpu_environment()
    _free_memory()
    free, _ = torch.cuda.mem_get_info()
    possible = memory.fitting(provider, arch, batches, free)
    if not possible:
        least = memory.needed(provider, arch, min(batches))
        raise Skipped(f"needs {least / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free")
    too_large: list[int] = []
    for batch in possible:
        race = replace(race, batch=batch)
        record: dict[str, Any] = {"op": op, "provider": provider, "arch": arch, "mode": mode, "batch": batch}
        record |= {"free_mb": free / 1e6, "out_of_memory_at": too_large}
        step: Function | None = None
        try:
            step = optimiser_step(race, provider)
            record |= measure(race, provider, step, speed)
            break
        except torch.OutOfMemoryError:
            if batch == possible[-1]:
                raise
            too_large.append(batch)
        del step
        torch._dynamo.reset()
        _free_memory()
    if with_stages:
        step = None
        record["stages"] = split(race)
    yield record | environment
    if with_profile and step is not None:
        yield profile(race, step, speed[1]) | environment


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()

"""The whole step on a GPU, every provider at the largest batch that fits; ours, compiled, first."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu.kernels import cuda_timer, time_call
from bench.records import append, gpu_environment, spread
from bench.step.ablations import ABLATIONS
from bench.step.matrix_rate import matrix_product
from bench.step.race import COMPILED, Race, counted, optimiser_step, split, trained_bytes
from cammask_fast.config import TrainConfig
from cammask_fast.precision import resolve, set_matmul_precision

BATCHES = (512, 256, 128, 64)
PROVIDERS = ("ours-compiled", "authors", "authors-compiled", "ours-eager")
METHODS = ("masked-object", "masked-topk")
ABLATED = "ViT-B/16"
WARMUP, REPEATS = 3, 10
Measure = Callable[[Race, str], dict[str, Any]]


def measure(race: Race, provider: str) -> dict[str, Any]:
    """Seconds, memory and compile time of one provider. After the warm-up, a synchronisation inside our compiled step is an
    error. activation_mb: the peak beyond the gradients and what is held between steps (weights, eagerly also in the type of the
    products, optimiser state, batch)."""
    set_matmul_precision(resolve(race.config.precision, race.device))
    rate = _matmul_rate(race.precision_of(provider))
    torch._dynamo.reset()
    run, times = optimiser_step(race, provider), []
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    held = torch.cuda.memory_allocated() + (trained_bytes(race.vit) if provider == "ours-compiled" else 0)
    for number in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        if number == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        torch.cuda.set_sync_debug_mode("error" if provider == "ours-compiled" and number >= WARMUP else "default")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        if number >= WARMUP:
            times.append(time.perf_counter() - started)
    peak, figures = torch.cuda.max_memory_allocated(), spread(times)
    work = counted(race, provider)
    record: dict[str, Any] = {
        **figures.fields(), "images_per_second": race.batch / figures.p50, "forward_units": work["forward_units"],
        "teraflops": work["flops"] / figures.p50 / 1e12, "matmul_teraflops": rate / 1e12,
        "share_of_matmul": work["flops"] / figures.p50 / rate, "counted_activation_mb": work["activation_mb"],
        "activation_mb": (peak - held) / 1e6, "peak_mb": peak / 1e6, "first_step_seconds": first,
        "precision": race.precision_of(provider),
    }  # fmt: skip
    if provider in COMPILED:
        record["compile_seconds"] = first
    return record | ({"stages": split(race)} if provider == "ours-eager" else {})


def _matmul_rate(precision: str) -> float:
    """Floating-point operations per second of a large product."""
    product, flops = matrix_product("cuda", precision)
    return flops / time_call(product, cuda_timer(torch.device("cuda"))).p50


def cases(archs: Sequence[str]) -> Iterator[tuple[str, Race, str]]:
    """(op, race, provider), the most valuable first; the batch of the race is the largest to try."""
    for method in METHODS:
        for arch in archs:
            for provider in PROVIDERS:
                yield "step", Race(arch=arch, config=TrainConfig(method=method), batch=BATCHES[0], device="cuda"), provider
    if ABLATED in archs:
        config = TrainConfig(method=METHODS[0], precision="tf32")
        for provider in ("ours-eager", *ABLATIONS):
            yield "ablation", Race(arch=ABLATED, config=config, batch=BATCHES[0], device="cuda"), provider
    for arch in archs:
        race = Race(arch=arch, config=TrainConfig(method=METHODS[0]), batch=BATCHES[0], device="cuda")
        yield "step", race, "authors-fused-adamw"


def run(
    out: Path,
    *,
    archs: Sequence[str],
    seconds: float = 480.0,
    measure: Measure = measure,
    environment: Callable[[], dict[str, Any]] = gpu_environment,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Write DIR/step.jsonl, a record per case; no case is started after `seconds`. Returns 0, or 1 if a case failed."""
    where, started, failed = environment(), clock(), False
    for op, race, provider in cases(archs):
        case = {"op": op, "provider": provider, "arch": race.arch, "mode": race.config.method}
        if clock() - started > seconds:
            print(f"step: stopped after {clock() - started:.0f} s, before {' '.join(case.values())}", flush=True)
            break
        record: dict[str, Any] = {}
        for batch in BATCHES:
            record = {**case, "batch": batch}
            try:
                record |= measure(replace(race, batch=batch), provider)
            except torch.OutOfMemoryError:
                record["error"] = "out of memory"
            except Exception as error:  # the other cases are still worth measuring
                record["error"] = f"{type(error).__name__}: {error}"[:500]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if record.get("error") != "out of memory":
                break
        failed |= "error" in record
        append(out / "step.jsonl", record | where)
        print(
            f"{' '.join(case.values())}: {record.get('error') or f'''{record['images_per_second']:.0f} images/s'''}",
            flush=True,
        )
    return int(failed)

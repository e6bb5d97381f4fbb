"""The whole step on a GPU, every provider at the largest batch that fits; ours, compiled, first."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.records import append, gpu_environment, spread
from bench.step.race import Race, counted, optimiser_step, split
from cammask_fast.config import TrainConfig
from cammask_fast.precision import resolve, use_matrix_units

BATCHES = (512, 256, 128, 64)
PROVIDERS = ("ours-compiled", "authors", "authors-compiled", "ours-eager")
METHODS = ("masked-object", "masked-topk")
WARMUP, REPEATS = 3, 10
Measure = Callable[[Race, str], dict[str, Any]]


def measure(race: Race, provider: str) -> dict[str, Any]:
    """Seconds, memory and compile time of one provider. After the warm-up, a synchronisation inside our compiled step is an
    error."""
    use_matrix_units(resolve(race.config.precision, race.device))
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    run, times = optimiser_step(race, provider), []
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    for number in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.cuda.set_sync_debug_mode("error" if provider == "ours-compiled" and number >= WARMUP else "default")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        if number >= WARMUP:
            times.append(time.perf_counter() - started)
    figures = spread(times)
    work = counted(race, provider)
    record: dict[str, Any] = {
        **figures.fields(), "images_per_second": race.batch / figures.p50, "forward_units": work["forward_units"],
        "teraflops": work["flops"] / figures.p50 / 1e12, "counted_activation_mb": work["activation_mb"],
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6, "first_step_seconds": first,
        "precision": "fp32" if provider == "authors" else "bf16",
    }  # fmt: skip
    return record | ({"stages": split(race)} if provider == "ours-eager" else {})


def cases(archs: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(method, arch, provider), the most valuable first."""
    for method in METHODS:
        for arch in archs:
            for provider in PROVIDERS:
                yield method, arch, provider


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
    for method, arch, provider in cases(archs):
        if clock() - started > seconds:
            print(f"step: stopped after {clock() - started:.0f} s, before {method} {arch} {provider}", flush=True)
            break
        record: dict[str, Any] = {}
        for batch in BATCHES:
            race = Race(arch=arch, config=TrainConfig(method=method), batch=batch, device="cuda")
            record = {"op": "step", "provider": provider, "arch": arch, "mode": method, "batch": batch}
            try:
                record |= measure(race, provider)
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
            f"{method} {arch} {provider}: {record.get('error') or f'''{record['images_per_second']:.0f} images/s'''}",
            flush=True,
        )
    return int(failed)

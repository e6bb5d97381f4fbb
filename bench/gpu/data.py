"""Loading on a GPU: decode rate of DALI's hardware decoder at batch 512, and training from files against the step alone."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.data.photographs import generate
from bench.records import append, gpu_environment
from bench.step.race import ARCHS, models, random_batch
from cammask_fast.config import TrainConfig
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.loaders.dali_loader import DaliLoader
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.transforms import Transform
from cammask_fast.data.types import Batch, ImageSource
from cammask_fast.progress import DataWait
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness

FILES, BATCH, SIZE = 512, 512, 224
SHARES = (0.75, 0.0, 0.5, 1.0)
"""Of the hardware decoder; the default first."""
WARMUP, BATCHES = 4, 20
METHOD = "masked-object"
Case = tuple[str, str, float]
Measure = Callable[[Case, ImageSource, Path], dict[str, Any]]


def cases(archs: Sequence[str]) -> Iterator[Case]:
    """(what, arch, hardware share), the most valuable first."""
    yield "decode", "", SHARES[0]
    for arch in archs:
        if arch != "ViT-L/14":  # slower than any loader
            yield "train", arch, SHARES[0]
    for share in SHARES[1:]:
        yield "decode", "", share


def open_loader(source: ImageSource, folder: Path, share: float) -> DaliLoader:
    workers = min(16, os.cpu_count() or 1)
    return DaliLoader(
        source, Transform(size=SIZE), ResumableDistributedSampler(len(source), batch_size=BATCH, shuffle=True),
        workers=workers, device="cuda",
        bad=UnreadableSamples(source.where, len(source), report=folder / "bad.tsv"), hardware_share=share,
    )  # fmt: skip


def endless(loader: DaliLoader) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def rate(step: Callable[[], object]) -> float:
    """Images per second of a function that handles one batch."""
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(BATCHES):
        step()
    torch.cuda.synchronize()
    return BATCH * BATCHES / (time.perf_counter() - started)


def measure(case: Case, source: ImageSource, folder: Path) -> dict[str, Any]:
    """Images per second of decoding alone, or of the compiled step on one resident batch and on batches from files."""
    what, arch, share = case
    batches = endless(open_loader(source.subset(torch.arange(len(source)).repeat(WARMUP + BATCHES)), folder, share))
    if what == "decode":
        return {"images_per_s": rate(lambda: next(batches))}
    vit, config = ARCHS[arch], TrainConfig(method=METHOD, epochs=1, batch_size=BATCH)
    student, teacher = models(vit, "cuda")
    state = TrainState.create(student, config, steps_per_epoch=1000, compiled=True)
    step, strategy = build_train_step(state, teacher, config), build_strategy(config)
    wait = DataWait(torch.device("cuda"))
    from_files = wait.over(batches)

    def run(batch: Batch) -> None:
        step([(batch, sample_step_randomness(strategy, batch, vit.patches, state.generator))])

    resident = random_batch(vit, BATCH, "cuda")
    alone = rate(lambda: run(resident))
    wait.seconds, wait.started = 0.0, time.perf_counter()
    end_to_end = rate(lambda: run(next(from_files).to("cuda")))
    return {"images_per_s": end_to_end, "step_alone_images_per_s": alone, "waited_for_data": wait.share}


def run(
    out: Path,
    *,
    archs: Sequence[str],
    seconds: float = 480.0,
    measure: Measure = measure,
    environment: Callable[[], dict[str, Any]] = gpu_environment,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Write DIR/data.jsonl, a record per case; no case is started after `seconds`. Returns 0, or 1 if a case failed."""
    where, started, failed = environment(), clock(), False
    with tempfile.TemporaryDirectory() as folder:
        source = scan(generate(Path(folder), FILES))
        for case in cases(archs):
            what, arch, share = case
            if clock() - started > seconds:
                print(f"data: stopped after {clock() - started:.0f} s, before {what} {arch}", flush=True)
                break
            record: dict[str, Any] = {
                "op": "data", "provider": "dali", "mode": what, "arch": arch, "batch": BATCH, "hardware_share": share
            }  # fmt: skip
            try:
                record |= measure(case, source, Path(folder))
            except Exception as error:  # the other cases are still worth measuring
                record["error"] = f"{type(error).__name__}: {error}"[:500]
            failed |= "error" in record
            append(out / "data.jsonl", record | where)
            print(f"{what} {arch}: {record.get('error') or f'''{record['images_per_s']:.0f} images/s'''}", flush=True)
    return int(failed)

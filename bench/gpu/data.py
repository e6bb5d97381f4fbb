"""Loading on a GPU: decode rates, and training from files against the step alone. Each case makes one pipeline."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.data.photographs import generate_one, mean_kilobytes
from bench.gpu import memory
from bench.gpu.child import Skipped
from bench.records import gpu_environment
from bench.step.race import ARCHS, models, random_batch
from cammask_fast.config import TrainConfig
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.loaders.dali_loader import HARDWARE_SHARE
from cammask_fast.data.transforms import Transform
from cammask_fast.data.types import Batch, ImageSource
from cammask_fast.progress import DataWait
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness

DEVICE = "cuda"
FILES, BATCH, SIZE, MOST_WORKERS = 512, 512, 224, 16
WARMUP, BATCHES = 4, 20
METHOD = "masked-object"


def images(count: int = FILES) -> Path:
    """A folder of generated JPEGs, made once per machine."""
    root = Path(tempfile.gettempdir()) / f"cammask-bench-{count}-jpegs"
    if not root.exists():
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            made = Path(folder) / "made"
            with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
                list(pool.map(generate_one, itertools.repeat(made), range(count), chunksize=8))
            made.rename(root)
    return root


def loading(loader: str, share: float, folder: Path) -> LoaderConfig:
    """Loader options of a case.

    Args:
        loader: `dali` or `torch`.
        share: of the JPEGs that DALI gives to the hardware decoder, 0 to 1.
        folder: for the list of unreadable images.

    Returns:
        The settings.
    """
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    return LoaderConfig(kind=loader, workers=workers, device=DEVICE, report=folder / "bad.tsv", hardware_share=share)


def endless(options: LoaderConfig, source: ImageSource) -> Iterator[Batch]:
    """Shuffled batches on the GPU, epoch after epoch."""
    loader = options.build(source, Transform(size=SIZE), batch_size=BATCH, shuffle=True)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from (batch.to(DEVICE) for batch in loader)


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


def training(arch: str, batches: Iterator[Batch]) -> dict[str, float]:
    """Images per second of the compiled step on one resident batch and on batches from files, and the share of the time in
    which it waited for data."""
    vit, config = ARCHS[arch], TrainConfig(method=METHOD, epochs=1, batch_size=BATCH)
    student, teacher = models(vit, DEVICE)
    state = TrainState.create(student, config, steps_per_epoch=1000, compiled=True)
    step, strategy = build_train_step(state, teacher, config), build_strategy(config)
    wait = DataWait(torch.device(DEVICE))
    from_files = wait.over(batches)

    def run(batch: Batch) -> None:
        step([(batch, sample_step_randomness(strategy, batch, vit.patches, state.generator))])

    resident = random_batch(vit, BATCH, DEVICE)
    alone = rate(lambda: run(resident))
    wait.seconds, wait.started = 0.0, time.perf_counter()
    end_to_end = rate(lambda: run(next(from_files)))
    return {"images_per_s": end_to_end, "step_alone_images_per_s": alone, "waited_for_data": wait.share}


def run(*, what: str, loader: str, arch: str = "", share: float = HARDWARE_SHARE) -> dict[str, Any]:
    """Measure decoding alone, or training that is fed by a loader.

    Args:
        what: `decode` or `train`, for the record.
        loader: `dali` or `torch`.
        arch: model to train; empty: decoding alone.
        share: of the JPEGs that DALI gives to the hardware decoder, 0 to 1.

    Returns:
        The record.

    Raises:
        Skipped: the training step does not fit into the free memory.
    """
    free, _ = torch.cuda.mem_get_info()
    if arch and not memory.fitting("ours-compiled", arch, [BATCH], free):
        raise Skipped(
            f"needs {memory.needed('ours-compiled', arch, BATCH) / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free"
        )
    root = images()
    source = scan(root)
    record: dict[str, Any] = {
        "op": "data", "provider": loader, "mode": what, "arch": arch, "batch": BATCH, "hardware_share": share,
        "files": len(source), "images": "generated JPEGs", "mean_kb": mean_kilobytes(root),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        options = loading(loader, share, Path(folder))
        record["workers"] = options.workers
        batches = endless(options, source.subset(torch.arange(len(source)).repeat(WARMUP + BATCHES)))
        record |= training(arch, batches) if arch else {"images_per_s": rate(lambda: next(batches))}
    return record | gpu_environment()

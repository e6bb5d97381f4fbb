"""What a checkpoint costs the training: the stall of a save against a step, and the step while a write is under way."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.records import cpu_environment, gpu_environment, show
from bench.step.race import models, random_batch
from cammask_fast.checkpoint import Checkpoints
from cammask_fast.config import TrainConfig
from cammask_fast.model.pretrained import vit_config
from cammask_fast.state import Snapshot, TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness
from cammask_fast.viz.tables import markdown_table

EVERY = 500
"""Steps between two checkpoints, the default of `cammask train`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="ViT-B/16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the record as a JSON line")


def main(options: argparse.Namespace) -> int:
    if options.saves < 2 or options.batch < 2:
        raise ValueError("--saves, --batch: expected 2 or more")
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(options.arch, options.batch, options.saves, options.folder or Path(temporary))
    header = ["", "step, s", "step during a write, s", "stall of a save, s", "stall per step, of a step", "write, s", "MB"]
    row = [
        f"{record['arch']}, batch {record['batch']}", f"{record['step_seconds']:.3f}", f"{record['step_while_writing']:.3f}",
        f"{record['stall_seconds']:.4f}", f"{record['stall_share']:.3%}", f"{record['write_seconds']:.1f}",
        f"{record['mb']:.0f}",
    ]  # fmt: skip
    show([record], markdown_table(header, [row]), as_json=options.json, out=options.out)
    return 0


def measure(arch: str, batch: int, saves: int, folder: Path) -> dict[str, Any]:
    """Measure what checkpoints cost a training step.

    Args:
        arch: name of the architecture.
        batch: images per step.
        saves: checkpoints to write.
        folder: where they are written.

    Returns:
        The record; seconds are medians over `saves`.

    Raises:
        ValueError: a checkpoint could not be written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vit, config = vit_config(arch), TrainConfig(method="masked-object", batch_size=batch)
    student, teacher = models(vit, device)
    state = TrainState.create(student, config, steps_per_epoch=1000, compiled=device == "cuda")
    step, strategy, data = build_train_step(state, teacher, config), build_strategy(config), random_batch(vit, batch, device)

    def timed() -> float:
        started = time.perf_counter()
        step([(data, sample_step_randomness(strategy, data, vit.patches, state.generator))])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(2):
        timed()
    alone = [timed() for _ in range(saves)]
    problems: list[str] = []
    keeper = Checkpoints(folder, {}, keep=1, warn=problems.append)
    during, writes = [], []
    for _ in range(saves):
        state.step += 1
        saved = state.state_dict()
        started = time.perf_counter()
        keeper.save(Snapshot(saved.tensors, {**saved.metadata, "best_step": 0}))
        during.append(timed())
        keeper.wait()
        writes.append(time.perf_counter() - started)
    if problems:
        raise ValueError(problems[0])
    size = sum(path.stat().st_size for path in keeper.folders()[-1].iterdir())
    median = statistics.median
    return {
        "op": "checkpoint", "arch": arch, "batch": batch, "step_seconds": median(alone), "step_while_writing": median(during),
        "stall_seconds": median(keeper.stalls), "stall_share": median(keeper.stalls) / EVERY / median(alone), "every": EVERY,
        "write_seconds": median(writes), "mb": size / 1e6, **(gpu_environment() if device == "cuda" else cpu_environment()),
    }  # fmt: skip

"""What the CAM's options cost and give on the embedded benchmark: MM-CAM over all blocks and over the last half, Grad-CAM."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from bench.records import cpu_environment
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import training_splits
from cammask_fast.demo.run import evaluate_all, tiny_config
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.train import fine_tune
from cammask_fast.viz.tables import markdown_table

OPTIONS: Mapping[str, dict[str, Any]] = {
    "MM-CAM": {},
    "MM-CAM, last 2 of 4 blocks": {"cam_start_layer": 2},
    "Grad-CAM": {"cam": "grad-cam"},
}


def measure(mode: str, *, seeds: int) -> list[dict[str, Any]]:
    """A record per option and seed, in turn. Raises ValueError below two seeds."""
    if seeds < 2:
        raise ValueError("--cam-options: at least 2 seeds")
    records = []
    for seed in range(seeds):
        for name, options in OPTIONS.items():
            config = tiny_config(mode, seed, **options)
            train, validation = training_splits(seed, batch_size=config.batch_size)
            started = time.perf_counter()
            best = fine_tune(tiny_classifier(CLASS_NAMES), train, validation, config).best
            seconds = time.perf_counter() - started
            accuracies = evaluate_all(best)
            shifts = [value for name, value in accuracies.items() if name != "id"]
            records.append(
                {
                    "op": "cam-option", "option": name, "mode": mode, "seed": seed, "seconds": seconds,
                    "id": accuracies["id"], "ood": mean(shifts), **cpu_environment(),
                }
            )  # fmt: skip
    return records


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over the seeds."""
    rows = []
    for option in dict.fromkeys(r["option"] for r in records):
        columns = [[r[key] for r in records if r["option"] == option] for key in ("id", "ood", "seconds")]
        rows.append([option, *(f"{mean(column):.1f} ± {stdev(column):.1f}" for column in columns)])
    return markdown_table(["CAM", "ID, %", "average OOD, %", "s of training"], rows)

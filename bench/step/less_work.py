"""Less work by choice: what the settings that change the method save, and what they cost, on the embedded benchmark.

`cammask bench less-work --out bench/results/less-work.jsonl` appends a line per run. Every run is scored on the validation
scans, on which settings are chosen, and on the test sets, which the table shows.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.records import append, cpu_environment, read
from bench.step.work import count_flops, forward_unit
from cammask_fast.config import TrainConfig
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import training_splits
from cammask_fast.data.types import Batch
from cammask_fast.demo.run import evaluate_all, tiny_config
from cammask_fast.masking.kept import keeps_maps, kept_outputs, kept_relevance
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.step import build_step, build_strategy, sample_step_randomness
from cammask_fast.train import fine_tune
from cammask_fast.viz.tables import markdown_table

B16 = ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512)
CLASSES, COUNTED = 1000, 4
EPOCHS = 10
"""Of the paper, over which the work of first visits is shared out."""
TEACHER: dict[str, Any] = {"cam_source": "teacher"}
KEPT: dict[str, Any] = {"teacher_outputs": "kept"}
RANDOM = {"masking": "RandMaskNoFill(0.75)"}
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "object single-fill": ("masked-object", {}),
    "object single-fill, teacher's map": ("masked-object", TEACHER),
    "top-k no-fill": ("masked-topk", {}),
    "top-k no-fill, teacher's map": ("masked-topk", TEACHER),
    "top-k no-fill, teacher's map and outputs kept": ("masked-topk", TEACHER | KEPT),
    "top-k no-fill, student's map every 3 epochs": ("masked-topk", {"cam_every": 3}),
    "top-k no-fill 60 %, teacher's map and outputs kept": (
        "masked-topk",
        {**TEACHER, **KEPT, "masking": "ObjMaskNoFill(top=60%)"},
    ),
    "random no-fill 75 %": ("masked-random", RANDOM),
    "context single-fill": ("masked-context", {}),
    "context single-fill, teacher's map": ("masked-context", TEACHER),
    "ft-fd": ("ft-fd", {}),
    "ft-fd, teacher's outputs kept": ("ft-fd", KEPT),
}
"""Recipe of tiny/ and what differs from it; the first of a strategy is what today's step does."""


def counted_units(vit: ViTConfig, config: TrainConfig, *, epochs: int, classes: int = CLASSES) -> dict[str, float]:
    """Count the work of a run from shapes alone.

    Args:
        vit: shape of the image tower.
        config: settings of the run.
        epochs: visits of every image, over which the work of the first is shared out.
        classes: of the head.

    Returns:
        Forward units per image and visit: `step`, of a step; `first`, of what is computed once per image, or per period of the
        student's maps; `units`, of both.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a copy of a teacher asks for it
        student = Classifier(VisionTransformer(vit), torch.zeros(classes, vit.output_dim))
        teacher = Classifier(VisionTransformer(vit), torch.zeros(classes, vit.output_dim)).requires_grad_(False)
        images = torch.zeros(COUNTED, vit.image_size, vit.image_size, 3, dtype=torch.uint8)
        data = Batch(images, *(torch.zeros(COUNTED, dtype=torch.int64) for _ in range(2)))
        unit, relevance = forward_unit(student, COUNTED), None

        def first_visit() -> None:
            nonlocal data, relevance
            if keeps_maps(config):
                relevance = kept_relevance(student if config.cam_source == "student" else teacher, images, data.labels, config)
            if config.teacher_outputs == "kept":
                data = data._replace(teacher_outputs=kept_outputs(teacher, images, relevance, config))

        first = count_flops(first_visit) / unit
        data = data._replace(relevance=relevance)
        draws = sample_step_randomness(build_strategy(config), data, vit.patches, torch.Generator().manual_seed(0))
        step = count_flops(lambda: build_step(student, teacher, config)(data, draws)) / unit
    visits = -(-epochs // config.cam_every) if config.cam_every > 1 else 1
    return {"step": step, "first": first, "units": step + first * visits / epochs}


@cache
def b16_units(name: str) -> dict[str, float]:
    """Of a variant, over the paper's epochs; the weights of the losses cost nothing."""
    recipe, own = VARIANTS[name]
    return counted_units(B16, tiny_config(recipe, 0, **own), epochs=EPOCHS)


def measure(name: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train a variant and score its best checkpoint.

    Args:
        name: of `VARIANTS`.
        seed: of the run.
        changes: settings in place of the recipe's.

    Returns:
        A record. Its seconds are those of CPU time, which other processes do not change.
    """
    recipe, own = VARIANTS[name]
    config = tiny_config(recipe, seed, **{**own, **changes})
    train, validation = training_splits(seed, batch_size=config.batch_size)
    started = time.process_time()
    best = fine_tune(tiny_classifier(CLASS_NAMES), train, validation, config).best
    seconds = time.process_time() - started
    scores = {scans: evaluate_all(best, scans) for scans in ("val", "test")}
    units = b16_units(name)
    return {
        "op": "less-work", "variant": name, "seed": seed, "config": config.to_dict(), "cpu_seconds": seconds,
        "accuracy": scores, "b16_units": units["units"], "b16_step_units": units["step"],
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"default: all of {'; '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--w-distill", type=float, help="default: the recipe's")
    parser.add_argument("--units", action="store_true", help="only count the work of each variant with ViT-B/16")
    parser.add_argument("--out", type=Path, help="append the records to this file, and skip those that it holds")


def main(options: argparse.Namespace) -> int:
    chosen = options.variants or list(VARIANTS)
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        raise ValueError(f"unknown variant {unknown[0]!r}; known: {'; '.join(VARIANTS)}")
    if options.units:
        for name in chosen:
            units = b16_units(name)
            print(f"{name:50s} step {units['step']:.2f}  first visit {units['first']:.2f}  in all {units['units']:.2f}")
        return 0
    changes = {} if options.w_distill is None else {"w_distill": options.w_distill}
    where, records = cpu_environment(), [] if options.out is None or not options.out.exists() else read(options.out)
    for seed in options.seeds:
        for name in chosen:
            weight = tiny_config(VARIANTS[name][0], seed, **changes).w_distill
            if any((r["variant"], r["seed"], r["config"]["w_distill"]) == (name, seed, weight) for r in records):
                continue
            records.append({**measure(name, seed, changes), **where})
            print(f"{name}, seed {seed}: {records[-1]['accuracy']['val']}", file=sys.stderr)
            if options.out is not None:
                append(options.out, records[-1])
    print(section(records))
    return 0


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """A table per distillation weight: accuracies on the test sets, work and time of each variant."""
    of_ours = [r for r in records if r.get("op") == "less-work"]
    parts = []
    for weight in sorted({r["config"]["w_distill"] for r in of_ours}):
        of_weight = [r for r in of_ours if r["config"]["w_distill"] == weight]
        last, rows = of_weight[-1], []
        for name in (name for name in VARIANTS if any(r["variant"] == name for r in of_weight)):
            runs = [r for r in of_weight if r["variant"] == name]
            rows.append([name, *row(runs)])
        header = ["variant", "ID", "average OOD", "worst group", "validation, ID and OOD", "forward units", "CPU s", "seeds"]
        parts.append(
            f"Distillation weight {weight:g}; {last['cpu']}, {last['threads']} thread, commit {last['commit']}:\n\n"
            f"{markdown_table(header, rows)}"
        )
    return "\n\n".join(parts)


def row(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of one variant: mean and standard deviation over its seeds."""

    def both(values: Sequence[float]) -> str:
        return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"

    tests = [r["accuracy"]["test"] for r in runs]
    columns = [[t["id"] for t in tests], [ood(t) for t in tests], [min(t.values()) for t in tests]]
    chosen_by = [(r["accuracy"]["val"]["id"] + ood(r["accuracy"]["val"])) / 2 for r in runs]
    return [
        *map(both, columns), both(chosen_by), f"{runs[-1]['b16_units']:.2f}",
        both([r["cpu_seconds"] for r in runs]), str(len(runs)),
    ]  # fmt: skip


def ood(accuracies: Mapping[str, float]) -> float:
    """Mean over the shifts."""
    return mean(value for name, value in accuracies.items() if name != "id")

"""Which map is the best: every map and metric on the embedded benchmark, before and after fine-tuning, and as mask source.

`cammask bench maps --out bench/results/cam-bench.jsonl` appends a line per run and, for the measured models, one per map. What
the file holds already is not repeated, so that maps which come later are added by the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor

from bench.records import append, cpu_environment, read
from cammask_fast.cam.benchmark import METRICS, RANDOM, MapProtocol, measure_maps
from cammask_fast.cam.maps import CAMS, relevance_of
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications, training_splits
from cammask_fast.demo.report import compared
from cammask_fast.demo.run import evaluate_all, tiny_config
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.train import fine_tune
from cammask_fast.viz.tables import markdown_table

METHODS = ("zeroshot", "ft", "ft-fd", "masked-object")
"""Models whose maps are measured, the masked one with MM-CAM's masks."""
IMAGES = 300
"""Of the ID test set, on which maps are compared with the digits."""
PERTURBED = 100
"""The first of these, on which pixels are removed: 136 forward passes each per map."""
TIMED_BATCH = 100
MASKED, PAPERS = "masked-object", "mm-cam"
OTHERS = {"random patches (masked-random)": "masked-random", "no masks (ft-fd)": "ft-fd"}
"""Sources to compare the maps with: the same distillation with random masks, and on clean images."""
SHOWN = {
    "energy": "energy", "masked": "masked on the digit", "pointing": "pointing", "best_miou": "best mIoU",
    "pixel_accuracy": "pixel accuracy", "insertion": "insertion", "deletion": "deletion", "positive": "positive",
    "negative": "negative", "road_morf": "ROAD highest", "road_lerf": "ROAD lowest",
}  # fmt: skip
"""Metrics of the table, by the heads of their columns; the records have all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the mask sources (default: 0 to 4)")
    parser.add_argument(
        "--measured",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="seeds whose maps are measured (default: 0 1 2)",
    )
    parser.add_argument("--cams", nargs="+", choices=CAMS, default=list(CAMS), metavar="NAME", help="default: all maps")
    parser.add_argument("--out", type=Path, help="append the records to this file, and skip those that it holds")


def main(options: argparse.Namespace) -> int:
    records = [] if options.out is None or not options.out.exists() else read(options.out)
    where = cpu_environment()

    def keep(record: dict[str, Any]) -> None:
        records.append({**record, **where})
        print(f"{record['op']}: {record.get('method', record.get('source'))}, seed {record['seed']}", file=sys.stderr)
        if options.out is not None:
            append(options.out, records[-1])

    sources = {**{cam: (MASKED, {"cam": cam}) for cam in options.cams}, **{name: (one, {}) for name, one in OTHERS.items()}}
    for seed in sorted({*options.seeds, *options.measured}):
        for method in METHODS:
            wanted = [
                cam for cam in (*options.cams, RANDOM) if not known(records, op="cam-bench", method=method, seed=seed, cam=cam)
            ]
            if seed in options.measured and (method != "zeroshot" or seed == min(options.measured)):
                for cam in wanted:  # one at a time: what was measured is on the disk
                    keep(measured(method, seed, [cam])[0])
        for source, (recipe, changes) in sources.items():
            if seed in options.seeds and not known(records, op="cam-source", source=source, seed=seed):
                keep(as_source(source, recipe, seed, changes))
        trained.cache_clear()
    print(section(records))
    return 0


def known(records: Sequence[Mapping[str, Any]], **wanted: Any) -> bool:
    """Whether a record with these values is there."""
    return any(all(record.get(name) == value for name, value in wanted.items()) for record in records)


@cache
def trained(recipe: str, seed: int, cam: str) -> tuple[Classifier, float]:
    """Train, once per process.

    Args:
        recipe: of tiny/, or `zeroshot`, which trains nothing.
        seed: of the run.
        cam: map of the masks.

    Returns:
        The best checkpoint and the seconds of CPU time.
    """
    if recipe == "zeroshot":
        return tiny_classifier(CLASS_NAMES), 0.0
    config = tiny_config(recipe, seed, cam=cam)
    train, validation = training_splits(seed, batch_size=config.batch_size)
    started = time.process_time()
    best = fine_tune(tiny_classifier(CLASS_NAMES), train, validation, config).best
    return best.eval(), time.process_time() - started


@cache
def known_images() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and the digits' coverage."""
    split = evaluation_specifications()["id"]
    scenes = sample_scenes(split)[slice(0, IMAGES)]
    return render(scenes), torch.from_numpy(scenes.labels), stroke_coverage(scenes)


def measured(method: str, seed: int, cams: Sequence[str]) -> list[dict[str, Any]]:
    """Measure maps of one model.

    Args:
        method: of `METHODS`.
        seed: of its training.
        cams: maps.

    Returns:
        A record per map.
    """
    model, _ = trained(method, seed, PAPERS)
    images, labels, coverage = known_images()
    protocol = MapProtocol(cams=tuple(cams))
    with_masks = measure_maps(model, images, labels, coverage=coverage, protocol=replace(protocol, groups=("masks",)))
    without = measure_maps(model, images[:PERTURBED], labels[:PERTURBED], protocol=protocol)
    return [
        {
            "op": "cam-bench", "method": method, "seed": seed, "cam": cam, "images": len(images), "perturbed": PERTURBED,
            "values": with_masks[cam].values | without[cam].values, "errors": with_masks[cam].errors | without[cam].errors,
            "cpu_milliseconds": cpu_milliseconds(model, cam), "protocol": {**asdict(protocol), "cams": [cam]},
        }
        for cam in cams
    ]  # fmt: skip


def cpu_milliseconds(model: Classifier, cam: str) -> float:
    """CPU time per image to make a map, which other processes do not change: the median of three; 0 for the random map."""
    if cam == RANDOM:
        return 0.0
    images, labels, _ = known_images()
    times = []
    for _ in range(3):
        started = time.process_time()
        for some, their in zip(images.split(TIMED_BATCH), labels.split(TIMED_BATCH), strict=True):
            relevance_of(model, some, their, cam)
        times.append(time.process_time() - started)
    return 1000 * median(times) / len(images)


def as_source(source: str, recipe: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train with masks from a source and score the best checkpoint.

    Args:
        source: name of the masks' source.
        recipe: of tiny/.
        seed: of the run.
        changes: settings in place of the recipe's; the map.

    Returns:
        A record. Its seconds are those of CPU time, which other processes do not change.
    """
    model, seconds = trained(recipe, seed, changes.get("cam", PAPERS))
    accuracy = {scans: evaluate_all(model, scans) for scans in ("val", "test")}
    return {"op": "cam-source", "source": source, "recipe": recipe, "seed": seed, "cpu_seconds": seconds, "accuracy": accuracy}


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """Both tables, each with what it was measured on; empty without records."""
    maps = list({(r["method"], r["seed"], r["cam"]): r for r in records if r.get("op") == "cam-bench"}.values())
    sources = list({(r["source"], r["seed"]): r for r in records if r.get("op") == "cam-source"}.values())
    parts = []
    if maps:
        last = maps[-1]
        parts.append(
            f"{last['images']} ID test images, pixels removed from the first {last['perturbed']}; `zeroshot` is before "
            "fine-tuning. Percent, mean ± standard deviation over the training seeds; ↑ higher is better, ↓ lower. "
            f"{_where(maps)}:\n\n{maps_table(maps)}"
        )
    if sources:
        parts.append(
            "Masks of masked-object from each map, against the same distillation with random masks and on clean images. "
            "Percent, mean ± standard deviation over the seeds; the worst group is the worst of ID and the four shifts, "
            f"the validation column the mean of ID and OOD on the validation scans. {_where(sources)}:\n\n"
            f"{sources_table(sources)}\n\n" + "\n".join(f"- {line}" for line in verdicts(sources))
        )
    return "\n\n".join(parts)


def _where(records: Sequence[Mapping[str, Any]]) -> str:
    last, commits = records[-1], list(dict.fromkeys(r["commit"] for r in records))
    machines = " and ".join(dict.fromkeys(r["cpu"] for r in records))
    commits_text = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f"`cammask bench maps` on {machines}, {last['threads']} thread, torch {last['torch']}, {commits_text}"


def maps_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row per model and map."""
    rows = []
    for method in (name for name in METHODS if any(r["method"] == name for r in records)):
        for cam in _in_order({r["cam"] for r in records if r["method"] == method}):
            runs = [r for r in records if (r["method"], r["cam"]) == (method, cam)]
            cells = [_both([r["values"][name] for r in runs]) for name in SHOWN]
            time_ = "-" if cam == RANDOM else _both([r["cpu_milliseconds"] for r in runs], digits=2)
            rows.append([method, cam, *cells, time_, str(len(runs))])
    arrows = ["↑" if METRICS[name].higher else "↓" for name in SHOWN]
    heads = [f"{head} {arrow}" for head, arrow in zip(SHOWN.values(), arrows, strict=True)]
    return markdown_table(["model", "map", *heads, "CPU ms per image", "seeds"], rows)


def sources_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row per source of masks."""
    rows = []
    for source in _in_order({r["source"] for r in records}):
        runs = [r for r in records if r["source"] == source]
        tests = [r["accuracy"]["test"] for r in runs]
        columns = [[t["id"] for t in tests], [_ood(t) for t in tests], [min(t.values()) for t in tests]]
        columns += [[_mean_of(r, "val") for r in runs], [r["cpu_seconds"] for r in runs]]
        rows.append([source, *map(_both, columns), str(len(runs))])
    header = ["masks from", "ID", "average OOD", "worst group", "validation, ID and OOD", "CPU s of training", "seeds"]
    return markdown_table(header, rows)


def verdicts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every other source against the paper's map, seed by seed, on the test sets; and which is best on the validation sets."""
    by_seed = {
        source: {r["seed"]: r for r in records if r["source"] == source} for source in _in_order({r["source"] for r in records})
    }
    lines = []
    for source, runs in by_seed.items():
        shared = sorted(runs.keys() & by_seed.get(PAPERS, {}).keys())
        if source != PAPERS and shared:
            differences = [_mean_of(runs[seed], "test") - _mean_of(by_seed[PAPERS][seed], "test") for seed in shared]
            lines.append(compared(source, PAPERS, differences))
    maps = {source: mean(_mean_of(r, "val") for r in runs.values()) for source, runs in by_seed.items() if source in CAMS}
    if len(maps) > 1:
        best = max(maps, key=lambda source: maps[source])
        lines.append(f"best map on the validation sets: {best}, {maps[best]:.1f} against {maps.get(PAPERS, 0):.1f} of {PAPERS}")
    return lines


def _in_order(names: set[str]) -> list[str]:
    order = [*CAMS, RANDOM, *OTHERS]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _ood(accuracies: Mapping[str, float]) -> float:
    return mean(value for name, value in accuracies.items() if name != "id")


def _mean_of(record: Mapping[str, Any], scans: str) -> float:
    accuracies = record["accuracy"][scans]
    return (accuracies["id"] + _ood(accuracies)) / 2


def _both(values: Sequence[float], *, digits: int = 1) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

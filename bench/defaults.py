"""Settings for data sets of 64 to 6 000 images: a sweep on the embedded benchmark that the defaults are held against.

`python -m bench.defaults` trains the shipped tiny model with masked-object on the first N images of the benchmark, for every
learning rate, number of steps and batch below, and measures the validation scans, which share no digit with the test sets.
Appends a JSON line per run to bench/results/defaults.jsonl; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from bench.records import append, cpu_environment, read
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, Split
from cammask_fast.data.datasets.texture_digits_splits import CORRELATION, OUTLINED, evaluation_specifications, rendered
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.evaluate import accuracy
from cammask_fast.fitting import fitting_defaults
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.train import fine_tune
from cammask_fast.viz.tables import markdown_table

RECORDS = Path(__file__).parent / "results" / "defaults.jsonl"
IMAGES = (64, 192, 600, 1500, 3000, 6000)
EVALUATED = 600
"""Images of each validation set."""


def measure(images: int, config: TrainConfig) -> dict[str, float]:
    """Accuracy in percent on the ID set and the mean over the shifts, and seconds of training."""
    split = Split(
        name="train", images=images, seed=config.seed, scans="train", placement="grouped", correlation=CORRELATION,
        outlined=OUTLINED,
    )  # fmt: skip
    pixels, labels = rendered(split)
    loader = ArrayLoader(
        pixels, labels, ResumableDistributedSampler(len(pixels), batch_size=config.batch_size, shuffle=True, seed=config.seed)
    )
    started = time.perf_counter()
    tuned = fine_tune(tiny_classifier(CLASS_NAMES), loader, None, config).last
    seconds = time.perf_counter() - started
    scores = {}
    for name, evaluated in evaluation_specifications(scans="val").items():
        pixels, labels = (tensor[:EVALUATED] for tensor in rendered(evaluated))
        scores[name] = accuracy(tuned, ArrayLoader(pixels, labels, ResumableDistributedSampler(len(pixels), batch_size=100)))
    ood = mean(score for name, score in scores.items() if name != "id")
    return {"id": scores["id"], "ood": ood, "both": (scores["id"] + ood) / 2, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES))
    parser.add_argument("--lr", type=float, nargs="+", default=[6e-4, 1.25e-3, 2.5e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[33, 66, 132])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {key(record) for record in read(RECORDS)} if RECORDS.exists() else set()
    grid = itertools.product(options.seeds, options.images, options.steps, options.batch_size, options.lr)
    for seed, images, steps, batch, lr in grid:
        batch = min(batch, images)
        epochs = max(1, round(steps / (images // batch)))
        record = {"images": images, "lr": lr, "epochs": epochs, "batch_size": batch, "seed": seed}
        if key(record) in done:
            continue
        config = TrainConfig(w_distill=8.0, epochs=epochs, batch_size=batch, seed=seed, optim=replace(OptimConfig(), lr=lr))
        record |= measure(images, config)
        append(RECORDS, record | cpu_environment())
        done.add(key(record))
        print(json.dumps(record), flush=True)


def chosen(images: int) -> tuple[float, ...]:
    """What tells the runs with the defaults from others: images, lr, epochs, batch size."""
    values = fitting_defaults("tiny", images, "masked-object", {}).values
    return images, values["lr"], values["epochs"], values["batch_size"]


class Held(NamedTuple):
    """The defaults of one size against the sweep. images: training images. default: the runs' `key` without the seed, and so is
    best, of the setting that is furthest above the defaults on the seeds of both. both, best_both: means of ID and OOD on these
    seeds, percent. settings: how many were tried. seeds: those of both."""

    images: int
    default: tuple[float, ...]
    both: float
    best: tuple[float, ...]
    best_both: float
    settings: int
    seeds: int


def held(records: Sequence[Mapping[str, Any]]) -> list[Held]:
    """The defaults of every size that was swept. Raises ValueError for a size whose defaults were never run."""
    runs = defaultdict[tuple[float, ...], dict[int, float]](dict)
    for record in records:
        runs[key(record)[:-1]][record["seed"]] = record["both"]
    found = []
    for images in dict.fromkeys(setting[0] for setting in sorted(runs)):
        default = chosen(int(images))
        if default not in runs:
            raise ValueError(f"{RECORDS}: no run of {images} images with the defaults, lr, epochs and batch size {default[1:]}")

        def paired(setting: tuple[float, ...], default: tuple[float, ...] = default) -> tuple[float, float, int]:
            seeds = runs[setting].keys() & runs[default].keys()
            return mean(runs[setting][seed] for seed in seeds), mean(runs[default][seed] for seed in seeds), len(seeds)

        tried = [setting for setting in runs if setting[0] == images and runs[setting].keys() & runs[default].keys()]
        best = max(tried, key=lambda setting: paired(setting)[0] - paired(setting)[1])
        best_both, both, seeds = paired(best)
        found.append(Held(int(images), default, both, best, best_both, len(tried), seeds))
    return found


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the defaults of every size beside the best of the sweep."""
    rows = [
        [
            str(one.images), _words(one.default), f"{one.both:.1f}",
            "the same" if one.best == one.default else _words(one.best),
            f"{one.best_both:.1f}", str(one.settings), str(one.seeds),
        ]
        for one in held(records)
    ]  # fmt: skip
    header = ["training images", "default", "mean of ID and OOD", "best of the sweep", "its mean", "settings tried", "seeds"]
    last, machines = records[-1], " and ".join(dict.fromkeys(record["cpu"] for record in records))
    return (
        f"`python -m bench.defaults` (masked-object with the tiny model, weight 8; {machines}, torch {last['torch']}; "
        f"{len(records)} runs):\n\n{markdown_table(header, rows)}"
    )


def _words(setting: tuple[float, ...]) -> str:
    images, lr, epochs, batch = setting
    return f"lr {lr:g}, batch {batch:g}, {epochs * (images // batch):g} steps"


def key(record: Mapping[str, float]) -> tuple[float, ...]:
    """What tells one run from another."""
    return tuple(record[name] for name in ("images", "lr", "epochs", "batch_size", "seed"))


if __name__ == "__main__":
    main()

"""Whether an audit tells the truth, on the embedded benchmark, where the truth is known: `cammask bench audit`.

Trains the tiny model with several methods and seeds, audits each on images of the ID set, once with the true strokes as masks
and once with the model's own maps, and sets context reliance beside the accuracy on the flipped set, where the background is
always the other group's. Appends a JSON line per model; models that are there already are not trained again.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy.stats import pearsonr

from bench.records import append, cpu_environment, read
from cammask_fast.audit.figures import CONTEXT, OBJECT
from cammask_fast.audit.run import AuditConfig, Subject, audit_models
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, GROUPS, render, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications, training_splits
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.demo.report import mean_std
from cammask_fast.demo.run import tiny_config
from cammask_fast.evaluate import accuracy
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.train import fine_tune
from cammask_fast.viz.tables import markdown_table
from cammask_fast.wise_ft import interpolations

RECORDS = Path(__file__).parent / "results" / "audit.jsonl"
TRAINED = ("ft", "ft-fd", "masked-object", "masked-context", "masked-random")
WISE = "wise-ft"
MASKS = {"true": "true masks", "map": "own maps"}
SETTINGS = ("images", "contexts", "evaluated", "epochs", "batch_size")
"""Options that decide the figures."""
LEAST_MODELS = 30
"""Trained models that the correlation needs; with fewer it says so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=list(TRAINED), choices=TRAINED, metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)), metavar="SEED")
    parser.add_argument("--images", type=int, default=300, help="audited images of the ID set (default: %(default)s)")
    parser.add_argument(
        "--evaluated", type=int, default=1000, help="images of the ID and the flipped set (default: %(default)s)"
    )
    parser.add_argument("--contexts", type=int, default=4, metavar="N", help="per image and test (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--out", type=Path, default=RECORDS, help="records (default: bench/results/audit.jsonl)")


def main(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    known = read(options.out) if options.out.exists() else []
    done = {(record["model"], record["seed"]) for record in known}
    subjects = subjects_of(options.images)
    started = tiny_classifier(CLASS_NAMES)
    if ("zeroshot", 0) not in done:
        add(options, "zeroshot", 0, started, subjects, 0.0)
    for seed in options.seeds:
        for method in options.methods:
            if (method, seed) in done:
                continue
            begun = time.perf_counter()
            changes = {"epochs": options.epochs, "batch_size": options.batch_size}
            config = tiny_config(method, seed, **{name: value for name, value in changes.items() if value is not None})
            train, _ = training_splits(seed, batch_size=config.batch_size)
            last = fine_tune(started, train, None, config).last
            seconds = time.perf_counter() - begun
            if method == "ft" and (WISE, seed) not in done:
                add(options, WISE, seed, interpolations(started, last, [0.5])[0], subjects, seconds)
            add(options, method, seed, last, subjects, seconds)
    print(section(read(options.out)))
    return 0


def subjects_of(images: int) -> dict[str, Subject]:
    """The audited images, by whether their objects are known."""
    scenes = sample_scenes(evaluation_specifications()["id"])[slice(0, images)]
    known = {"true": stroke_coverage(scenes), "map": None}
    pixels, labels = render(scenes), torch.from_numpy(scenes.labels)
    return {
        name: Subject(images=pixels, labels=labels, class_names=CLASS_NAMES, groups=torch.tensor(GROUPS), coverage=coverage)
        for name, coverage in known.items()
    }


def add(
    options: argparse.Namespace, name: str, seed: int, model: Classifier, subjects: Mapping[str, Subject], seconds: float
) -> None:
    """Audit a model and append its record.

    Args:
        options: of the command.
        name: of the method.
        seed: of the run.
        model: the classifier.
        subjects: from `subjects_of`.
        seconds: of its training.
    """
    begun, found = time.perf_counter(), {}
    for masks, subject in subjects.items():
        record = audit_models([(name, model)], subject, AuditConfig(donors=options.contexts)).findings[0].to_dict()
        found[masks] = {key: record[key] for key in (CONTEXT, OBJECT, "interval")}
        found[masks]["accuracy"] = {test: one["accuracy"] for test, one in record["accuracy"].items()}
    scores = {key: accuracy(model, loader) for key, loader in evaluated(options.evaluated)}
    append(
        options.out,
        {
            "op": "audit", "model": name, "seed": seed, **found, **scores, "images": options.images,
            "evaluated": options.evaluated, "contexts": options.contexts,
            "epochs": options.epochs, "batch_size": options.batch_size, "train_seconds": round(seconds, 1),
            "seconds": round(time.perf_counter() - begun, 1), **cpu_environment(),
        },
    )  # fmt: skip


def evaluated(images: int) -> Iterator[tuple[str, ArrayLoader]]:
    """The first images of the ID and of the flipped set."""
    for name in ("id", "flipped"):
        scenes = sample_scenes(evaluation_specifications()[name])[slice(0, images)]
        sampler = ResumableDistributedSampler(len(scenes), batch_size=100)
        yield name, ArrayLoader(render(scenes), torch.from_numpy(scenes.labels), sampler)


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: reliance by method, how often the methods are in the expected order, and the correlation over the models."""
    records = [record for record in records if record.get("op") == "audit"]
    if not records:
        return "Not yet measured."
    models: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        models[record["model"]].append(record)
    rows = []
    for name, of_model in models.items():
        cells = [[record[masks][CONTEXT] for record in of_model] for masks in MASKS]
        objects = [record["true"][OBJECT] for record in of_model]
        reliance = [_three(values) for values in (*cells, objects)]
        accuracies = [mean_std([record[key] for record in of_model]) for key in ("id", "flipped")]
        rows.append((mean(cells[0]), [name, str(len(of_model)), *reliance, *accuracies]))
    header = ["model", "seeds", *(f"context reliance, {words}" for words in MASKS.values()), "object reliance, true masks"]
    header += ["ID, %", "flipped, %"]
    table = markdown_table(header, [row for _, row in sorted(rows, key=lambda row: -row[0])])
    last = records[-1]
    changed = "".join(f" --{name.replace('_', '-')} {last[name]}" for name in SETTINGS if last.get(name))
    where = (
        f"`cammask bench audit{changed}` (images of the ID set, digits that share a background as one group; {last['cpu']}, "
        f"torch {last['torch']}, commit {last['commit']}):"
    )
    lines = [*(order_line(models, masks) for masks in MASKS), *(correlation_line(records, masks) for masks in MASKS)]
    return f"{where}\n\n{table}\n\n" + "\n".join(f"- {line}" for line in lines if line)


def order_line(models: Mapping[str, Sequence[Mapping[str, Any]]], masks: str) -> str:
    """In how many seeds FT relies more on the context than WiSE-FT, and that more than masked-object; nothing without them."""
    wanted = ("ft", WISE, "masked-object")
    of_seed = {name: {record["seed"]: record[masks][CONTEXT] for record in models.get(name, ())} for name in wanted}
    seeds = sorted(set.intersection(*(set(found) for found in of_seed.values())))
    if not seeds:
        return ""
    kept = sum(of_seed["ft"][seed] > of_seed[WISE][seed] > of_seed["masked-object"][seed] for seed in seeds)
    return f"{MASKS[masks]}: ft above wise-ft above masked-object in {kept} of {len(seeds)} seeds"


def correlation_line(records: Sequence[Mapping[str, Any]], masks: str) -> str:
    """Pearson's r between context reliance and accuracy on the flipped set over the trained models, with its interval."""
    trained = [record for record in records if record["model"] in TRAINED]
    if len(trained) < 4:
        return ""
    found = pearsonr([record[masks][CONTEXT] for record in trained], [record["flipped"] for record in trained])
    low, high = found.confidence_interval(0.95)
    few = f"; fewer than the {LEAST_MODELS} that were planned" if len(trained) < LEAST_MODELS else ""
    return (
        f"{MASKS[masks]}: r = {found.statistic:+.2f} ({low:+.2f} to {high:+.2f}, 95 %, Fisher) between context reliance and "
        f"accuracy on the flipped set over {len(trained)} trained models{few}"
    )


def _three(values: Sequence[float]) -> str:
    spread = torch.tensor(values).std().item() if len(values) > 1 else None
    return f"{mean(values):+.3f}" + ("" if spread is None else f" ± {spread:.3f}")

"""`cammask evaluate`, `zeroshot` and `wise-ft`: accuracies on one or many sets, printed and written."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cammask_fast.checkpoint import load_classifier
from cammask_fast.commands.shared import Options, device_of, loader_config_of, save, say_unreadable, zero_shot_model
from cammask_fast.config import Precision
from cammask_fast.data.factory import BENCHMARK, EvaluationSet, folders_of, names_of, open_evaluation
from cammask_fast.distributed import World, init_distributed
from cammask_fast.evaluate import Score, evaluate
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import vit_config
from cammask_fast.precision import compute_dtype, resolve, set_matmul_precision
from cammask_fast.progress import score_table
from cammask_fast.runtime.notices import notice, noticed
from cammask_fast.wise_ft import interpolations


def run_evaluate(args: Options) -> None:
    device = device_of(args)
    expected = vit_config(args["arch"]) if args["arch"] else None
    model, description = load_classifier(args["checkpoint"], expect_vit=expected)
    folders = description.run.get("class_folders", description.class_names)
    with init_distributed(device) as dist_info:
        sets = open_evaluation(
            args["data"], image_size=description.vit.image_size, class_folders=folders,
            loader_config=loader_config_of(args, device, args["out"], dist_info), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        tell_seen(sets, description.run.get("trained_on"))
        scores = {name: of_set[0] for name, of_set in scores_of([model.to(device)], sets, args).items()}
        show_scores(scores, sets, args, dist_info)


def run_zeroshot(args: Options) -> None:
    device, arch = device_of(args), args["arch"] or "tiny"
    folders = folders_of(args["data"])
    names = folders if args["data"][0] == BENCHMARK else names_of(args["class_names"], folders)
    with init_distributed(device) as dist_info:
        sets = open_evaluation(
            args["data"], image_size=vit_config(arch).image_size, class_folders=folders,
            loader_config=loader_config_of(args, device, args["out"], dist_info), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        model = zero_shot_model(arch, args["pretrained"], names, args["templates"], device)
        scores = {name: of_set[0] for name, of_set in scores_of([model], sets, args).items()}
        show_scores(scores, sets, args, dist_info)


def run_wise_ft(args: Options) -> None:
    device = device_of(args)
    start, _ = load_classifier(args["start"])
    end, description = load_classifier(args["end"], expect_vit=start.visual.config)
    models = interpolations(start.to(device), end.to(device), args["alphas"])
    with init_distributed(device) as dist_info:
        sets = open_evaluation(
            args["data"], image_size=description.vit.image_size,
            class_folders=description.run.get("class_folders", description.class_names),
            loader_config=loader_config_of(args, device, args["out"], dist_info), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        scores = scores_of(models, sets, args)
        say_unreadable(dist_info, *(one.loader for one in sets.values()))
        if not dist_info.is_main_process:
            return
    curve, label = [], "average"
    for index, alpha in enumerate(args["alphas"]):
        accuracies = {name: of_set[index].top1 for name, of_set in scores.items()}
        label, average = average_ood(accuracies) or (label, None)
        curve.append({"alpha": alpha, "accuracy": accuracies, "average": average})
    text = json.dumps(curve, indent=1)
    if args["out"] is not None:
        for alpha, model in zip(args["alphas"], models, strict=True):
            run = {**description.run, "validation_accuracy": None, "alpha": alpha}
            save(args["out"], {f"alpha-{alpha:.2f}": model}, description.arch, description.class_names, run)
        (args["out"] / "scores.json").write_text(text + "\n", encoding="utf-8")
    if args["json"]:
        print(text)
        return
    columns = [*sets, label] if len(sets) > 1 else list(sets)
    print("alpha  " + "  ".join(f"{name:>6}" for name in columns))
    for row in curve:
        values = [*row["accuracy"].values(), row["average"]]
        cells = [f"{value:{max(6, len(name))}.2f}" for name, value in zip(columns, values, strict=False)]
        print(f"{row['alpha']:5.2f}  " + "  ".join(cells))


def tell_seen(sets: Mapping[str, EvaluationSet], trained_on: str | None) -> None:
    """Say where a set is the one that the model was trained on. trained_on: the index of its training images."""
    for name in sets:
        if trained_on is not None and os.path.realpath(name) == trained_on:
            notice(f"{name}: the model was trained on images of this set, so its accuracy there says little about new images")


def scores_of(models: Sequence[Classifier], sets: Mapping[str, EvaluationSet], args: Options) -> dict[str, list[Score]]:
    """A score per model on every set, in the precision asked for; each set is read once."""
    device: str = device_of(args)
    precision: Precision = args["precision"] or "auto"
    set_matmul_precision(resolve(precision, device))
    models = [model.stored_in(compute_dtype(precision, model.head.weight)) for model in models]
    return {
        name: evaluate(models, one.loader, groups=one.groups, classes=len(one.class_folders), device=device)
        for name, one in sets.items()
    }


def average_ood(accuracies: Mapping[str, float]) -> tuple[str, float] | None:
    """The mean over the sets beside ImageNet or the benchmark's ID set, or over all without these; None for one set."""
    shifted = [value for name, value in accuracies.items() if name not in ("imagenet", "id")]
    if len(accuracies) < 2:
        return None
    return "average OOD" if len(shifted) < len(accuracies) else "average", sum(shifted) / len(shifted)


def show_scores(scores: Mapping[str, Score], sets: Mapping[str, EvaluationSet], args: Options, dist_info: World) -> None:
    """Print and write the scores, on the first rank."""
    say_unreadable(dist_info, *(one.loader for one in sets.values()))
    if not dist_info.is_main_process:
        return
    rows = [
        {
            "data": name, "images": score.images, "classes": sum(value is not None for value in score.per_class),
            "accuracy": score.top1, "top5": score.top5, "calibration_error": score.calibration_error,
            "per_class": dict(zip(sets[name].class_folders, score.per_class, strict=True)),
        }
        for name, score in scores.items()
    ]  # fmt: skip
    average = average_ood({name: score.top1 for name, score in scores.items()})
    record = {
        "sets": rows, "average": None if average is None else {"name": average[0], "accuracy": average[1]},
        "notices": noticed(),
    }  # fmt: skip
    text = json.dumps(record, indent=1)
    print(text if args["json"] else score_table(rows, average), flush=True)
    if args["out"] is not None:
        write_scores(args["out"], text, rows)


def write_scores(folder: Path, text: str, rows: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    numbers = ("data", "images", "classes", "accuracy", "top5", "calibration_error")
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([numbers, *([row[name] for name in numbers] for row in rows)])
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        of_class = [(row["data"], name, value) for row in rows for name, value in row["per_class"].items() if value is not None]
        csv.writer(file).writerows([("data", "class", "accuracy"), *of_class])

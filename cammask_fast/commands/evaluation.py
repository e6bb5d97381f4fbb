"""`cammask evaluate`, `zeroshot` and `wise-ft`: accuracies on one or many sets, printed and written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cammask_fast.checkpoint import Description, load_classifier
from cammask_fast.checkpoint.heads import Classes, same_classes_in_order
from cammask_fast.checkpoint.source import LAST, find_checkpoint, find_model
from cammask_fast.commands.predictions import write_csv, write_predictions
from cammask_fast.commands.shared import Options, device_of, loader_config_of, save, say_unreadable, zero_shot_model
from cammask_fast.config import Precision
from cammask_fast.data.factory import BENCHMARK, EvaluationSet, folders_of, names_of, open_evaluation
from cammask_fast.distributed import World, init_distributed
from cammask_fast.evaluate import PredictionLog, Score, evaluate
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import vit_config
from cammask_fast.precision import compute_dtype, resolve, set_matmul_precision
from cammask_fast.progress import score_table
from cammask_fast.runtime.notices import notice, noticed, remark
from cammask_fast.wise_ft import interpolations

EMPTY: Mapping[str, PredictionLog] = MappingProxyType({})


def run_evaluate(args: Options) -> None:
    """Run `cammask evaluate`: score a checkpoint on one or several sets."""
    device = device_of(args)
    source = find_model(args["checkpoint"], arch=args["arch"] or "", pretrained=args["pretrained"])
    if source.checkpoint is None:
        run_zeroshot({**args, "arch": source.arch, "pretrained": source.pretrained})
        return
    refuse_with_checkpoint(args, source.checkpoint)
    expected = vit_config(args["arch"]) if args["arch"] else None
    model, description = load_classifier(source.checkpoint, expect_vit=expected)
    folders = description.run.get("class_folders", description.class_names)
    with init_distributed(device) as dist_info:
        sets = open_evaluation(
            args["data"], image_size=description.vit.image_size, class_folders=folders,
            loader_config=loader_config_of(args, device, args["out"], dist_info), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        tell_seen(sets, description.run.get("trained_on"))
        score_and_show(model.to(device), sets, folders, args, dist_info)


def run_zeroshot(args: Options) -> None:
    """Run `cammask zeroshot`: score a pre-trained model on one or several sets."""
    device, arch = device_of(args), args["arch"] or "tiny"
    folders = folders_of(args["data"])
    names = folders if args["data"][0] == BENCHMARK else names_of(args["class_names"], folders)
    with init_distributed(device) as dist_info:
        sets = open_evaluation(
            args["data"], image_size=vit_config(arch).image_size, class_folders=folders,
            loader_config=loader_config_of(args, device, args["out"], dist_info), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        model = zero_shot_model(arch, args["pretrained"], names, args["templates"], device)
        score_and_show(model, sets, folders, args, dist_info)


def score_and_show(
    model: Classifier, sets: Mapping[str, EvaluationSet], folders: Sequence[str], args: Options, dist_info: World
) -> None:
    """Score one model, show the scores, and write its predictions with `--out`.

    Args:
        model: the classifier.
        sets: evaluation sets by name.
        folders: class folders behind the model's logits.
        args: options of the command line.
        dist_info: rank and number of processes.
    """
    logs = {} if args["out"] is None else {name: PredictionLog(one.groups) for name, one in sets.items()}
    scores = {name: of_set[0] for name, of_set in scores_of([model], sets, args, logs).items()}
    predicted = {name: log.result() for name, log in logs.items()}
    show_scores(scores, sets, args, dist_info)
    if dist_info.is_main_process and args["out"] is not None:
        write_predictions(args["out"], sets, predicted, folders)


def run_wise_ft(args: Options) -> None:
    """Run `cammask wise-ft`: score, and with `--out` write, interpolations of two checkpoints."""
    device = device_of(args)
    names = alpha_names(args["alphas"])
    end, description = load_classifier(end_of(args["end"]))
    start = start_of(args["start"], end, description, device)
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
        for alpha, name, model in zip(args["alphas"], names, models, strict=True):
            run = {**description.run, "validation_accuracy": None, "alpha": alpha}
            save(args["out"], {f"alpha-{name}": model}, description.arch, description.class_names, run)
        (args["out"] / "scores.json").write_text(text + "\n", encoding="utf-8")
    if args["json"]:
        print(text)
        return
    columns, width = [*sets, label] if len(sets) > 1 else list(sets), max(5, *map(len, names))
    print(f"{'alpha':{width}}  " + "  ".join(f"{name:>6}" for name in columns))
    for shown, row in zip(names, curve, strict=True):
        values = [*row["accuracy"].values(), row["average"]]
        cells = [f"{value:{max(6, len(name))}.2f}" for name, value in zip(columns, values, strict=False)]
        print(f"{shown:>{width}}  " + "  ".join(cells))


def alpha_names(alphas: Sequence[float]) -> list[str]:
    """Each alpha with two digits, or with all that it has: 0.50, 0.991. Raises ValueError for one that is given twice."""
    twice = [alpha for index, alpha in enumerate(alphas) if alpha in alphas[:index]]
    if twice:
        raise ValueError(f"--alphas: {twice[0]} is given twice")
    return [f"{alpha:.2f}" if float(f"{alpha:.2f}") == alpha else str(alpha) for alpha in alphas]


def end_of(given: Path) -> Path:
    """The fine-tuned checkpoint of `--end`: of a run folder its last one, which WiSE-FT takes."""
    if given.is_dir() and (given / LAST).is_file():
        remark(f"--end {given}: its {LAST}, as in the paper of WiSE-FT; name a file to take another one")
        return given / LAST
    return find_checkpoint(given, "--end")


def start_of(given: str | None, end: Classifier, description: Description, device: str) -> Classifier:
    """The zero-shot classifier of `--start`, its head in the order of the other end's.

    Args:
        given: a run folder or checkpoint, or the name of a pre-trained model; None: the one that the other end's run began
            from.
        end: the classifier of `--end`.
        description: of the checkpoint of `--end`.
        device: of the result.

    Returns:
        The classifier on its device.

    Raises:
        ValueError: it is of another architecture or has other classes, or cannot be read.
    """
    classes, said = Classes.of(description), given or description.arch
    source = find_model(given, arch="") if given else None
    if source is None or source.checkpoint is None:
        arch = source.arch if source else description.arch
        if vit_config(arch) != description.vit:
            raise ValueError(f"--start {said} is of another architecture than --end, {description.arch}")
        pretrained = "" if source else description.run.get("pretrained") or ""
        return zero_shot_model(arch, pretrained, classes.names, None, device)
    start, own = load_classifier(source.checkpoint, expect_vit=end.visual.config)
    return same_classes_in_order(start, Classes.of(own), classes, f"--start {said} has the classes of --end")


def refuse_with_checkpoint(args: Options, checkpoint: Path) -> None:
    """Raise ValueError for options of a pre-trained model's head, which a checkpoint brings with it."""
    for name in ("pretrained", "class_names", "classes", "templates"):
        if args.get(name):
            raise ValueError(f"--{name.replace('_', '-')}: {checkpoint} brings its own head and classes")


def tell_seen(sets: Iterable[str], trained_on: str | None) -> None:
    """Say where a set is the one that the model was trained on. sets: names. trained_on: the index of its training images."""
    for name in sets:
        if trained_on is not None and os.path.realpath(name) == trained_on:
            notice(f"{name}: the model was trained on images of this set, so its accuracy there says little about new images")


def scores_of(
    models: Sequence[Classifier], sets: Mapping[str, EvaluationSet], args: Options, logs: Mapping[str, PredictionLog] = EMPTY
) -> dict[str, list[Score]]:
    """Score every model on every set; each set is read once.

    Args:
        models: classifiers of one architecture.
        sets: evaluation sets by name.
        args: options of the command line, of which device and precision are read.
        logs: by set, get the predictions of the first model.

    Returns:
        By set, a score per model.
    """
    device: str = device_of(args)
    precision: Precision = args["precision"] or "auto"
    set_matmul_precision(resolve(precision, device))
    models = [model.stored_in(compute_dtype(precision, model.head.weight)) for model in models]
    return {
        name: evaluate(
            models, one.loader, groups=one.groups, classes=len(one.class_folders), device=device, seen=logs.get(name)
        )
        for name, one in sets.items()
    }


def average_ood(accuracies: Mapping[str, float]) -> tuple[str, float] | None:
    """The mean over the sets beside ImageNet or the benchmark's ID set, or over all without these; None for one set."""
    shifted = [value for name, value in accuracies.items() if name not in ("imagenet", "id")]
    if len(accuracies) < 2:
        return None
    return "average OOD" if len(shifted) < len(accuracies) else "average", sum(shifted) / len(shifted)


def show_scores(scores: Mapping[str, Score], sets: Mapping[str, EvaluationSet], args: Options, dist_info: World) -> None:
    """Print the scores and write them to `--out`, on the main process.

    Args:
        scores: by set.
        sets: evaluation sets by name.
        args: options of the command line, of which `json` and `out` are read.
        dist_info: rank and number of processes.
    """
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
    """Write `scores.json`, `scores.csv` and `per_class.csv`.

    Args:
        folder: created when it is missing.
        text: content of `scores.json`.
        rows: one per set, as `show_scores` makes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    numbers = ("data", "images", "classes", "accuracy", "top5", "calibration_error")
    write_csv(folder / "scores.csv", numbers, ([row[name] for name in numbers] for row in rows))

"""`cammask audit`: does a model look at the object or at its context? A table, JSON, CSV and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from cammask_fast.audit.run import AuditConfig, Audited, audit_models
from cammask_fast.audit.subject import benchmark_groups, load_subject, read_groups
from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.heads import Classes, same_classes_in_order
from cammask_fast.checkpoint.source import BEST, find_model
from cammask_fast.commands.evaluation import refuse_with_checkpoint, tell_seen
from cammask_fast.commands.predictions import write_csv
from cammask_fast.commands.shared import Options, device_of, loader_config_of, say_unreadable, zero_shot_model
from cammask_fast.config import Precision
from cammask_fast.data.class_names import some
from cammask_fast.data.factory import BENCHMARK, EvaluationSet, folders_of, names_of, open_benchmark, open_evaluation
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.distributed import World
from cammask_fast.model.classifier import Classifier
from cammask_fast.precision import compute_dtype, resolve, set_matmul_precision
from cammask_fast.runtime.env import launched
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.notices import notice
from cammask_fast.viz.audit_report import (
    audit_page,
    classes_table,
    csv_rows,
    lead,
    left_out_lines,
    reliance_table,
    tests_table,
    verdicts,
)
from cammask_fast.viz.tables import markdown_table

ID = "id"
"""The benchmark's set that is audited."""
LONG = 40
"""Longest name of a model in a table, characters."""


class Opened(NamedTuple):
    """A model with its classes; trained_on: the index of its training images, where that is known."""

    name: str
    model: Classifier
    classes: Classes
    trained_on: str | None = None


def run_audit(args: Options) -> None:
    """Run `cammask audit`. Raises ValueError for options, models and data that cannot be audited."""
    if launched():
        raise ValueError("audit runs in one process: start it without torchrun")
    device = device_of(args)
    precision: Precision = args["precision"] or "auto"
    set_matmul_precision(resolve(precision, device))
    config = AuditConfig(
        cam=args["cam"], start_layer=args["cam_start_layer"], share=args["object_share"], donors=args["contexts"],
        images=args["images"], seed=args["seed"],
    )  # fmt: skip
    if args["masks"] is not None and args["maps_by"]:
        raise ValueError("--masks and --maps-by: given masks need no map; give one of them")
    first = open_first(args, device)
    loader_config = loader_config_of(args, device, args["html"].parent if args["html"] else None)
    name, one = open_set(args["data"], first, loader_config)
    tell_seen({name: one}, first.trained_on)
    subject, loader = load_subject(one, first.classes, config, loader_config, masks=args["masks"], groups=groups_of(args, one))
    say_unreadable(World(), loader)
    models = [(first.name, first.model)]
    if args["against"]:
        models.append((short(args["against"]), open_other(args["against"], "--against", first, args, device)))
    maps_by = open_other(args["maps_by"], "--maps-by", first, args, device) if args["maps_by"] else None
    with tqdm(desc="audit", unit="pass", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        audited = audit_models(
            models, subject, config, maps_by=maps_by, dtype=compute_dtype(precision, first.model.head.weight), progress=progress
        )
    for line in left_out_lines(audited):
        notice(line)
    show(audited, args)


def open_first(args: Options, device: str) -> Opened:
    """The audited model. Raises ValueError where it cannot be read."""
    source = find_model(args["model"], arch=args["arch"] or "", pretrained=args["pretrained"])
    if source.checkpoint is not None:
        refuse_with_checkpoint(args, source.checkpoint)
        model, description = load_classifier(source.checkpoint)
        return Opened(short(args["model"]), model.to(device), Classes.of(description), description.run.get("trained_on"))
    folders = folders_of([args["data"]])
    names = folders if args["data"] == BENCHMARK else names_of(args["class_names"], folders)
    model = zero_shot_model(source.arch, source.pretrained, names, args["templates"], device)
    return Opened(args["model"], model, Classes(names, folders))


def short(given: str) -> str:
    """A model's name in tables: that of its run, or the end of a long path."""
    name = given.removesuffix(f"/{BEST}")
    return name if len(name) <= LONG else str(Path("…", *Path(name).parts[-2:]))


def open_other(given: str, option: str, first: Opened, args: Options, device: str) -> Classifier:
    """A second model over the first one's classes, in their order.

    Args:
        given: a run folder, a checkpoint or a pre-trained model.
        option: that names it.
        first: the audited model.
        args: options of the command line.
        device: of the model.

    Returns:
        The classifier.

    Raises:
        ValueError: it has other classes, or cannot be read.
    """
    source = find_model(given)
    if source.checkpoint is None:
        return zero_shot_model(source.arch, source.pretrained, first.classes.names, args["templates"], device)
    model, description = load_classifier(source.checkpoint)
    return same_classes_in_order(
        model.to(device), Classes.of(description), first.classes, f"{option} {given} has the classes of {first.name}"
    )


def open_set(data: str, model: Opened, loader_config: LoaderConfig) -> tuple[str, EvaluationSet]:
    """The one set that `--data` names.

    Args:
        data: as for `open_evaluation`.
        model: the audited model, whose classes it must have.
        loader_config: how images are loaded.

    Returns:
        Its name and the set.

    Raises:
        ValueError: several sets, or data that cannot be used.
    """
    size = model.model.visual.config.image_size
    if data == BENCHMARK:
        return ID, open_benchmark([ID], size, model.classes.folders, loader_config)[ID]
    sets = open_evaluation(
        [data], image_size=size, class_folders=model.classes.folders,
        loader_config=loader_config, allow_incomplete=True,
    )  # fmt: skip
    if len(sets) > 1:
        raise ValueError(f"--data {data}: holds several sets, {some(list(sets))}; name the folder of one")
    return next(iter(sets.items()))


def groups_of(args: Options, one: EvaluationSet) -> Tensor | None:
    """int64 (C,), a number per group of classes that share a context; None where every class is one. Raises ValueError for a
    `--groups` file with a class that is not there."""
    if args["groups"] is not None:
        return read_groups(args["groups"], one.class_folders)
    if args["data"] == BENCHMARK:
        return benchmark_groups()
    return None


def show(audited: Audited, args: Options) -> None:
    """Print the audit, and write `--csv` and `--html`.

    Args:
        audited: the audit.
        args: options of the command line.
    """
    for file in (args["csv"], args["html"]):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if args["csv"] is not None:
        write_csv(args["csv"], *csv_rows(audited))
    if args["html"] is not None:
        write_text(args["html"], audit_page(audited, settings_of(args)))
    if args["json"]:
        print(json.dumps(audited.to_dict(), indent=1))
        return
    print(f"{lead(audited)}; object: {object_words(args)}\n")
    for table in (tests_table(audited), reliance_table(audited), classes_table(audited)):
        if table.rows:
            print(f"{table.title}\n\n{markdown_table(table.header, table.rows)}\n")
    for line in verdicts(audited):
        print(line)
    if args["html"] is not None:
        print(f"written to {args['html']}")


def object_words(args: Mapping[str, Any]) -> str:
    """What counts as the object, in words."""
    if args["masks"] is not None:
        return f"the masks in {args['masks']}"
    whose = short(args["maps_by"] or args["model"])
    return f"the {args['object_share']:.0%} of the patches with the highest {args['cam']} of {whose}"


def settings_of(args: Mapping[str, Any]) -> dict[str, str]:
    """The settings on the page."""
    shown = ("model", "against", "data", "contexts", "images", "groups", "seed", "precision")
    return {"object": object_words(args), **{name: str(args[name]) for name in shown if args[name] is not None}}

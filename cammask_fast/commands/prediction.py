"""`cammask predict`: the most probable classes of photographs without labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.heads import Classes
from cammask_fast.checkpoint.source import ModelSource, find_model
from cammask_fast.commands.evaluation import refuse_with_checkpoint
from cammask_fast.commands.shared import Options, device_of, zero_shot_model
from cammask_fast.config import Precision
from cammask_fast.data.class_names import class_list, some, tell_twins
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.files import photographs_of
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.precision import compute_dtype, resolve, set_matmul_precision
from cammask_fast.runtime.notices import notice, noticed
from cammask_fast.viz.mask_images import photograph

CHUNK = 64
"""Photographs in memory at a time."""
THREADS = 8
HEADER = ("image", "rank", "class", "folder", "probability")


class Prediction(NamedTuple):
    """Of one photograph: classes, the most probable first, and their probabilities; or why it cannot be read."""

    path: Path
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    fault: str = ""


def run_predict(args: Options) -> None:
    """Run `cammask predict`: classify photographs."""
    device = device_of(args)
    if args["top"] < 1:
        raise ValueError(f"--top: expected 1 or more, got {args['top']}")
    files = photographs_of(args["images"])
    source = find_model(args["model"], arch=args["arch"] or "", pretrained=args["pretrained"])
    if source.checkpoint is not None:
        refuse_with_checkpoint(args, source.checkpoint)
        model, description = load_classifier(source.checkpoint)
        classes = Classes.of(description)
    else:
        names = names_for(source, args)
        classes = Classes(names, names)
        model = zero_shot_model(source.arch, source.pretrained, names, args["templates"], device)
    precision: Precision = args["precision"] or "auto"
    set_matmul_precision(resolve(precision, device))
    model = model.to(device)
    model = model.stored_in(compute_dtype(precision, model.head.weight))
    found = show(predictions(model, files, top=args["top"]), classes, files, args)
    faults = [one for one in found if one.fault]
    if len(faults) == len(files):
        raise ValueError(f"none of the {len(files)} photographs can be read: {faults[0].fault}")


def names_for(source: ModelSource, args: Options) -> tuple[str, ...]:
    """The classes that a pre-trained model chooses from."""
    if args["classes"] == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    names = class_list(args["classes"])
    if names:
        tell_twins(names, names)
        return names
    if source.arch == "tiny":
        return CLASS_NAMES
    raise ValueError(f"--classes: needed with the pre-trained {source.arch}: a,b,c, a file with one per line, or imagenet")


@torch.no_grad()
def predictions(model: Classifier, files: Sequence[Path], *, top: int) -> Iterator[Prediction]:
    """Classify photographs, a chunk at a time.

    Args:
        model: the classifier.
        files: photographs.
        top: classes per photograph.

    Yields:
        The best classes of each photograph, in the order of the files, or why it cannot be read.
    """
    size, weight = model.visual.config.image_size, model.head.weight

    def read(path: Path) -> torch.Tensor | str:
        try:
            return photograph(path, size)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            decoded = list(pool.map(read, chunk))
            images = [one for one in decoded if isinstance(one, torch.Tensor)]
            rows: Iterator[tuple[list[float], list[int]]] = iter(())
            if images:
                pixels = normalise(torch.stack(images).to(weight.device), dtype=model.visual.conv1.weight.dtype)
                probabilities, classes = model(pixels).logits.float().softmax(1).topk(min(top, len(weight)), 1)
                rows = zip(probabilities.tolist(), classes.tolist(), strict=True)
            for path, one in zip(chunk, decoded, strict=True):
                if isinstance(one, str):
                    yield Prediction(path, fault=one)
                else:
                    values, labels = next(rows)
                    yield Prediction(path, tuple(labels), tuple(values))


def show(found: Iterator[Prediction], classes: Classes, files: Sequence[Path], args: Options) -> list[Prediction]:
    """Print a line per photograph, or JSON, and write `--csv`, while the predictions come.

    Args:
        found: predictions.
        classes: of the model's logits.
        files: photographs, whose names set the width of a line.
        args: options of the command line, of which `json` and `csv` are read.

    Returns:
        The predictions.
    """
    kept, width = [], max(len(str(path)) for path in files)
    unread: list[str] = []
    with ExitStack() as stack:
        writer = None
        if args["csv"] is not None:
            args["csv"].parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(args["csv"].open("w", newline="", encoding="utf-8", errors="backslashreplace"))
            writer = csv.writer(file)
            writer.writerow(HEADER)
        for one in found:
            kept.append(one)
            if one.fault:
                unread.append(str(one.path))
                continue
            ranked = [
                (rank, classes.names[label], classes.folders[label], value)
                for rank, (label, value) in enumerate(zip(one.classes, one.probabilities, strict=True), 1)
            ]
            if writer is not None:
                writer.writerows((one.path, rank, name, folder, f"{value:.6f}") for rank, name, folder, value in ranked)
            if not args["json"]:
                said = "   ".join(f"{name} {100 * value:.2f} %" for _, name, _, value in ranked)
                print(f"{one.path!s:{width}}  {said}", flush=True)
    if unread and len(unread) < len(files):
        notice(f"photographs that cannot be read and were left out: {len(unread)}, {some(unread, 3)}")
    if args["json"] and len(unread) < len(files):
        print(json.dumps({"images": [as_json(one, classes) for one in kept], "notices": noticed()}, indent=1))
    return kept


def as_json(one: Prediction, classes: Classes) -> dict[str, Any]:
    """A prediction as plain values."""
    if one.fault:
        return {"image": str(one.path), "error": one.fault}
    pairs = zip(one.classes, one.probabilities, strict=True)
    ranked = [{"class": classes.names[n], "folder": classes.folders[n], "probability": value} for n, value in pairs]
    return {"image": str(one.path), "predictions": ranked}

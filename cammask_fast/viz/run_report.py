"""`report.html` of a run: accuracies, curves, counterfactuals of its own images, confusions, settings; one file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from cammask_fast.cam import relevance_of
from cammask_fast.config import TrainConfig
from cammask_fast.evaluate import Predicted
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import parse_strategy
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.run_dir import LOG
from cammask_fast.viz.html import Picture, picture, render
from cammask_fast.viz.mask_images import apply
from cammask_fast.viz.plots import GalleryRow, gallery_figure

SHOWN = 6
"""Images of the gallery."""
MOST_CLASSES = 40
"""More classes than these are not drawn as a confusion matrix."""
WORST = 10
WRONG = 4
"""Pictures of each of the worst classes."""
THUMBNAIL = 112
NO_SHIFT = "Name other sets with --eval NAME=FOLDER to see what the run does to images unlike those it is trained on."


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of a run's log about its steps, and those about its epochs; lines that a kill has cut off are left out."""
    steps: list[dict[str, Any]] = []
    epochs: list[dict[str, Any]] = []
    path = run / LOG
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
            (epochs if "accuracy" in found else steps).append(found)
        except (ValueError, TypeError):
            continue
    return steps, epochs


def curves(steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Loss parts, accuracies, gradient norm and learning rate, and what the masks did, over the steps."""
    pictures = []
    panels: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("Loss", ("loss", "task", "distill")),
        ("Gradient norm and learning rate", ("gradient_norm", "lr")),
        ("Masks: share of the patches, and entropy of the maps (1: even)", ("mask_share", "cam_entropy")),
    )
    names = sorted({name for line in epochs for name in line["accuracy"]})
    if names:
        values = {name: [(line["epoch"], line["accuracy"].get(name)) for line in epochs] for name in names}
        pictures.append(picture("Accuracy by epoch, %", _lines(values, "epoch")))
    for title, names_of_panel in panels:
        values = {name: [(line["step"], line.get(name)) for line in steps] for name in names_of_panel}
        drawn = {name: points for name, points in values.items() if any(value is not None for _, value in points)}
        if drawn:
            pictures.append(picture(title, _lines(drawn, "step", panels=title.startswith("Gradient"))))
    return pictures


def counterfactuals(
    before: Classifier, after: Classifier, images: Tensor, labels: Tensor, names: Sequence[str], config: TrainConfig
) -> Picture | None:
    """The run's own images with map, mask and counterfactual of its strategy, by the model before and after training.

    Args:
        before: the model before training.
        after: the model after training.
        images: uint8 (N, H, W, 3), of which up to `SHOWN` are drawn.
        labels: int64 (N,).
        names: of the classes.
        config: settings of the run.

    Returns:
        The picture; None for a method without masks by a map.
    """
    masking = config.resolved.masking
    strategy = None if masking == "none" else parse_strategy(masking)
    if strategy is None or not strategy.needs_cam or len(images) < 2:
        return None
    images, labels, rows = images[:SHOWN], labels[:SHOWN], []
    grid, made = before.visual.config.grid, {}
    maps = {}
    shown = {"before training": before, "after training": after}
    if config.cam_source == "teacher":
        shown = {"by the teacher": before}
    for when, model in shown.items():
        options: dict[str, Any] = {"start_layer": config.cam_start_layer, "contrast": config.cam_contrast}
        relevance = relevance_of(model, images, labels, config.cam, **options).cpu()
        maps[when] = normalise_relevance(relevance).view(-1, grid, grid)
        generator = torch.Generator().manual_seed(config.seed)
        made[when] = apply(strategy, images.cpu(), len(images), relevance, generator, grid=grid)
    for i, label in enumerate(labels.tolist()):
        strategies = {when: (mask[i], filled[i]) for when, (mask, filled) in made.items()}
        rows.append(GalleryRow(names[label], images[i].cpu(), maps[when][i], strategies))
    whose = "the frozen teacher's, which masked" if config.cam_source == "teacher" else "the fine-tuned model's"
    return picture("Counterfactuals of your images", gallery_figure(rows), text=f"{masking}; the map is {whose}")


def confusion(counts: Tensor, names: Sequence[str]) -> tuple[list[Picture], list[dict[str, str]]]:
    """The confusion matrix as a picture (up to `MOST_CLASSES` classes), and the worst classes with what they are taken for.

    counts: int64 (K, K), images of class i that were predicted as class j.
    """
    images = counts.sum(1)
    right = counts.diagonal()
    share = right / images.clamp(min=1)
    rows = []
    for index in share.argsort(stable=True).tolist():
        if not images[index] or right[index] == images[index]:
            continue
        wrong = counts[index].clone()
        wrong[index] = 0
        order = wrong.argsort(descending=True, stable=True).tolist()
        taken = ", ".join(f"{names[j]} ({int(wrong[j])})" for j in order[:3] if wrong[j])
        one = {
            "name": names[index],
            "images": str(int(images[index])),
            "right": f"{100 * share[index]:.1f} %",
            "taken_for": taken,
        }
        rows.append(one)
    if len(names) > MOST_CLASSES or not int(images.sum()):
        return [], rows[:WORST]
    side = min(9.0, 2.5 + 0.3 * len(names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(100 * (counts / images.clamp(min=1)[:, None]).numpy(), cmap="Blues", vmin=0, vmax=100)
    short = [_plain(name, 18) for name in names]
    axis.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), short, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("class")
    figure.colorbar(drawn, label="% of the class", shrink=0.7)
    return [picture("Confusion matrix, validation images", figure)], rows[:WORST]


def spread_over_classes(labels: Tensor, count: int) -> list[int]:
    """Positions of up to `count` images, from as many classes as possible, in the order of the classes. labels: int64 (M,)."""
    order = labels.argsort(stable=True)
    sorted_labels = labels[order]
    first = torch.searchsorted(sorted_labels, sorted_labels)  # where the class of each begins
    turn = torch.arange(len(labels)) - first
    chosen = order[(turn * (int(labels.max()) + 1 if len(labels) else 1) + sorted_labels).argsort(stable=True)]
    if len(labels.unique()) > count:  # more classes than pictures: from all over the list
        chosen = chosen[: len(labels.unique())][torch.linspace(0, len(labels.unique()) - 1, count).round().long()]
    picked = chosen[:count]
    return picked[labels[picked].argsort(stable=True)].tolist()


def worst_images(predicted: Predicted, names: Sequence[str]) -> list[tuple[int, str]]:
    """Sample ids of wrong images of the classes with the lowest accuracy, the surest mistakes of each class first.

    predicted: of the validation images. Returns ids with what to write under them.
    """
    labels, guesses = predicted.labels, predicted.groups
    images = torch.bincount(labels, minlength=len(names))
    right = torch.bincount(labels[guesses == labels], minlength=len(names))
    share = torch.where(images > 0, right / images.clamp(min=1), 2.0)
    found = []
    for label in share.argsort(stable=True)[:WORST].tolist():
        wrong = ((labels == label) & (guesses != label)).nonzero()[:, 0]
        for index in wrong[predicted.probabilities[wrong].argsort(descending=True, stable=True)][:WRONG].tolist():
            guess, sure = int(guesses[index]), 100 * float(predicted.probabilities[index])
            taken = names[guess] if guess >= 0 else "none of the classes"
            found.append((int(predicted.sample_ids[index]), f"{names[label]}, taken for {taken}, {sure:.0f} %"))
    return found


def thumbnail(image: Tensor, text: str, *, most: int = THUMBNAIL) -> Picture:
    """A small JPEG of an image, with its caption.

    Args:
        image: uint8 (H, W, 3).
        text: caption.
        most: longest side, pixels.

    Returns:
        The picture as a data URL.
    """
    small = Image.fromarray(image.cpu().numpy())
    small.thumbnail((most, most))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return Picture(text, f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def trade_off(record: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Validation accuracy against the mean of the other sets, from zero-shot over the epochs to the best checkpoint."""
    before, after = record.get("zero_shot", {}), record.get("accuracy", {})
    others = [name for name in after if name != "validation"]

    def point(scores: Mapping[str, float]) -> tuple[float, float] | None:
        if not others or not {"validation", *others} <= scores.keys():
            return None
        return scores["validation"], sum(scores[name] for name in others) / len(others)

    path = [found for found in (point(before), *(point(line["accuracy"]) for line in epochs)) if found is not None]
    if point(after) is None:
        return []
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    if path:
        axis.plot(*zip(*path, strict=True), marker=".", lw=1, color="0.5", label="epochs")
    for name, one, marker in (("zero-shot", point(before), "o"), ("best checkpoint", point(after), "*")):
        if one is not None:
            axis.scatter(*one, marker=marker, s=120 if marker == "*" else 50, zorder=3, label=name)
    axis.set_xlabel("validation accuracy, %")
    axis.set_ylabel(f"mean over {_plain(', '.join(others), 50)}, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return [picture("Trade-off: validation images against the other sets", figure)]


def write_run_report(
    run: Path,
    record: Mapping[str, Any],
    *,
    gallery: Picture | None = None,
    counts: Tensor | None = None,
    wrong: Sequence[Picture] = (),
    alarms: Sequence[str] = (),
    audit: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: the folder, with its log.
        record: what `run.json` holds.
        gallery: from `counterfactuals`.
        counts: confusion counts of the validation images, int64 (K, K).
        wrong: images of the worst classes, from `worst_images` and `thumbnail`.
        alarms: sentences that belong on top.
        audit: from `audit_report.view`; None: the run was not audited.

    Returns:
        The file's path.

    Raises:
        OSError: when the file cannot be written.
    """
    steps, epochs = read_log(run)
    matrix, worst = ([], []) if counts is None else confusion(counts, record["class_names"])
    config = record["config"]
    optim = config.get("optim", {})
    settings = {
        **{name: record[name] for name in ("arch", "pretrained", "data", "device", "loader", "train_images") if name in record},
        **{name: value for name, value in config.items() if name != "optim"}, **optim, "command": record.get("command", ""),
    }  # fmt: skip
    lead = (
        record.get("arch", ""), f"{len(record['class_names'])} classes", f"{record.get('train_images', '?')} training images",
        f"{config['epochs']} epochs", f"{record.get('seconds', 0):.0f} s",
    )  # fmt: skip
    page = render(
        "run.html",
        title=f"{config['method']} on {record.get('data', 'data')}",
        lead=", ".join(lead),
        alarms=list(alarms),
        accuracy=accuracy_rows(record),
        hint="" if set(record.get("accuracy", {})) - {"validation"} else NO_SHIFT,
        pictures=[*trade_off(record, epochs), *curves(steps, epochs), *([gallery] if gallery else []), *matrix],
        wrong=list(wrong),
        worst=worst,
        audit=audit,
        settings=[(name, _text(value)) for name, value in settings.items()],
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def accuracy_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Zero-shot and fine-tuned accuracy in percent, a row per evaluation set."""
    before, after = record.get("zero_shot", {}), record.get("accuracy", {})
    rows = []
    for name in dict.fromkeys([*before, *after]):
        first, last = before.get(name), after.get(name)
        shown = ["–" if value is None else f"{value:.2f}" for value in (first, last)]
        difference = "–" if first is None or last is None else f"{last - first:+.2f}"
        rows.append({"name": name, "before": shown[0], "after": shown[1], "difference": difference})
    return rows


def _lines(values: Mapping[str, Sequence[tuple[float, float | None]]], label: str, *, panels: bool = False) -> Figure:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots(1, len(values) if panels else 1, squeeze=False)[0]
    for index, (name, points) in enumerate(values.items()):
        axis = axes[index if panels else 0]
        x, y = zip(*points, strict=True)
        axis.plot(x, [np.nan if value is None else value for value in y], marker="." if len(x) < 60 else "", label=name, lw=1.2)
    for axis in axes:
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    return figure


def _plain(name: str, most: int) -> str:
    """A class name for matplotlib: short, and without its mathematics."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""An audit for people: tables, sentences, and an HTML page with the worst classes and their counterfactuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cammask_fast.audit.figures import CONTEXT, LEVEL, OBJECT, ClassFindings, Interval
from cammask_fast.audit.run import Audited
from cammask_fast.viz.html import Picture, picture, render
from cammask_fast.viz.run_report import MOST_CLASSES, thumbnail
from cammask_fast.viz.tables import Table

TITLES = {
    "clean": "as it is", "same_context": "context of the same class", "other_context": "context of other classes",
    "object_filled": "object filled", "random_filled": "random patches filled",
}  # fmt: skip
RELIANCE = {CONTEXT: "context reliance", OBJECT: "object reliance"}
WORST = 10
SHOWN_CLASSES, SHOWN_IMAGES = 6, 3
"""Of the pictures: classes, and counterfactuals of each."""
TRIPTYCH = 480
"""Longest side of a picture of an image, its mask and its counterfactual, pixels."""
GREY = 127
GUIDE = (
    "Context reliance is how much probability the true class loses when the context comes from images of other classes, beyond "
    "what it loses when the context comes from other images of its own class. 0: the context does not matter. Object reliance "
    "is the same for the object: what filling it costs beyond filling as many random patches."
)


class WorstClass(NamedTuple):
    """A class of the page, with pictures of its images, their masks and counterfactuals."""

    name: str
    text: str
    pictures: list[Picture]


def tests_table(audited: Audited) -> Table:
    """Accuracy, probability of the true class and calibration error under every test, of every model."""
    header, rows = ["the image is shown with", *_columns(audited, "accuracy, %", "true class, %", "ECE, %")], []
    for test in audited.findings[0].accuracy:
        row = [TITLES[test]]
        for found in audited.findings:
            row += [_percent(found.accuracy[test]), f"{100 * (found.probability[test].value or 0):.1f}"]
            row += [f"{found.calibration_error[test]:.1f}"]
        if audited.comparison is not None:
            row.append(_percent(audited.comparison.differences[f"accuracy {test}"], sign=True))
        rows.append(row)
    if audited.comparison is not None:
        header.append("difference of accuracy")
    return Table("Accuracy under each test", header, rows, f"In brackets {LEVEL:.0%} bootstrap intervals over images.")


def reliance_table(audited: Audited) -> Table:
    """Context and object reliance of every model, and their difference."""
    several = len(audited.names) > 1
    header = ["", *(audited.names if several else ["value"]), *(["difference"] if several else [])]
    rows = []
    for key, title in RELIANCE.items():
        row = [title, *(reliance_words(found.reliance.get(key)) for found in audited.findings)]
        if audited.comparison is not None:
            row.append(reliance_words(audited.comparison.differences.get(key)))
        rows.append(row)
    return Table("Reliance", header, rows, GUIDE)


def worst_classes(audited: Audited) -> list[str]:
    """Names of the first model's classes with context reliance, the largest first."""
    known = {
        name: one.reliance[CONTEXT].value or 0.0 for name, one in audited.findings[0].classes.items() if CONTEXT in one.reliance
    }
    return sorted(known, key=lambda name: -known[name])


def classes_table(audited: Audited, *, most: int = WORST) -> Table:
    """The classes that rely most on their context. most: rows."""
    several = len(audited.names) > 1
    header = ["class", "images", "accuracy, %", "with other contexts", "context reliance"]
    header += [f"of {audited.names[1]}"] if several else []
    header += ["object reliance", "then taken for", "captured by the context of"]
    rows = []
    for name in worst_classes(audited)[:most]:
        one = audited.findings[0].classes[name]
        row = [name, str(one.images), f"{one.accuracy['clean']:.1f}", f"{one.accuracy['other_context']:.1f}"]
        row.append(reliance_words(one.reliance[CONTEXT]))
        row += [reliance_words(audited.findings[1].classes[name].reliance[CONTEXT])] if several else []
        rows.append([*row, reliance_words(one.reliance[OBJECT]), _shares(one.confused_with), _shares(one.captured_by)])
    return Table("Classes that rely most on their context", header, rows)


def verdicts(audited: Audited) -> list[str]:
    """What the figures say, a sentence or two per model."""
    said = []
    for name, found in zip(audited.names, audited.findings, strict=True):
        words = []
        if CONTEXT in found.reliance:
            words.append(_verdict(found.reliance[CONTEXT], "the context", "the context of other classes", "that of its own"))
        else:
            words.append("context reliance cannot be known: all images are of one class or group")
        words.append(_verdict(found.reliance[OBJECT], "the object", "filling the object", "as many random patches"))
        said.append(f"{name}: {'; '.join(words)}")
    if audited.comparison is not None and CONTEXT in audited.comparison.differences:
        one = audited.comparison.differences[CONTEXT]
        relation = {1: "relies more on the context than", -1: "relies less on the context than"}
        verb = relation.get(_sign(one), "relies on the context no more and no less, as far as can be told, than")
        said.append(f"{audited.names[0]} {verb} {audited.names[1]}: {reliance_words(one)}")
    return said


def left_out_lines(audited: Audited) -> list[str]:
    """A line per reason for which images are not audited."""
    return [f"images that are not audited, {reason}: {int(who.sum())}" for reason, who in audited.trials.left_out.items()]


def lead(audited: Audited) -> str:
    """How many images, classes and contexts there are."""
    audits = audited.findings[0]
    groups = len(audited.trials.groups[audited.trials.labels].unique())
    classes = sum(one.images > 0 for one in audits.classes.values())
    shared = f" in {groups} groups that share a context" if groups < classes else ""
    of = "1 class" if classes == 1 else f"{classes} classes"
    return f"{audits.images} images of {of}{shared}, {audited.trials.draws('same_context')} contexts each"


def reliance_words(one: Interval | None) -> str:
    """`+0.273 (+0.241 to +0.305)`; a dash where it is not known."""
    if one is None or one.value is None:
        return "–"
    bounds = one.bounds()
    return f"{one.value:+.3f}" if bounds is None else f"{one.value:+.3f} ({bounds[0]:+.3f} to {bounds[1]:+.3f})"


def chart(audited: Audited) -> list[Picture]:
    """Context reliance by class with its interval, of every model; nothing where none is known."""
    names = worst_classes(audited)[:MOST_CLASSES]
    if not names:
        return []
    figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(names) * len(audited.names)), layout="constrained")
    axis = figure.subplots()
    for number, (model, found) in enumerate(zip(audited.names, audited.findings, strict=True)):
        values = [found.classes[name].reliance[CONTEXT] for name in names]
        middle = [one.value or 0.0 for one in values]
        bounds = [one.bounds() or [value, value] for one, value in zip(values, middle, strict=True)]
        heights = [row + (number - (len(audited.names) - 1) / 2) * 0.3 for row in range(len(names))]
        errors = [[max(0.0, m - b[0]) for m, b in zip(middle, bounds, strict=True)]]
        errors.append([max(0.0, b[1] - m) for m, b in zip(middle, bounds, strict=True)])
        axis.errorbar(middle, heights, xerr=errors, fmt="o", markersize=4, capsize=2, lw=1, label=_plain(model, 40))
    axis.axvline(0, color="0.6", lw=0.8)
    axis.set_yticks(range(len(names)), [_plain(name, 30) for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("context reliance")
    axis.grid(alpha=0.3)
    if len(audited.names) > 1:
        axis.legend(fontsize=8)
    return [picture("Context reliance by class", figure)]


def worst_pictures(audited: Audited) -> list[WorstClass]:
    """Of the classes that rely most on their context, the counterfactuals that take most from the true class."""
    trials, answers, names = audited.trials, audited.answers[0], audited.class_names
    labels = trials.labels[: trials.audited]
    shown = []
    for name in worst_classes(audited)[:SHOWN_CLASSES]:
        one, label = audited.findings[0].classes[name], names.index(name)
        rows = (labels == label).nonzero()[:, 0]
        lost = answers["clean"].truth[rows] - answers["other_context"].truth[rows]  # (n, D)
        draw = lost.max(1).indices
        pictures = []
        for at in lost.max(1).values.argsort(descending=True, stable=True)[:SHOWN_IMAGES].tolist():
            image, which = int(rows[at]), int(draw[at])
            donor = names[int(trials.donor_labels("other_context")[image, which])]
            taken = names[int(answers["other_context"].predicted[image, which])]
            sure = 100 * float(answers["other_context"].confidence[image, which])
            before = 100 * float(answers["clean"].truth[image, 0])
            verb = "still" if taken == name else "taken for"
            text = f"{name} ({before:.0f} %), with the context of {donor}: {verb} {taken} ({sure:.0f} %)"
            pictures.append(triptych(audited, image, which, text))
        shown.append(WorstClass(name, _class_words(one), pictures))
    return shown


def triptych(audited: Audited, image: int, draw: int, text: str) -> Picture:
    """An image, what counts as its object, and its counterfactual with another class's context, side by side.

    Args:
        audited: the audit.
        image: 0 to N - 1.
        draw: which context.
        text: caption.

    Returns:
        A JPEG inside the page.
    """
    trials = audited.trials
    own, changed = trials.picture("clean", image), trials.picture("other_context", image, draw)
    mask = trials.masks["other_context"][image]
    grid = round(len(mask) ** 0.5)
    side = own.shape[0] // grid
    context = mask.view(grid, grid).repeat_interleave(side, 0).repeat_interleave(side, 1)[..., None]
    cut = torch.where(context, torch.full_like(own, GREY), own)
    gap = torch.full((own.shape[0], max(1, own.shape[0] // 24), 3), 255, dtype=torch.uint8)
    return thumbnail(_enlarged(torch.cat([own, gap, cut, gap, changed], 1)), text, most=TRIPTYCH)


def _enlarged(pixels: Tensor) -> Tensor:
    """Small pictures by whole factors, so that a browser does not blur them."""
    factor = max(1, TRIPTYCH // pixels.shape[1])
    return pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def view(audited: Audited) -> dict[str, Any]:
    """What the templates show of an audit."""
    return {
        "lead": lead(audited), "verdicts": verdicts(audited), "left_out": left_out_lines(audited),
        "tables": [tests_table(audited), reliance_table(audited), classes_table(audited)],
        "pictures": chart(audited), "worst": worst_pictures(audited),
    }  # fmt: skip


def audit_page(audited: Audited, settings: Mapping[str, str]) -> str:
    """The self-contained page of an audit.

    Args:
        audited: the audit.
        settings: of the command, by name.

    Returns:
        HTML.
    """
    title = f"What {audited.names[0]} looks at" + "".join(f", against {name}" for name in audited.names[1:])
    return render("audit.html", title=title, audit=view(audited), settings=list(settings.items()))


def _columns(audited: Audited, *titles: str) -> list[str]:
    if len(audited.names) == 1:
        return list(titles)
    return [f"{name}: {title}" for name in audited.names for title in titles]


def _percent(one: Interval, *, sign: bool = False) -> str:
    style = "+.1f" if sign else ".1f"
    bounds = one.bounds()
    brackets = "" if bounds is None else f" ({bounds[0]:{style}} to {bounds[1]:{style}})"
    return f"{one.value or 0.0:{style}}{brackets}"


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({share:.0%})" for name, share in shares.items()) or "–"


def _class_words(one: ClassFindings) -> str:
    words = f"context reliance {reliance_words(one.reliance[CONTEXT])}, {one.images} images"
    return f"{words}; then taken for {_shares(one.confused_with)}" if one.confused_with else words


def _sign(one: Interval) -> int:
    """-1 or 1 where the interval excludes zero, else 0."""
    bounds = one.bounds()
    return 0 if bounds is None else (bounds[0] > 0) - (bounds[1] < 0)


def _verdict(one: Interval, what: str, change: str, control: str) -> str:
    """A clause about reliance. what: on which. change, control: what is compared."""
    bounds = one.bounds()
    where = "" if bounds is None else f" ({LEVEL:.0%} interval {100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f})"
    points = 100 * (one.value or 0.0)
    if not _sign(one):
        return f"no reliance on {what} is told apart from zero, {points:+.1f} points of probability{where}"
    verb = "takes" if points > 0 else "gives"
    return f"{change} {verb} {abs(points):.1f} points of the true class's probability{where} beyond {control}"


def _plain(name: str, most: int) -> str:
    """A class name for matplotlib: short, and without its mathematics."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def csv_rows(audited: Audited) -> tuple[Sequence[str], list[list[Any]]]:
    """Header and rows of `--csv`: for every model a row for all images and one per class."""
    tests = list(audited.findings[0].accuracy)
    header = ["model", "class", "images", "left_out", *(f"accuracy_{test}" for test in tests)]
    for key in RELIANCE:
        header += [key, f"{key}_low", f"{key}_high"]
    header += ["confused_with", "captured_by", "captures"]
    rows = []
    for name, found in zip(audited.names, audited.findings, strict=True):
        lost = sum(one.left_out for one in found.classes.values())
        accuracy = [found.accuracy[test].value for test in tests]
        rows.append([name, "", found.images, lost, *accuracy, *_reliance_cells(found.reliance), "", "", ""])
        for label, one in found.classes.items():
            accuracy = [one.accuracy.get(test) for test in tests]
            named = [
                ";".join(f"{other}={share:.4f}" for other, share in s.items()) for s in (one.confused_with, one.captured_by)
            ]
            rows.append(
                [name, label, one.images, one.left_out, *accuracy, *_reliance_cells(one.reliance), *named, one.captures]
            )
    return header, rows


def _reliance_cells(reliance: Mapping[str, Interval]) -> list[float | None]:
    found = [reliance.get(key, Interval(None)) for key in RELIANCE]
    return [cell for one in found for cell in one]

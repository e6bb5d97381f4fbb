"""Heads of two classifiers, class by class: the rows of one in the order of the other."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.checkpoint.classifier import Description
from cammask_fast.data.class_names import loose, some
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.notices import notice, remark


class Classes(NamedTuple):
    """The classes of a head in its order: their names and the folders behind them."""

    names: tuple[str, ...]
    folders: tuple[str, ...]

    @classmethod
    def of(cls, description: Description) -> Classes:
        """The classes of a checkpoint; without folders of its own, those are the names."""
        return cls(description.class_names, tuple(description.run.get("class_folders", description.class_names)))


def matching_rows(wanted: Classes, known: Classes) -> list[int | None]:
    """For each wanted class the row of the known head that is of the same class, or None.

    By name; among classes of one name by folder, then in their order; else by the name without case and underscores; else by a
    folder that is no number. No row is given twice.
    """
    rows: list[int | None] = [None] * len(wanted.names)
    free = dict.fromkeys(range(len(known.names)))
    keys = (
        lambda classes, i: (classes.names[i], classes.folders[i]),
        lambda classes, i: classes.names[i],
        lambda classes, i: loose(classes.names[i]),
        lambda classes, i: None if classes.folders[i].isdecimal() else classes.folders[i],
    )
    for key in keys:
        rows_of = defaultdict[object, list[int]](list)
        for row in free:
            rows_of[key(known, row)].append(row)
        for index, found in enumerate(rows):
            name = key(wanted, index)
            if found is None and name is not None and rows_of[name]:
                rows[index] = row = rows_of[name].pop(0)
                del free[row]
    return rows


def same_classes_in_order(model: Classifier, own: Classes, wanted: Classes, who: str) -> Classifier:
    """Put the rows of a model's head into another head's order.

    Args:
        model: changed in place.
        own: its classes.
        wanted: those of the other head.
        who: words for the error: `START has …, END has …`.

    Returns:
        The model.

    Raises:
        ValueError: naming the classes that only one of them has.
    """
    rows = matching_rows(wanted, own)
    missing = [name for name, row in zip(wanted.names, rows, strict=True) if row is None]
    taken = {row for row in rows if row is not None}
    more = [name for row, name in enumerate(own.names) if row not in taken]
    if missing or more:
        words = [f"{label}: {some(names)}" for label, names in (("it lacks", missing), ("only it has", more)) if names]
        raise ValueError(f"{who} ({'; '.join(words)}): they must have the same classes")
    order = [row for row in rows if row is not None]
    if order != list(range(len(order))):
        remark(f"{who} in another order: its head was put into the order of the other, by class name")
        with torch.no_grad():
            for parameter in (model.head.weight, model.head.bias):
                parameter.copy_(parameter[order].clone())
    return model


def head_for(tuned: Classifier, own: Classes, wanted: Classes, zero_shot: Tensor | None, who: str) -> Classifier:
    """A classifier of the wanted classes with the tuned image tower.

    Args:
        tuned: the classifier to start from; it is not changed.
        own: its classes.
        wanted: those of the new head.
        zero_shot: float (K, E), the wanted classes' zero-shot weights, for classes that `tuned` does not have; None where they
            cannot be had.
        who: words for lines and errors.

    Returns:
        A new classifier; rows of classes that `tuned` knows are its own, the others zero-shot.

    Raises:
        ValueError: where a class has no weights.
    """
    rows = matching_rows(wanted, own)
    new = [index for index, row in enumerate(rows) if row is None]
    if new and zero_shot is None:
        raise ValueError(f"{who} lacks {len(new)} of the {len(rows)} classes, {some([wanted.names[i] for i in new])}")
    weight, bias = tuned.head.weight.detach(), tuned.head.bias.detach()
    picked = torch.tensor([0 if row is None else row for row in rows], device=weight.device)
    weight, bias = weight[picked].clone(), bias[picked].clone()
    if zero_shot is not None:
        weight[new], bias[new] = zero_shot.to(weight)[new], 0.0
    if new:
        count = f"{len(new)} of the {len(rows)} classes" if len(new) < len(rows) else f"none of the {len(rows)} classes"
        lacks = "lacks" if len(new) < len(rows) else "has"
        notice(f"{who} {lacks} {count} ({some([wanted.names[i] for i in new])}): their rows of the head begin at zero-shot")
    if len(rows) - len(new) < len(own.names):
        left = [name for row, name in enumerate(own.names) if row not in rows]
        notice(f"{who} has classes that are not in the data: {len(left)}, {some(left)}")
    model = Classifier(tuned.visual, weight)
    with torch.no_grad():
        model.head.bias.copy_(bias)
    return model.to(weight.device).eval()

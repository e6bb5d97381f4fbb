"""`predictions.csv`, `per_class.csv` and the confusion matrices of an evaluation."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cammask_fast.data.factory import EvaluationSet
from cammask_fast.evaluate import Predicted

OTHER = "(none of these)"


def write_csv(path: Path, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV in UTF-8; names of files that are not UTF-8 are escaped.

    Args:
        path: of the file.
        header: first row.
        rows: the others.
    """
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_predictions(
    folder: Path, sets: Mapping[str, EvaluationSet], predicted: Mapping[str, Predicted], model_folders: Sequence[str]
) -> None:
    """A line per image, a line per class with its counts, and a matrix per set: rows are the true classes.

    Args:
        folder: exists.
        sets: the evaluation sets by name.
        predicted: of every set.
        model_folders: the class folder behind each logit.
    """
    write_csv(
        folder / "predictions.csv", ("data", "image", "class", "predicted", "probability", "correct"),
        (row for name, one in predicted.items() for row in _prediction_rows(name, sets[name], one, model_folders)),
    )  # fmt: skip
    counts = {name: one.confusion(len(sets[name].class_folders)) for name, one in predicted.items()}
    of_class = [
        (name, label, 100.0 * own / total, total, own, taken)
        for name, matrix in counts.items()
        for label, total, own, taken in zip(
            sets[name].class_folders, matrix.sum(1).tolist(), matrix.diagonal().tolist(), matrix.sum(0).tolist()[:-1],
            strict=True,
        )
        if total
    ]  # fmt: skip
    write_csv(folder / "per_class.csv", ("data", "class", "accuracy", "images", "correct", "predicted"), of_class)
    for name, path in zip(counts, _matrix_files(folder, list(counts)), strict=True):
        labels, matrix = sets[name].class_folders, counts[name].tolist()
        others = any(row[-1] for row in matrix)
        rows = [(label, *(row if others else row[:-1])) for label, row in zip(labels, matrix, strict=True)]
        write_csv(path, ("class", *labels, *([OTHER] if others else [])), rows)


def _prediction_rows(
    name: str, one: EvaluationSet, predicted: Predicted, model_folders: Sequence[str]
) -> Iterable[tuple[Any, ...]]:
    source = getattr(one.loader, "source", None)
    for index, label, logit, group, probability in zip(*(column.tolist() for column in predicted), strict=True):
        image = str(index) if source is None else source.name(index)
        yield name, image, one.class_folders[label], model_folders[logit], f"{probability:.6f}", int(group == label)


def _matrix_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """`confusion.csv`, for several sets `confusion-NAME.csv` with the last part of each name."""
    if len(names) == 1:
        return [folder / "confusion.csv"]
    short = [re.sub(r"[^\w.-]+", "_", Path(name).name) or "set" for name in names]
    return [
        folder / (f"confusion-{one}.csv" if short.count(one) == 1 else f"confusion-{index + 1}-{one}.csv")
        for index, one in enumerate(short)
    ]

"""`metrics.csv`: the lines of a run's log as a table, for a spreadsheet or pandas."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cammask_fast.runtime.files import write_text

METRICS = "metrics.csv"
FIRST = ("step", "epoch")


def read_lines(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill has cut off is left out. Raises OSError when the file cannot be read."""
    lines = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


class MetricsTable:
    """A row per line of the log beside it: those about steps, and those about epochs, whose accuracies are columns
    `accuracy/SET` in percent. A cell is empty where a line does not have the value; numbers are the log's, digit for digit.

    The log is what counts: the table is written anew from it when a column is added, when the run resumes, and after a row
    could not be written.
    """

    def __init__(self, log: Path):
        self.log, self.path = log, log.with_name(METRICS)
        self.columns: tuple[str, ...] = ()
        """Of the file, in order; empty when it has to be written anew."""

    def rebuild(self) -> None:
        """Write the whole table. Raises OSError when it cannot be written; the next `add` tries again."""
        self.columns = ()
        rows = [_flat(line) for line in read_lines(self.log)]
        columns = tuple(dict.fromkeys([*FIRST, *(name for row in rows for name in row)]))
        steps = [name for name in columns if not name.startswith("accuracy/")]
        columns = (*steps, *(name for name in columns if name.startswith("accuracy/")))
        write_text(self.path, _csv([dict(zip(columns, columns, strict=True)), *rows], columns))
        self.columns = columns

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a row for a line that the log already holds. Raises OSError when it cannot be written."""
        row, columns = _flat(line), self.columns
        if not columns or row.keys() - set(columns) or not self.path.exists():
            return self.rebuild()
        self.columns = ()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_csv([row], columns))
        self.columns = columns
        return None


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    accuracies = {f"accuracy/{name}": value for name, value in line.get("accuracy", {}).items()}
    return {**{name: value for name, value in line.items() if name != "accuracy"}, **accuracies}


def _csv(rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        cells = (row.get(name) for name in columns)
        writer.writerow(["" if cell is None else cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return buffer.getvalue()

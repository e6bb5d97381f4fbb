"""What a run shows while it trains: losses, accuracies, speed, time left, wait for data, memory; the table of accuracies."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")


class DataWait:
    """How long the step waited for data: the time in which no batch had come and the device had nothing left to do."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.seconds, self.started = device.type == "cuda", 0.0, time.perf_counter()

    def over(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches, adding the wait for each to `seconds`."""
        source = iter(batches)
        while True:
            begun = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            if not self.on_gpu or torch.cuda.current_stream().query():  # a query does not wait for the device
                self.seconds += time.perf_counter() - begun
            yield batch

    @property
    def share(self) -> float:
        """Share of the time since this object was made that was spent waiting, 0 to 1."""
        return self.seconds / (time.perf_counter() - self.started)


class Throughput:
    """Images per second between two readings."""

    def __init__(self, images: int):
        """images: done before the first reading, by an earlier part of the run."""
        self.images, self.at = images, time.perf_counter()

    def read(self, images: int) -> float:
        """Images per second since the last read; `images` is the number done so far."""
        now = time.perf_counter()
        rate = (images - self.images) / (now - self.at)
        self.images, self.at = images, now
        return rate


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: what PyTorch has reserved on a GPU, else the resident size. Never waits for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Column(NamedTuple):
    """A number that is shown. name: of the table's column. label: in front of or, with `{}`, around the number in a line.
    rank: columns of the highest rank are the first to be left out where a terminal is too narrow."""

    name: str
    label: str
    rank: int = 0


LOSS = (Column("loss", "loss"), Column("task", "task", 5), Column("distill", "distill", 1))
REST = (
    Column("masked", "masked", 2), Column("img/s", "{} img/s", 3), Column("wait", "data wait", 6),
    Column("memory", "memory", 7), Column("time", "{}", 5),
)  # fmt: skip
SHORT = {"validation": "valid."}


class TrainingProgress:
    """What a run shows of itself on stderr: on a terminal a bar with the newest numbers, and a row of a table per epoch that
    stays; elsewhere a plain line per epoch and per tenth of the run, with the same numbers.

    It gets the lines of the run's log (`write`), and asks the device for nothing. Numbers of an epoch are means over its lines.
    """

    def __init__(self, *, epochs: int, steps: int, silent: bool = False, console: Console | None = None):
        """Prepare the display.

        Args:
            epochs: of the run.
            steps: of the run.
            silent: show nothing, on the processes that do not report.
            console: to write to (default: stderr).
        """
        self.epochs, self.steps, self.silent = epochs, steps, silent
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self.waited = 0.0
        """Share of the time spent waiting for data, as of the last line."""
        self.step = self.before = 0
        self.started = self.epoch_started = time.perf_counter()
        self.next_line = 0.1
        self.epoch = -1
        """That of the lines in `lines`, from 0."""
        self.lines: list[Mapping[str, Any]] = []
        self.newest: list[Mapping[str, Any]] = []
        self.scores: dict[str, float] = {}
        self.header: list[str] = []
        self.live = None if silent or self.plain else Live(
            console=self.console, get_renderable=self.render, refresh_per_second=2, transient=True
        )  # fmt: skip

    def begin(self, step: int) -> None:
        """Go on from a step: those of the first part of a resumed run do not count for its speed."""
        self.step = self.before = step
        self.started = self.epoch_started = time.perf_counter()
        self.next_line = self._tenth(step)

    def __enter__(self) -> TrainingProgress:
        if self.live is not None:
            self.live.start()
            self.console.show_cursor(True)  # a process that is killed would leave the terminal without one
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._end_of_epoch({})
        if self.live is not None:
            self.live.stop()

    def write(self, line: Mapping[str, Any]) -> None:
        """Show a line of the log: of steps, or of an epoch's accuracies."""
        if "accuracy" in line:
            self._end_of_epoch(line["accuracy"])
            return
        if line["epoch"] != self.epoch:  # of an epoch without accuracies
            self._end_of_epoch({})
        self.epoch, self.step, self.waited = line["epoch"], line["step"], line["data_wait"]
        self.lines.append(line)
        self.newest = [line]
        if self.plain and not self.silent and self.step >= self.next_line * self.steps and self.step * self.epochs % self.steps:
            self._print_line(f"step {self.step}/{self.steps}", self._numbers([line]), f"{duration(self.seconds_left())} left")
            self.next_line = self._tenth(self.step)

    def seconds_left(self) -> float:
        """Until the end of the last epoch, at the speed so far."""
        done = self.step - self.before
        return (self.steps - self.step) * (time.perf_counter() - self.started) / done if done else math.inf

    def render(self) -> Group:
        """The part of the terminal that changes, in lines of its width."""
        width = self.console.width
        share = f"  step {self.step}/{self.steps}  {duration(self.seconds_left())} left"
        where = f"epoch {min(self.step * self.epochs // self.steps + 1, self.epochs)}/{self.epochs}  "
        bar = ProgressBar(total=self.steps, completed=self.step, width=max(10, min(60, width - len(where) - len(share) - 1)))
        grid = Table.grid()
        grid.add_row(Text(where), bar, Text(share))
        parts = [_labelled(*one) for one in self._numbers(self.newest)] if self.newest else ["the first steps"]
        parts += [f"last {name} {value:.2f} %" for name, value in self.scores.items()]
        rows = [""]
        for part in parts:
            rows[-1:] = [f"{rows[-1]}  {part}".strip()] if len(rows[-1]) + len(part) + 2 < width else [rows[-1], part]
        return Group(grid, *(Text(row, style="dim", no_wrap=True, overflow="ellipsis") for row in rows))

    def _tenth(self, step: int) -> float:
        return int(10 * step / self.steps + 1) / 10

    def _numbers(self, lines: Sequence[Mapping[str, Any]]) -> list[tuple[Column, str]]:
        """What is shown of lines of the log; numbers that none of them has are left out."""
        shown = []
        for column in LOSS:
            value = _mean(line.get(column.name) for line in lines)
            shown += [] if value is None else [(column, f"{value:.4f}")]
        masked = _mean(line.get("mask_share") for line in lines)
        speed = _mean(1 / line["images_per_second"] for line in lines if line.get("images_per_second"))
        memory = max((line.get("memory_bytes") or 0 for line in lines), default=0)
        found = (
            f"{masked:.1%}".replace("%", " %") if masked else None, f"{1 / speed:.0f}" if speed else None,
            f"{100 * self.waited:.0f} %", f"{memory / 1e9:.1f} GB" if memory else None,
        )  # fmt: skip
        return [*shown, *((column, text) for column, text in zip(REST, found, strict=False) if text is not None)]

    def _end_of_epoch(self, scores: Mapping[str, float]) -> None:
        """Print the row of an epoch, once, unless nothing is known of it."""
        lines, self.lines = self.lines, []
        spent, self.epoch_started = time.perf_counter() - self.epoch_started, time.perf_counter()
        if not lines or self.epoch < 0 or self.silent:
            return
        self.scores = dict(scores)
        accuracies = [
            (Column(SHORT.get(name, name), name, 0 if name in SHORT else 4), f"{value:.2f} %") for name, value in scores.items()
        ]
        numbers = self._numbers(lines)
        losses, rest = [one for one in numbers if one[0] in LOSS], [one for one in numbers if one[0] not in LOSS]
        row = [(Column("epoch", "epoch"), f"{self.epoch + 1}/{self.epochs}"), *losses, *accuracies, *rest]
        row.append((REST[-1], duration(spent)))
        self.epoch, self.next_line = -1, self._tenth(self.step)
        if self.plain:
            self._print_line(*(_labelled(*one) for one in row))
        else:
            self._print_row(row)

    def _print_line(self, *parts: str | list[tuple[Column, str]]) -> None:
        words = [[part] if isinstance(part, str) else [_labelled(*one) for one in part] for part in parts]
        print("  ".join(word for part in words for word in part), file=self.console.file, flush=True)

    def _print_row(self, row: list[tuple[Column, str]]) -> None:
        """A row under the table's header, which is printed before the first and where the columns change."""

        def width(column: Column, text: str) -> int:
            return max(len(column.name), len(text), len(f"{self.epochs}/{self.epochs}") if column.name == "epoch" else 6)

        while sum(width(*one) + 2 for one in row) - 2 > self.console.width and (least := max(row, key=_rank))[0].rank:
            row.remove(least)
        header = [column.name for column, _ in row]
        if header != self.header:
            self.header = header
            self._print_text("  ".join(column.name.rjust(width(column, text)) for column, text in row), "bold")
        self._print_text("  ".join(text.rjust(width(column, text)) for column, text in row), "")

    def _print_text(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style, no_wrap=True, overflow="ellipsis"))


def _labelled(column: Column, text: str) -> str:
    return column.label.format(text) if "{}" in column.label else f"{column.label} {text}"


def _rank(one: tuple[Column, str]) -> int:
    return one[0].rank


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the finite ones, None without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`, or `?` for a time that is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def score_table(rows: Sequence[Mapping[str, Any]], average: tuple[str, float] | None = None) -> str:
    """Text table of rows with the keys data, images, classes, accuracy, top5, calibration_error (percent), and the average."""
    name = "" if average is None else average[0]
    width = max(len("data"), len(name), *(len(row["data"]) for row in rows))
    lines = [f"{'data':{width}}  images  classes     top-1     top-5  calibration error"]
    for row in rows:
        numbers = f"{row['accuracy']:6.2f} %  {row['top5']:6.2f} %  {row['calibration_error']:15.2f} %"
        lines.append(f"{row['data']:{width}}  {row['images']:6}  {row['classes']:7}  {numbers}")
    if average is not None:
        lines.append(f"{name:{width}}  {'':6}  {'':7}  {average[1]:6.2f} %")
    return "\n".join(lines)

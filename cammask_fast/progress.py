"""What a run shows: images per second, time left, loss and the wait for data while it trains; the table of accuracies."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from tqdm import tqdm

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


class TrainingProgress:
    """A progress bar on a terminal, otherwise a plain line for every tenth of the run; both on stderr.

    Called as `train.Progress`: (phase, images done, images in total, mean loss, share of the time spent waiting
    for data).
    """

    def __init__(self, total: int, *, silent: bool = False):
        self.total, self.silent, self.started, self.next_line, self.waited = total, silent, time.perf_counter(), 0.1, 0.0
        self.before = 0
        quiet = silent or not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="img", unit_scale=True, disable=quiet, leave=False)

    def begin(self, done: int) -> None:
        """Start at `done` images: in a resumed run the images of its first part do not count for the speed."""
        self.before, self.started, self.next_line = done, time.perf_counter(), int(10 * done / self.total + 1) / 10

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def __call__(self, phase: str, done: int, total: int, loss: float, waited: float) -> None:
        self.waited = waited
        if not self.bar.disable:
            self.bar.set_description(phase, refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, {waited:.0%} waiting for data", refresh=False)
            self.bar.update(done - self.bar.n)
        elif not self.silent and done >= self.next_line * total:
            rate = (done - self.before) / (time.perf_counter() - self.started)
            left = (total - done) / rate
            text = f"{phase} {done}/{total} images  {rate:.0f} img/s  {left:.0f} s left  loss {loss:.3f}"
            print(f"{text}  {waited:.0%} waiting for data", file=sys.stderr, flush=True)
            self.next_line = int(10 * done / total + 1) / 10


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

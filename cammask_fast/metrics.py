"""What a run shows: images per second, time left and loss while it trains; the table of accuracies."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm


class TrainingProgress:
    """A progress bar on a terminal, otherwise a plain line on stdout for every tenth of the run.

    Called as `train.Progress`: (phase, images done, images in total, mean loss).
    """

    def __init__(self, total: int):
        self.total, self.started, self.next_line = total, time.perf_counter(), 0.1
        self.bar = tqdm(total=total, unit="img", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def __call__(self, phase: str, done: int, total: int, loss: float) -> None:
        if not self.bar.disable:
            self.bar.set_description(phase, refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update(done - self.bar.n)
        elif done >= self.next_line * total:
            rate = done / (time.perf_counter() - self.started)
            left = (total - done) / rate
            print(
                f"{phase} {done}/{total} images  {rate:.0f} img/s  {left:.0f} s left  loss {loss:.3f}",
                file=sys.stderr,
                flush=True,
            )
            self.next_line = int(10 * done / total + 1) / 10


def score_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text table of rows with the keys data, images, classes, accuracy (percent)."""
    width = max(len("data"), *(len(row["data"]) for row in rows))
    lines = [f"{row['data']:{width}}  {row['images']:6}  {row['classes']:7}  {row['accuracy']:6.2f} %" for row in rows]
    return "\n".join([f"{'data':{width}}  images  classes  accuracy", *lines])

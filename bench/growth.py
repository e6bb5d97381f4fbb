"""Does a long run keep its size? `cammask train` on photographs of many sizes, and its memory all the while.

The tiny CLIP trains in batches of a few images, so that steps are cheap and many; what grows with the steps, the epochs, or the
sizes of the images grows all the same. Two figures of the process that trains and of those that read for it must stay: what is
resident, and of it the part that is no file (what was allocated), where growth weighs more.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bench.processes import children, kill, last_step, start
from bench.records import append, cpu_environment, show
from cammask_fast.runtime.signals import EXIT_CODE
from cammask_fast.viz.tables import markdown_table

LOADERS = ("torch", "dali")
CLASSES, IMAGES = 4, 1000
SIDES = (40, 900)
"""Pixels; the sides of the photographs are spread between these, small ones more often."""
SETTLED = 2000
"""Steps after which memory must stay as it is."""
WINDOW = 1000
"""Steps of which a median is taken: a single reading may meet a checkpoint that is being written."""
MOST = 0.03
"""Growth that is allowed."""
EVERY = 2.0
"""Seconds between two readings."""


class Reading(NamedTuple):
    """Memory in MB at a step."""

    step: int
    resident: float
    allocated: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20_000, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--loader", nargs="+", choices=LOADERS, default=list(LOADERS), help="default: both, one after the other"
    )
    parser.add_argument("--method", default="masked-object", help="of `cammask train` (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of the loaders (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images in a step (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="of each run: it is stopped then, and recorded as far as it came"
    )
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="add each record to these JSON lines as soon as it is made")


def main(options: argparse.Namespace) -> int:
    """Returns 0 when every run kept its size, else 1."""
    if options.steps < SETTLED + WINDOW:
        raise ValueError(f"--steps: expected {SETTLED + WINDOW} or more, got {options.steps}")
    if options.batch < 2:
        raise ValueError(f"--batch: expected 2 or more, got {options.batch}")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_photographs(Path(folder) / "photographs")
        for loader in options.loader:
            out = Path(folder) / loader
            record = measure(
                data,
                out,
                loader=loader,
                method=options.method,
                workers=options.workers,
                batch=options.batch,
                steps=options.steps,
                minutes=options.minutes,
            )
            records.append(record)
            if options.out is not None:
                append(options.out, record)
    show(records, table(records), as_json=options.json, out=None)
    return 0 if all(record["growth"] <= MOST for record in records) else 1


def write_photographs(folder: Path) -> Path:
    """JPEGs in class folders whose widths and heights all differ."""
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        low, high = np.log(SIDES)
        width, height = np.exp(random.uniform(low, high, 2)).astype(int)
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = folder / f"class{index % CLASSES}" / f"{index:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def measure(
    data: Path, out: Path, *, loader: str, method: str, workers: int, batch: int, steps: int, minutes: float
) -> dict[str, Any]:
    """Train, and read the memory of all processes meanwhile.

    Args:
        data: folder of images.
        out: folder of the run.
        loader: `dali` or `torch`.
        method: of `cammask train`.
        workers: of the loader.
        batch: images per step.
        steps: of the run, at least.
        minutes: after which the run is stopped.

    Returns:
        The record.

    Raises:
        ValueError: the training fails.
    """
    training = IMAGES - IMAGES // 10
    per_epoch = training // batch
    argv = ["train", "--data", data, "--out", out, "--arch", "tiny", "--method", method, "--loader", loader,
            "--workers", workers, "--batch-size", batch, "--epochs", -(-steps // per_epoch), "--lr", "1e-6",
            "--log-every", min(50, per_epoch),
            "--val-images", IMAGES - training, "--compile", "off"]  # fmt: skip
    begun = time.monotonic()
    log = out.with_suffix(".log")
    process = start(argv, log=log)
    readings: list[Reading] = []
    stopped = False
    while True:
        try:
            code = process.wait(EVERY)
            break
        except TimeoutExpired:
            found = [megabytes(pid) for pid in (process.pid, *children(process.pid))]
            if not stopped and time.monotonic() - begun > 60 * minutes:
                stopped = True
                kill(process.pid, signal.SIGTERM)
            readings.append(Reading(last_step(out), *map(sum, zip(*found, strict=True))))
    if code not in (0, EXIT_CODE):
        raise ValueError(f"the training with --loader {loader} failed: {log.read_text()[-500:]}")
    done = last_step(out)
    return {
        "op": "growth", "loader": loader, "method": method, "workers": workers, "batch": batch, "steps": done, "images": IMAGES,
        "epochs": done // per_epoch, **growth(readings), "seconds": round(time.monotonic() - begun, 1), **cpu_environment(),
    }  # fmt: skip


def growth(readings: Sequence[Reading]) -> dict[str, Any]:
    """`settled_mb`: resident, the median of the first `WINDOW` steps after `SETTLED`; `resident_mb`, `allocated_mb`: medians of
    this and all later windows; `growth`: the largest of these against the first, of the worse of the two. What is read after
    the last step, when the run writes its report, does not count. Raises ValueError when a window has no reading."""
    last = max(reading.step for reading in readings)
    windows: list[Reading] = []
    for begin in range(SETTLED, last, WINDOW):
        inside = [reading for reading in readings if begin <= reading.step < min(begin + WINDOW, last)]
        if inside:
            middle = (round(statistics.median(values), 1) for values in list(zip(*inside, strict=True))[1:])
            windows.append(Reading(begin, *middle))
        elif begin + WINDOW <= last:
            raise ValueError(f"no reading between steps {begin} and {begin + WINDOW}: the steps are too fast for {EVERY:g} s")
    if not windows:
        raise ValueError(f"no reading after {SETTLED} steps: the run ended at {last}")
    resident, allocated = [one.resident for one in windows], [one.allocated for one in windows]
    largest = max(largest_growth(values) for values in (resident, allocated))
    return {"settled_mb": resident[0], "resident_mb": resident, "allocated_mb": allocated, "growth": round(largest, 4)}


def largest_growth(values: Sequence[float]) -> float:
    """The largest of some values against the first."""
    return max(values) / values[0] - 1


def megabytes(pid: int) -> tuple[float, float]:
    """What a process holds in memory, and the part of it that no file backs; zeros for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0, 0.0
    kilobytes = {words[0].rstrip(":"): int(words[1]) for line in lines[1:] if (words := line.split())}
    return kilobytes["Rss"] / 1024, (kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]) / 1024


def table(records: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "loader", "method", "workers", "images per step", "steps", f"MB after {SETTLED} steps", "MB at the end",
        "largest growth, resident", "largest growth, allocated",
    ]  # fmt: skip
    rows = [
        [
            record["loader"], record["method"], str(record["workers"]), str(record["batch"]), str(record["steps"]),
            f"{record['settled_mb']:.0f}", f"{record['resident_mb'][-1]:.0f}",
            *(f"{largest_growth(record[f'{what}_mb']):+.1%}" for what in ("resident", "allocated")),
        ]
        for record in records
    ]  # fmt: skip
    return markdown_table(header, rows)

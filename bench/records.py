"""Records of measurements: timing, where and with what it was measured, one JSON line each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from cammask_fast.runtime.machine import cpu_name

ROOT = Path(__file__).parent.parent
Function = Callable[[], object]


class Spread(NamedTuple):
    """Seconds: the median and the bounds of the middle three fifths."""

    p20: float
    p50: float
    p80: float

    def fields(self) -> dict[str, float]:
        return {"seconds_p20": self.p20, "seconds_p50": self.p50, "seconds_p80": self.p80}


def spread(times: Sequence[float]) -> Spread:
    """Quantiles of at least two measurements."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(times), fifths[3])


def interleaved(
    functions: Mapping[str, Function], *, repeats: int, warmup: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Spread]:
    """Time functions in turn, round by round, so that a disturbance of the machine affects all of them.

    Args:
        functions: by name.
        repeats: timed rounds.
        warmup: rounds before them.
        clock: seconds, for tests.

    Returns:
        Quantiles of the seconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            started = clock()
            function()
            elapsed = clock() - started
            if round_ >= warmup:
                times[name].append(elapsed)
    return {name: spread(seconds) for name, seconds in times.items()}


def commit() -> str:
    """The short hash of the checkout, `+` behind it if files differ from it, or `unknown` outside git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, Any]:
    return {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}


def cpu_environment() -> dict[str, Any]:
    """Where a CPU record comes from."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions()}


def gpu_environment() -> dict[str, Any]:
    """Where a GPU record comes from."""
    return {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda, **versions()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines[0] if lines else "unknown"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line that is on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def show(records: Sequence[Mapping[str, Any]], table: str, *, as_json: bool, out: Path | None) -> None:
    """Print records as JSON lines or as a table, and write the lines to a file.

    Args:
        records: JSON values.
        table: of the records.
        as_json: print the lines instead of the table.
        out: file for the lines, or None.
    """
    lines = "".join(json.dumps(record) + "\n" for record in records)
    print(lines if as_json else table, end="" if as_json else "\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(lines)

"""Cases one after the other, each in a process of its own with its own time limit, and a record of how each ended.

A crash, an illegal memory access, a hang or a lack of memory costs one case. The records lie in DIR/PART.jsonl; those of an
earlier call are read first, and what has ended there is not repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.case import Case
from bench.gpu.child import FAILED, OK, SKIPPED, write

ROOT = Path(__file__).parent.parent.parent
NOT_RUN, CRASHED, TIMED_OUT = "not run", "crashed", "timed out"
OUT_OF_TIME = "out of time"
BAD = (FAILED, "out of memory", CRASHED, TIMED_OUT)
LEAST_SECONDS = 5.0
"""With less time left no process is started."""
KILLED_SECONDS = 30.0
"""Given to a killed process to be gone."""
Execute = Callable[[Case, Path, float], dict[str, Any]]
"""execute(case, folder of the records, limit in seconds) -> result and error."""


def execute(case: Case, out: Path, limit: float) -> dict[str, Any]:
    """Run a case in a process of its own; what it prints is appended to `log.txt`.

    Args:
        case: what to run.
        out: folder of the records and the log.
        limit: seconds, after which the process is killed with its children.

    Returns:
        How it ended.
    """
    with tempfile.TemporaryDirectory() as folder, (out / "log.txt").open("ab") as log:
        log.write(f"\n==== {case.name}\n".encode())
        log.flush()
        before, outcome = log.tell(), Path(folder) / "outcome"
        words = [sys.executable, "-m", "bench.gpu.child", case.to_json(), str(out / f"{case.part}.jsonl"), str(outcome)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"result": TIMED_OUT, "error": f"stopped after {limit:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # its workers too, and after Ctrl-C the case itself
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver is left behind
                process.wait(KILLED_SECONDS)
        if outcome.exists():
            found: dict[str, Any] = json.loads(outcome.read_text())
            return found
        with (out / "log.txt").open("rb") as file:
            file.seek(before)
            printed = file.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        return {"result": CRASHED, "error": f"{_death(code)}{': ' if last else ''}{last}"[:500]}


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def ended(out: Path) -> set[str]:
    """Names of the cases that ended in an earlier call, whatever their result."""
    names = set()
    for path in out.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut by a crash of the machine
                record = json.loads(line)
                if record.get("op") == "case" and record["result"] != NOT_RUN:
                    names.add(record["case"])
    return names


def run(
    cases: Sequence[Case],
    out: Path,
    *,
    seconds: float,
    part_seconds: Mapping[str, float] | None = None,
    free: int | None = None,
    environment: Mapping[str, Any] | None = None,
    execute: Execute = execute,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the cases that no earlier call has ended, in their order.

    A case for which no time is left is recorded as not run; a later, shorter one may still be run, and the next call begins
    with those that were left out.

    Args:
        cases: what to run.
        out: folder of the records and the log.
        seconds: for everything.
        part_seconds: of all cases of a part together, where that has a limit of its own.
        free: bytes of memory on the GPU; a case that needs more is skipped.
        environment: of the machine, for the records.
        execute: runs one case.
        clock: seconds, for tests.

    Returns:
        0, or 1 after a case that failed.
    """
    started, spent, done, code = clock(), dict.fromkeys(part_seconds or {}, 0.0), ended(out), 0
    for case in cases:
        if case.name in done:
            continue
        begun = clock()
        left = seconds - (begun - started)
        if part_seconds and case.part in part_seconds:
            left = min(left, part_seconds[case.part] - spent[case.part])
        limit = min(case.limit, left)
        if free is not None and case.memory > free:
            outcome = {
                "result": SKIPPED,
                "error": f"needs {case.memory / 1e9:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free",
            }
        elif left < max(case.expected, LEAST_SECONDS):
            outcome = {"result": NOT_RUN, "error": OUT_OF_TIME}
        else:
            outcome = execute(case, out, limit)
            if outcome["result"] == TIMED_OUT and limit < case.limit:  # by the end of the call: the next one repeats it
                outcome = {"result": NOT_RUN, "error": f"{OUT_OF_TIME}, {outcome['error']}"}
        took = clock() - begun
        if case.part in spent:
            spent[case.part] += took
        code |= outcome["result"] in BAD
        record = {"op": "case", "case": case.name, "part": case.part, **outcome, "seconds": round(took, 2)}
        write(out / f"{case.part}.jsonl", record | ({"of": dict(case.of)} if case.of else {}) | dict(environment or {}))
        print(f"{case.name}: {outcome['result']}{_reason(outcome)}, {took:.0f} s", flush=True)
    return int(code)


def _reason(outcome: Mapping[str, Any]) -> str:
    return "" if outcome["result"] == OK else f" ({outcome.get('error', '')})"

"""Real processes that train, and how to disturb them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT = 150.0
"""Seconds for one process; none of the tests comes near."""


def command(argv: Sequence[object], *, ranks: int = 1, restarts: int = 0) -> list[str]:
    """The words of a `cammask` command.

    Args:
        argv: of `cammask`.
        ranks: processes; several are started by torchrun.
        restarts: how often torchrun restarts them.

    Returns:
        A list for `subprocess`.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "cammask_fast", *map(str, argv)]


def run(argv: Sequence[object], *, ranks: int = 1, restarts: int = 0, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """Run a `cammask` command to its end.

    Args:
        argv: of `cammask`.
        ranks: processes; several are started by torchrun.
        restarts: how often torchrun restarts them.
        limit: seconds.

    Returns:
        Exit code and output.

    Raises:
        subprocess.TimeoutExpired: after `limit` seconds.
    """
    words = command(argv, ranks=ranks, restarts=restarts)
    return subprocess.run(words, capture_output=True, text=True, timeout=limit, check=False)


def start(argv: Sequence[object], *, ranks: int = 1, restarts: int = 0, log: Path) -> subprocess.Popen[bytes]:
    """Start a `cammask` command.

    Args:
        argv: of `cammask`.
        ranks: processes; several are started by torchrun.
        restarts: how often torchrun restarts them.
        log: file to which output is appended.

    Returns:
        The process.
    """
    with log.open("ab") as file:
        return subprocess.Popen(command(argv, ranks=ranks, restarts=restarts), stdout=file, stderr=file)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> bool:
    """Whether the condition came true before the process ended."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        if condition():
            return True
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.001)
    raise TimeoutError("nothing happened")


def children(pid: int) -> list[int]:
    """The direct children of a process, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def trainers(process: subprocess.Popen[bytes], ranks: int) -> list[int]:
    """The processes that train: this one, or those that torchrun has started."""
    if ranks == 1:
        return [process.pid]
    return [pid for pid in children(process.pid) if b"cammask_fast" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def logged(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log about its steps, without the speed, which no two runs share. Lines that a kill has cut off are
    left out."""
    path = out / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    clocked = {"images_per_second", "data_wait", "memory_bytes"}
    return [{k: v for k, v in line.items() if k not in clocked} for line in whole if "accuracy" not in line]


def last_step(out: Path) -> int:
    lines = logged(out)
    return int(lines[-1]["step"]) if lines else 0

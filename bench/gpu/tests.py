"""Tests of the kernels, in every dtype, and of the compiled step on a real GPU, then compute-sanitizer's memcheck on small
shapes where it is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records import ROOT, append, gpu_environment

SECONDS = 480.0
"""For the whole part; a command that is still running then is stopped."""
MEMCHECK_SHARE = 90.0
"""Seconds of it that memcheck may have at least."""
Execute = Callable[[Sequence[str], Path, float, Mapping[str, str]], int | None]


def execute(command: Sequence[str], log: Path, seconds: float, variables: Mapping[str, str]) -> int | None:
    """Run a command in the checkout, output to `log`; its exit code, or None if it was stopped after `seconds`."""
    with log.open("wb") as file:
        try:
            environment = {**os.environ, **variables}
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=seconds, env=environment, check=False)
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def counts(junit: Path) -> dict[str, int]:
    """passed, failed and skipped tests of a JUnit file; all 0 where pytest wrote none."""
    if not junit.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = list(ElementTree.parse(junit).iter("testsuite"))
    total, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
    failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def run(
    out: Path,
    *,
    execute: Execute = execute,
    environment: Callable[[], dict[str, Any]] = gpu_environment,
    which: Callable[[str], str | None] = shutil.which,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Write DIR/tests.jsonl, a record per command. Returns 0 if everything that ran passed, else 1."""
    where, started, out = environment(), clock(), out.resolve()
    junit = out / "tests.xml"
    junit.unlink(missing_ok=True)
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        outcome: dict[str, Any] = {"error": f"not installed: {', '.join(missing)}"}
    else:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "triton",
            "-p",
            "no:cacheprovider",
            f"--junitxml={junit}",
            "tests/kernels",
            "tests/test_step_on_gpu.py",
            "tests/test_loader_on_gpu.py",
        ]
        outcome = _outcome(execute(command, out / "tests.log", SECONDS - MEMCHECK_SHARE, {}), clock() - started)
        outcome |= counts(junit)
        if "error" not in outcome and outcome["passed"] == 0:
            outcome["error"] = "no test ran"
    append(out / "tests.jsonl", {"op": "tests", **outcome, **where})
    sanitizer = which("compute-sanitizer")
    if sanitizer is None:
        checked: dict[str, Any] = {"skipped": "compute-sanitizer is not installed"}
    else:
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "bench.gpu.small"]
        before = clock()
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation: nothing hides an overrun
        code = execute(command, out / "memcheck.log", SECONDS - (before - started), variables)
        checked = _outcome(code, clock() - before)
    append(out / "tests.jsonl", {"op": "memcheck", **checked, **where})
    return int("error" in outcome or "error" in checked)


def _outcome(code: int | None, seconds: float) -> dict[str, Any]:
    outcome: dict[str, Any] = {"seconds": round(seconds, 1)}
    if code is None:
        outcome["error"] = "stopped at the time limit"
    elif code:
        outcome["error"] = f"exit code {code}"
    return outcome

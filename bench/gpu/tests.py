"""The tests that need a GPU, a file per process, the step's first; then compute-sanitizer's memcheck on small shapes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.child import Skipped
from bench.records import ROOT, gpu_environment

if TYPE_CHECKING:
    import pytest

TESTS = ROOT / "tests"
MARKED = re.compile(r"^\s*(@|pytestmark = \[?)?pytest\.mark\.triton\b", re.MULTILINE)
ORDER = ("step", "relevance", "batch", "fill", "select", "shapes")
"""Words in the names of the files, the most valuable first; others follow, and the loader's, in which a decoder may end the
process, come last."""
NAMED = 20
"""Failed tests whose names are in the record."""


def files() -> list[str]:
    """Those with tests that are marked `triton`, as paths from the root, the most valuable first."""
    marked = [path for path in TESTS.rglob("test_*.py") if MARKED.search(path.read_text())]

    def rank(path: Path) -> tuple[bool, int, str]:
        position = next((index for index, word in enumerate(ORDER) if word in path.stem), len(ORDER))
        return "loader" in path.stem, position, path.stem

    return [str(path.relative_to(ROOT)) for path in sorted(marked, key=rank)]


class Counts:
    """Counts what pytest reports."""

    def __init__(self) -> None:
        self.passed, self.skipped, self.failed = 0, 0, list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def run(*, file: str) -> dict[str, Any]:
    """Of one file; `error` where a test failed or none ran."""
    import pytest  # which a bare machine may lack

    counts = Counts()
    code = pytest.main(
        ["-m", "triton", "-p", "no:cacheprovider", "-v", "--rootdir", str(ROOT), str(ROOT / file)], plugins=[counts]
    )
    record: dict[str, Any] = {"op": "tests", "file": file, "passed": counts.passed, "skipped": counts.skipped}
    record |= {"failed": len(counts.failed), "failed_tests": counts.failed[:NAMED]}
    if counts.failed:
        record["error"] = f"{len(counts.failed)} tests failed"
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        record["error"] = f"pytest ended with {code!r}"
    elif not counts.passed:
        record["error"] = "no test ran"
    return record | gpu_environment()


def memcheck() -> dict[str, Any]:
    """Every kernel on small shapes under compute-sanitizer. Raises Skipped where that is not installed."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Skipped("needs compute-sanitizer")
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "bench.gpu.small"]
    variables = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }  # every tensor its own allocation: nothing hides an overrun
    code = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
    record: dict[str, Any] = {"op": "memcheck", "exit_code": code}
    return record | ({"error": f"exit code {code}: see log.txt"} if code else {}) | gpu_environment()

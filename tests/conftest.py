"""One thread and one seed per test, and the slowest files at the end of a run."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import defaultdict
from functools import partial

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported; processes that tests start inherit it

import numpy as np
import torch

from cammask_fast.kernels.backend import INTERPRETED

LONG = {"test_compiled_step.py", "test_distributed.py", "test_survival.py", "test_step_static.py"}
"""Files of several minutes, which are begun first: at the end one process would wait for the other."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    if not hasattr(config, "workerinput"):  # xdist's workers, and all processes that tests start, share what is made once
        os.environ["CAMMASK_CACHE"] = tempfile.mkdtemp(prefix="cammask-tests-")
        config.add_cleanup(partial(shutil.rmtree, os.environ["CAMMASK_CACHE"], ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `triton` need a GPU, or a process of their own with Triton's interpreter on (`make test` runs both)."""
    if INTERPRETED or torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("triton")])
    items[:] = [item for item in items if not item.get_closest_marker("triton")]
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers alone, after any other, and in any process."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pytest_runtest_teardown() -> None:
    """A test that leaves more threads behind would slow down all that follow it in this process."""
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"the test left PyTorch with {left} threads"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest files")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[:8]:
        terminalreporter.write_line(f"{spent:7.1f} s  {name}")

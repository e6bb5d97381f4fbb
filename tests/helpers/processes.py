"""Real processes that train, for the tests that kill them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bench.processes import children, command, kill, last_step, logged, run, start, trainers, wait_for
from tests.test_folder import make_folder

__all__ = ["children", "command", "in_own_process", "kill", "last_step", "logged", "run", "start", "trainers", "wait_for"]


def in_own_process(test: Callable[..., object], *arguments: Any, timeout: float = 300) -> None:
    """Run a module's function in a fresh process: one that crashes fails this test, and takes no other along."""
    process = multiprocessing.get_context("spawn").Process(target=test, args=arguments)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{test.__name__}: exit code {process.exitcode}, the negative number of the signal in a crash"


def photo_folder(root: Path) -> Path:
    """Training images of three classes, and as many validation images as two batches."""
    make_folder(root / "train", {"dog": 20, "fox": 18, "owl": 16})
    make_folder(root / "val", {"dog": 3, "fox": 3, "owl": 3})
    return root


def assert_same_run(out: Path, expected: Path) -> None:
    """Losses and weights, bit for bit."""
    assert logged(out) == logged(expected)
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(out / name), load_file(expected / name)
        assert [key for key in theirs if not (ours[key] == theirs[key]).all()] == [], name

"""The processes that read ahead: killed at any moment, and what they inherit."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cammask_fast.data.loaders.workers import Flag, iter_with_worker_check, read_ahead


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionResetError("Caught ConnectionResetError in pin memory thread for device 0.\nOriginal Traceback"),
        EOFError(),
    ],
)
def test_a_worker_killed_at_any_moment_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it hands a batch over its end is that of a connection, before PyTorch knows of it."""
    monkeypatch.setattr("cammask_fast.data.loaders.workers.SIGNAL_WITHIN", 0.0)
    with pytest.raises(ValueError, match=r"process that reads images was killed \(.+\): .*--workers"):
        list(iter_with_worker_check(Failing(error)))  # type: ignore[arg-type]


def test_the_signal_of_a_workers_end_is_awaited() -> None:
    """Or it would raise later, wherever the caller is by then."""

    def handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(ValueError, match=r"was killed \(DataLoader worker \(pid 7\)"):
            list(iter_with_worker_check(Failing(EOFError())))  # type: ignore[arg-type]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionResetError, EOFError, KeyError])
def test_a_worker_that_lives_passes_its_own_error_on(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cammask_fast.data.loaders.workers.SIGNAL_WITHIN", 0.0)
    error = kind(f"Caught {kind.__name__} in DataLoader worker process 0.\nOriginal Traceback")
    with pytest.raises(kind, match=r"Caught .* worker process 0\."):
        list(iter_with_worker_check(Failing(error)))  # type: ignore[arg-type]


class Failing:
    """Instead of a DataLoader whose worker is gone."""

    num_workers = 1

    def __init__(self, error: Exception):
        self.error = error

    def __iter__(self) -> Iterator[object]:
        yield 0
        raise self.error


class Collecting(torch.utils.data.Dataset[int]):
    """Runs the garbage collector where it is read."""

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


class Doubling(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return 2 * index


def test_a_killed_worker_takes_no_lock_along() -> None:
    """The event that ends the workers has none, and they see it."""
    loader = read_ahead(Doubling(), [0, 1], workers=1)
    assert list(iter_with_worker_check(loader)) == [0, 2]
    workers: Any = loader._iterator
    event, processes = workers._workers_done_event, workers._workers
    assert isinstance(event, Flag)
    assert not event.is_set()
    workers._shutdown_workers()
    assert event.is_set()
    assert [process.exitcode for process in processes] == [0]


def test_a_worker_does_not_finalise_what_it_inherits(tmp_path: Path) -> None:
    """As a DALI pipeline that is garbage here would make it stand still; here it is finalised in its turn."""

    class Owner:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Owner()
        loader = read_ahead(Collecting(), [0, 1], workers=1)
        assert list(iter_with_worker_check(loader)) == list(iter_with_worker_check(loader)) == [0, 1]
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]

"""The processes that read ahead: a DataLoader whose workers may be killed at any moment.

What PyTorch leaves open when a worker is killed is closed here: an end that shows as that of a connection, a lock that dies
with its holder, garbage of this process that a worker would finalise.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import DataLoader, Dataset

from cammask_fast.data.loaders.reading import Failed

CUT_OFF = (ConnectionError, EOFError)
"""What a connection raises whose other end is gone."""

SIGNAL_WITHIN = 2.0
"""Seconds between the end of a worker and the signal that tells, at most."""

GRACE = 20
"""Seconds between a SIGTERM and the end of a worker."""


def read_ahead(dataset: Dataset[Any], asked: Iterable[Any], workers: int, *, pin_memory: bool = False) -> DataLoader[Any]:
    """A DataLoader that asks a data set for whole batches.

    Args:
        dataset: indexed by batch requests.
        asked: batch requests in their order.
        workers: processes; 0 reads in this one.
        pin_memory: copy batches to pinned memory.

    Returns:
        The DataLoader; its workers live on between epochs.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=asked,
        num_workers=workers,
        collate_fn=_as_it_is,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=worker_init_fn,
        multiprocessing_context=_context() if workers else None,
    )


def worker_init_fn(worker: int) -> None:
    """Signals to a whole group of processes are for the one that trains, which saves first: a worker lives on for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


class Flag:
    """An event without a lock.

    A worker that is killed while it reads multiprocessing's own event takes its lock along, and this process would wait for
    ever.
    """

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return bool(self._value.value)

    def set(self) -> None:
        """Set the flag in all processes that share it."""
        self._value.value = 1


def _context() -> BaseContext:
    """The default way to start processes, with such events."""
    usual = type(multiprocessing.get_context())
    return type("Context", (usual,), {"Event": Flag})()


def _as_it_is(item: Any) -> Any:
    return item


def iter_with_worker_check(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches. A worker that was killed, or could not read, is a ValueError that says so."""
    try:
        try:
            for batch in _started(loader):
                if isinstance(batch, Failed):
                    raise ValueError(batch.message)
                yield batch
        except CUT_OFF:  # PyTorch learns of it by a signal, perhaps only now: it would raise wherever the caller is by then
            time.sleep(SIGNAL_WITHIN)
            raise
    except (RuntimeError, *CUT_OFF) as error:
        reason = worker_died(error)
        if reason is None:
            raise
        raise ValueError(reason) from None


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, with workers that never finalise what they inherit: the end of a DALI pipeline waits for threads
    that only this process has, and a worker whose garbage collector came upon one would hang.

    Only where workers are started: what was frozen is old afterwards, and the collector hardly looks at it again. DALI leaves
    garbage at every run, and epoch after epoch of it would stay.
    """
    if not loader.num_workers or getattr(loader, "_iterator", None) is not None:
        return iter(loader)
    others = gc.get_freeze_count()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        if not others:
            gc.unfreeze()


def worker_died(error: Exception) -> str | None:
    """Words for the end of a worker; None for other errors, those that a living worker passes on among them.

    PyTorch raises a RuntimeError wherever the main thread happens to be, or what a connection raises that a worker left while
    it handed a batch over.
    """
    said = (str(error) or type(error).__name__).splitlines()[0]
    ours = said.startswith("Caught") and "DataLoader worker process" in said
    if ours or not (isinstance(error, CUT_OFF) or "DataLoader worker" in said):
        return None
    return f"a process that reads images was killed ({said}): often memory ran out; try fewer --workers"

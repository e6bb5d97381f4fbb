"""Functions that live in processes of their own and are called one at a time: what one allocates, frees or leaves in its
process (memory, threads, compiled code) is not there for the next."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Build = Callable[..., Callable[[], object]]


class Lane:
    """Calling it runs the function of its process and returns when that has returned. first_seconds: the first call, made when
    the process starts, compilation included. Raises ValueError, with the lane's name, where the function raises or its process
    is gone."""

    def __init__(self, name: str, connection: Connection):
        self._name, self._connection = name, connection
        self.first_seconds: float = 0.0

    def __call__(self) -> float:
        return self._ask("run")

    def start(self, threads: int, build: Build, arguments: Sequence[Any]) -> None:
        """Build the function in the lane's process and call it once.

        Args:
            threads: of PyTorch.
            build: makes the function, in the other process.
            arguments: of `build`.
        """
        self.first_seconds = self._ask((threads, build, arguments))

    def _ask(self, what: object) -> float:
        try:
            self._connection.send(what)
            seconds, error = self._connection.recv()
        except (EOFError, ConnectionError):
            seconds, error = 0.0, "its process is gone"
        if error:
            raise ValueError(f"{self._name}: {error}")
        return float(seconds)


@contextmanager
def lanes(
    functions: Mapping[str, tuple[Build, Sequence[Any]]], *, packages: Mapping[str, Path] | None = None
) -> Iterator[dict[str, Lane]]:
    """A process per name, which calls build(*arguments) and then its result whenever the lane is called. The processes end with
    the context.

    Args:
        functions: builds and their arguments, which can be pickled.
        packages: folders in which the processes of these names look for modules first.

    Raises:
        ValueError: a first call fails.
    """
    forked, spawned = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
    forked.set_forkserver_preload(["bench.step.race"])
    processes: list[Any] = []
    opened = {}
    try:
        for name in functions:
            ours, theirs = forked.Pipe()
            package = (packages or {}).get(name)
            # one that was forked has this tree's modules already
            process = (forked if package is None else spawned).Process(target=_serve, args=(theirs,), daemon=True)
            with _looked_for_first(package):
                process.start()
            theirs.close()
            processes.append(process)
            opened[name] = Lane(name, ours)
        for name, (build, arguments) in functions.items():
            opened[name].start(torch.get_num_threads(), build, arguments)
        yield opened
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _looked_for_first(package: Path | None) -> Iterator[None]:
    """A process that is spawned begins with the module path of this one."""
    before = sys.path.copy()
    if package is not None:
        sys.path.insert(0, str(package))
    try:
        yield
    finally:
        sys.path[:] = before


def _serve(connection: Connection) -> None:
    try:
        threads, build, arguments = connection.recv()
        torch.set_num_threads(threads)
        function = build(*arguments)
        while True:
            started = time.perf_counter()
            function()
            connection.send((time.perf_counter() - started, ""))
            connection.recv()
    except EOFError:
        return
    except Exception as error:
        connection.send((0.0, f"{type(error).__name__}: {error}"))

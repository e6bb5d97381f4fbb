"""Functions that live in processes of their own and are called one at a time: what one allocates, frees or leaves in its
process (memory, threads, compiled code) is not there for the next."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
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
def lanes(functions: Mapping[str, tuple[Build, Sequence[Any]]]) -> Iterator[dict[str, Lane]]:
    """A process per name, which calls build(*arguments) and then its result whenever the lane is called. Builds and arguments
    can be pickled. The processes end with the context. Raises ValueError where a first call fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.step.race"])
    processes, opened = [], {}
    try:
        for name in functions:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
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

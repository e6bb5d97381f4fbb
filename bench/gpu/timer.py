"""Seconds of a short call on a GPU, without the gaps in which the device waits for Python.

A call is captured several times in a row into a CUDA graph, each time after a kernel that overwrites more than the L2 cache;
the same graph without the calls is timed in turn with it, and the difference is the calls'. So the inputs of every call come
from memory, nothing between two events waits for a launch, and an event pair spans several calls. A function that cannot be
captured is timed call by call instead, behind as many overwriting kernels as its launches take on the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.records import Function, Spread, spread

IN_GRAPH = "CUDA graph, L2 overwritten before each call"
QUEUED = "queued behind overwriting kernels, L2 overwritten before each call"
PAIR_SECONDS = 2e-3
"""Of the calls between two events, at least."""
MOST_CALLS = 20
LEAST_REPEATS, MOST_REPEATS = 10, 100
HOST_MARGIN = 2.0
"""The overwriting kernels take so many times as long as the launches that queue behind them."""


class Timed(NamedTuple):
    """seconds: of one call. how: the way it was measured. calls: between two events."""

    seconds: Spread
    how: str
    calls: int

    def fields(self) -> dict[str, object]:
        return {**self.seconds.fields(), "timing": self.how, "calls_per_event_pair": self.calls}


def per_call(with_calls: float, without: float, calls: int) -> float:
    """Seconds of a call.

    Args:
        with_calls: seconds of a graph with the calls.
        without: seconds of the same graph without them.
        calls: their number.

    Returns:
        Seconds.
    """
    return (with_calls - without) / calls


class CudaTimer:
    """Times functions on the current CUDA device; holds the memory that it overwrites between calls."""

    def __init__(self, *, budget: float = 0.4, clock: Callable[[], float] = time.perf_counter):
        """budget: seconds of one measurement, about. clock: of the host."""
        self.budget, self.clock = budget, clock
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.buffer = torch.empty(max(4 * cache, 2**27), dtype=torch.uint8, device="cuda")
        self.stream = torch.cuda.Stream()

    def overwrite(self) -> None:
        self.buffer.zero_()

    def __call__(self, function: Function) -> Timed:
        """The seconds of a call, after a first one that compiles and allocates."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
            rough = statistics.median(self._events(function) for _ in range(3))
            flush = statistics.median(self._events(self.overwrite) for _ in range(3))
            calls = max(1, min(MOST_CALLS, round(PAIR_SECONDS / max(rough, 1e-6))))
            repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(self.budget / (calls * (rough + 2 * flush)))))
            times = self._in_graphs(function, calls, repeats)
            if times:
                return Timed(spread(times), IN_GRAPH, calls)
            return Timed(spread(self._queued(function, flush, repeats)), QUEUED, 1)

    def _in_graphs(self, function: Function, calls: int, repeats: int) -> list[float]:
        """Empty where the function cannot be captured or is too short for the difference."""
        try:
            both, alone = self._graph(calls, function), self._graph(calls, None)
        except RuntimeError:  # it synchronises, or takes memory in a way that no graph can hold
            torch.cuda.synchronize()
            return []
        times = [per_call(self._events(both.replay), self._events(alone.replay), calls) for _ in range(repeats)]
        return times if statistics.median(times) > 0 else []

    def _graph(self, calls: int, function: Function | None) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(calls):
                self.overwrite()
                if function is not None:
                    function()
        return graph

    def _events(self, function: Callable[[], object]) -> float:
        """Seconds between an event before and one after a function, behind an overwriting kernel."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.overwrite()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _queued(self, function: Function, flush: float, repeats: int) -> list[float]:
        started = self.clock()
        function()
        host = self.clock() - started
        torch.cuda.synchronize()
        flushes, times = 1 + int(HOST_MARGIN * host / flush), []
        for _ in range(repeats):
            for _ in range(flushes - 1):
                self.overwrite()
            times.append(self._events(function))
        return times

"""A thread per process that finds failed and stalled ranks, and ends this process when there is one."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from cammask_fast.runtime.env import local_rank

TICK = 0.5
"""Seconds between two looks of the watchdog."""
COMPILE_TIMEOUTS = 6
"""Times `timeout` that may pass without progress while a process compiles."""
SILENT_LOOKS = 30
"""Looks, four ticks apart, after which a process that compiles does not answer: a compiler may hold Python's lock."""
FAILED = "failed"


class Watchdog(threading.Thread):
    """Ends this process when another rank has failed, or when there is no progress: the main thread may be blocked in a
    collective that never ends.

    Args:
        store: of this launch, shared by all ranks.
        rank: of this process.
        size: number of processes.
        timeout: seconds without progress after which all ranks end; `COMPILE_TIMEOUTS` times as many while one compiles.
        clock: seconds, for tests.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float, *, clock: Callable[[], float] = time.monotonic):
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.timeout, self.clock = store, rank, size, timeout, clock
        self.doing, self.beats, self.ticks, self.last = "starting", 0, 0, clock()
        self.compiling, self.excused = False, self.last
        self.over = threading.Event()
        self.publish_heartbeat()

    def publish_heartbeat(self) -> None:
        """Write what this process does to the store, for the other ranks to read."""
        names = {"pid": os.getpid(), "host": socket.gethostname()}
        status = {"beats": self.beats, "doing": self.doing, "ticks": self.ticks, "compiling": self.compiling, **names}
        self.store.set(f"at/{self.rank}", json.dumps(status))

    def tick(self) -> None:
        """Tell the other ranks that this process still answers."""
        self.ticks += 1
        self.publish_heartbeat()

    def finish(self) -> None:
        """Wait for the thread too: the interpreter must not end, nor the group go, while it talks to the store."""
        self.over.set()
        self.join(timeout=10 * TICK)

    def run(self) -> None:
        """Watch the other ranks until `over` is set; end this process when one has failed or is stalled."""
        while not self.over.wait(TICK):
            try:
                self.tick()
                if self.store.check([FAILED]):
                    time.sleep(TICK)  # this process may be about to end by itself
                    self._end(None)
                if (stalled := self.find_stalled_rank()) is not None:
                    self._end(self.claim_first_failure(stalled))
            except RuntimeError:  # the store is gone, and with it the process that kept it; torchrun ends the others
                return

    def claim_first_failure(self, message: str) -> str | None:
        """`message` with the rank if this process is the first that failed, else None; the other ranks end when they see it."""
        try:
            first = int(self.store.add(FAILED, 1)) == 1
        except RuntimeError:  # the machine that kept the store is gone
            first = True
        return f"rank {self.rank}: {message}" if first else None

    def beat(self, phase: str) -> None:
        """Record progress of this process, which is in `phase` from now on."""
        self.doing, self.last = phase, self.clock()
        self.beats += 1

    def find_stalled_rank(self) -> str | None:
        """Which rank is stalled and for how long, in words; None while there is progress.

        A process that compiles makes progress of a kind, and the others wait for it: all are excused for another `timeout`, up
        to `COMPILE_TIMEOUTS` of them. One that compiles but does not answer is not excused.
        """
        now = self.clock()
        if not self.beats or now - max(self.last, self.excused) <= self.timeout:  # reading a large folder may take its time
            return None
        silent, after = self._silent()
        if not silent and any(status["compiling"] for status in after) and now - self.last <= COMPILE_TIMEOUTS * self.timeout:
            self.excused = self.clock()
            return None
        return self._describe(silent, after)

    def _silent(self) -> tuple[list[int], list[dict[str, Any]]]:
        """Other ranks that do not answer, and the last status of all."""
        before = after = self._statuses()
        silent: list[int] = []
        for _ in range(SILENT_LOOKS):
            for _ in range(4):
                time.sleep(TICK)
                self.tick()  # other ranks may be looking at this one meanwhile
            after = self._statuses()
            silent = [rank for rank in range(self.size) if rank != self.rank and after[rank]["ticks"] == before[rank]["ticks"]]
            if not any(after[rank]["compiling"] for rank in silent):
                break
        return silent, after

    def _describe(self, silent: list[int], statuses: list[dict[str, Any]]) -> str:
        """Words for a stalled rank: one that does not answer, else one that compiles, else the one with the least progress."""
        compiling = [rank for rank in range(self.size) if statuses[rank]["compiling"]]
        suspects = silent[:1] or compiling or range(self.size)
        rank = min(suspects, key=lambda rank: statuses[rank]["beats"])
        culprit = statuses[rank]
        limit = f"{self.timeout:g} s (--timeout)"
        if compiling and not silent:
            limit = f"{COMPILE_TIMEOUTS * self.timeout:g} s ({COMPILE_TIMEOUTS} times --timeout)"
        who = f"rank {rank} (pid {culprit['pid']} on {culprit['host']})"
        doing = "compiling" if culprit["compiling"] else culprit["doing"]
        what = "does not answer" if silent else f"is stalled in {doing}"
        return f"no progress for {limit}: {who} {what}; run the same command again to resume"

    def _statuses(self) -> list[dict[str, Any]]:
        return [json.loads(self.store.get(f"at/{rank}")) for rank in range(self.size)]

    def _end(self, message: str | None) -> None:
        if self.over.is_set():
            return
        if message:
            print(f"cammask: error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


_current: Watchdog | None = None
"""Of the process group that this process joined last; its claims stand after the group has ended."""


def install(watchdog: Watchdog) -> None:
    """Make a watchdog the one of this process."""
    global _current
    _current = watchdog


def heartbeat(phase: str) -> None:
    """Report progress: the watchdog counts the seconds since the last call, and names `phase` when they are too many."""
    if _current is not None:
        _current.beat(phase)


def watch_compiler() -> None:
    """Tell the watchdog from now on when this process compiles: in its first step, or for another number of images."""
    from torch._dynamo.callback import callback_handler  # takes a second: only where something is compiled

    watchdog = _current
    if watchdog is None:
        return

    def starts(_: Any) -> None:
        watchdog.compiling = True

    def ends(_: Any) -> None:
        watchdog.compiling = False
        watchdog.beat(watchdog.doing)

    callback_handler.register_start_callback(starts)
    callback_handler.register_end_callback(ends)


def claim_first_failure(message: str) -> str | None:
    """What this process is to print of its error: `message` with its rank if it is the first that failed, else None. The other
    ranks end when they learn of it. Without a process group every process of a machine found the same: local rank 0 prints."""
    if _current is None:
        return message if local_rank() == 0 else None
    return _current.claim_first_failure(message)


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone."""
    words = (
        "Connection closed by peer", "Connection reset", "Broken pipe", "Socket", "socket", "Timed out", "timed out", "NCCL",
    )  # fmt: skip
    return dist.is_available() and dist.is_initialized() and any(word in str(error) for word in words)

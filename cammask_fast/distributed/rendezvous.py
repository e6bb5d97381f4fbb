"""A store prefix unique to one launch, so that restarted processes never meet the addresses of dead ones."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any


def rendezvous_prefix(store: Any, rank: int, size: int, *, timeout: float) -> str:
    """Agree on a store prefix unique to this launch.

    torchrun may keep its store, with the addresses of dead processes, when it restarts processes, and its restart count differs
    between machines: a replaced machine starts at 0, and one whose processes were healthy does not count. So rank 0 opens the
    next prefix; the other ranks greet it there with a random word, and a word that comes back was heard by a living rank 0.

    Args:
        store: a store of PyTorch's that all ranks reach.
        rank: of this process.
        size: number of processes.
        timeout: seconds to wait for the others.

    Returns:
        The prefix.

    Raises:
        ValueError: when a rank is missing after `timeout` seconds.
    """
    word, lost = os.urandom(8).hex(), f"within {timeout:g} s (--timeout): is torchrun up on all machines?"
    if rank == 0:
        part = str(store.add("parts", 1))
        store.set("part", part)
        others = range(1, size)
        try:
            store.wait([f"{part}/hello/{other}" for other in others], timedelta(seconds=timeout))
        except RuntimeError:
            missing = [str(other) for other in others if not store.check([f"{part}/hello/{other}"])]
            raise ValueError(f"rank 0 did not meet rank {', '.join(missing)} {lost}") from None
        for other in others:
            store.set(f"{part}/heard/{other}", store.get(f"{part}/hello/{other}"))
        return part
    until, greeted = time.monotonic() + timeout, ""
    while time.monotonic() < until:
        part = store.get("part").decode() if store.check(["part"]) else ""
        if part != greeted:
            store.set(f"{part}/hello/{rank}", word)
            greeted = part
        if part and store.check([f"{part}/heard/{rank}"]) and store.get(f"{part}/heard/{rank}").decode() == word:
            return part
        time.sleep(0.05)
    raise ValueError(f"rank {rank} did not meet rank 0 {lost}")

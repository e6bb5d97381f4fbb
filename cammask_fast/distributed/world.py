"""The processes of a run: joined under torchrun, or this one alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cammask_fast.distributed.collectives import set_control_group
from cammask_fast.distributed.rendezvous import rendezvous_prefix
from cammask_fast.distributed.watchdog import COMPILE_TIMEOUTS, Watchdog, install
from cammask_fast.runtime.env import launched, local_rank


class World(NamedTuple):
    """rank: of this process, 0 to size - 1. size: number of processes. local_rank: on its machine, also its CUDA device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the process that prints and writes."""
        return self.rank == 0


@contextmanager
def init_distributed(device: str, *, timeout: float = 600.0) -> Iterator[World]:
    """Join the process group of this launch for the time of a command: NCCL (`cuda`) or gloo under torchrun, else one process.

    An exception in any process ends all of them within seconds; see `claim_first_failure`.

    Args:
        device: `cuda` or `cpu`.
        timeout: seconds without progress after which all processes end, naming the stalled rank; `COMPILE_TIMEOUTS` times
            as many while a process compiles.
    """
    if not launched():
        yield World()
        return
    local = local_rank()
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(local)
    longest = timedelta(
        seconds=(COMPILE_TIMEOUTS + 2) * timeout + 60
    )  # the watchdog comes first: it knows which rank is stalled
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout + 60)))
    store = PrefixStore(rendezvous_prefix(store, rank, size, timeout=timeout + 60), store)
    watchdog = Watchdog(store.clone(), rank, size, timeout)  # who is in the group below has published its pid
    install(watchdog)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longest)
    set_control_group(dist.new_group(backend="gloo", timeout=longest) if backend == "nccl" else dist.group.WORLD)
    watchdog.start()
    try:
        yield World(rank, size, local)
        watchdog.finish()
        dist.destroy_process_group()  # only where all goes well: it waits for the others
    finally:
        watchdog.finish()
        set_control_group(None)

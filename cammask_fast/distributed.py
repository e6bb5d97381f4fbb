"""The one place that talks to torch.distributed: processes started by torchrun, or this one alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """rank: of this process, 0 to size - 1. size: processes. local_rank: its place on its machine, the CUDA device it uses."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: str) -> Iterator[World]:
    """The processes of this run for the time of a command: joined through NCCL (`cuda`) or gloo under torchrun, else one."""
    if not dist.is_torchelastic_launched():
        yield World()
        return
    local_rank = dist.get_node_local_rank()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun started this process."""
    return bool(dist.is_torchelastic_launched())


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on every one of them; the tensor itself where there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

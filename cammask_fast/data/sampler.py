"""Which samples a process sees, and when: one sampler for every loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def digest(names: str, sizes: Sequence[int]) -> str:
    """Tells one set of samples from another, in a few characters."""
    found = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=6)
    found.update(repr(list(sizes)).encode())
    return found.hexdigest()


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The shuffled sample order of one epoch.

    Args:
        count: number of samples.
        seed: of the run.
        epoch: 0 for the first one. Every pair of seed and epoch has its own order.

    Returns:
        int64 (count,), a permutation that depends on the arguments alone.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randperm(count, generator=generator)


class ResumableDistributedSampler:
    """The batches of one rank, epoch after epoch, with a position in the middle of an epoch that can be saved and restored.

    The samples of an epoch are cut into global batches of batch_size * world_size, and these into equal consecutive parts,
    one per rank, so that every sample comes exactly once whatever the number of ranks. With `shuffle` (training) their order is
    `epoch_order` and the last incomplete global batch is dropped. Without it (evaluation) they come in order, and the last
    global batch is shared out as evenly as it goes: parts differ by at most one sample, and a rank without one has one batch
    less.
    """

    def __init__(
        self, count: int, *, batch_size: int, shuffle: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        if batch_size < 1:
            raise ValueError(f"batch size: expected 1 or more, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if shuffle and count < batch_size * world_size:
            raise ValueError(
                f"batch size {batch_size * world_size} is larger than the {count} training images: choose a smaller one"
            )
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.position = 0
        """Batches of this epoch that the loader has handed out."""
        self._start = 0

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self.count, self.global_batch)
        return whole if self.shuffle else whole + (rest > self.rank)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless it is the one in whose middle `load_state_dict` has put us."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def begin(self) -> list[Tensor]:
        """The sample ids, int64 (n,), of the batches that are left: those of the whole epoch, or after `load_state_dict` the
        rest of it. The loader adds 1 to `position` for each batch it hands out."""
        samples = epoch_order(self.count, seed=self.seed, epoch=self.epoch) if self.shuffle else torch.arange(self.count)
        parts = [chunk.tensor_split(self.world_size)[self.rank] for chunk in samples.split(self.global_batch)][: len(self)]
        self.position, self._start = self._start, 0
        return parts[self.position :]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides which samples come next."""
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position. Raises ValueError when data, global batch, seed or shuffling differ."""
        different = [
            f"{name} {state.get(name)} instead of {own}" for name, own in self._identity().items() if state.get(name) != own
        ]
        if different:
            raise ValueError(f"this loader position belongs to other data or settings: {', '.join(different)}")
        self.epoch = int(state["epoch"])
        self.position = self._start = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"count": self.count, "global_batch": self.global_batch, "shuffle": self.shuffle, "seed": self.seed}


class ResumableLoader:
    """What all loaders share: a `ResumableDistributedSampler` and its state."""

    sampler: ResumableDistributedSampler

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration yields."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, counted in batches that were handed out, not in those prefetched."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration yields what was left when `state` was saved. Raises ValueError when it belongs to other data."""
        self.sampler.load_state_dict(state)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Hand out batches, counting each."""
        for batch in batches:
            self.sampler.position += 1
            yield batch

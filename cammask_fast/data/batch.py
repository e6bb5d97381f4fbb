"""The one thing every loader yields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch of decoded, resized, not yet normalised images.

    images: uint8 (N, H, W, 3), RGB. labels: int64 (N,). sample_ids: int64 (N,), stable across epochs.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Loader(Protocol):
    """What training and evaluation ask of a loader; its order depends on (seed, epoch) alone."""

    def set_epoch(self, epoch: int) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The shuffled sample order of one epoch, int64 (count,); a function of (seed, epoch) and nothing else."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFF_FFFF_FFFF_FFFF)
    return torch.randperm(count, generator=generator)


class ArrayLoader:
    """Batches of images that are already in memory.

    images: uint8 (M, H, W, 3). labels: int64 (M,). With `shuffle` the order follows `epoch_order` and the last incomplete
    batch is dropped, as in training; otherwise every image comes once, in order.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, batch_size: int, shuffle: bool = False, seed: int = 0):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 (M, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        if len(images) != len(labels):
            raise ValueError(f"labels: expected one per image ({len(images)}), got {len(labels)}")
        if shuffle and len(images) < batch_size:
            raise ValueError(f"batch size {batch_size} is larger than the {len(images)} training images: choose a smaller one")
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.shuffle else whole + (rest > 0)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.images)
        order = epoch_order(count, seed=self.seed, epoch=self.epoch) if self.shuffle else torch.arange(count)
        for chunk in order.split(self.batch_size)[: len(self)]:
            yield Batch(self.images[chunk], self.labels[chunk], chunk)

"""The one thing every loader yields, and what a loader and a source of images are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from cammask_fast.data.sampler import ResumableDistributedSampler, ResumableLoader


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
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class ImageSource(Protocol):
    """Encoded images with labels: a folder or tar shards.

    folders: class folder names. labels: int64 (M,), indices into folders. faults: (location, reason) of samples that were lost
    before an index could be given to them, such as those behind the cut in a damaged shard. fingerprint: changes with the names
    and sizes of the images, not with the place of the whole.
    """

    @property
    def where(self) -> str: ...
    @property
    def folders(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def faults(self) -> tuple[tuple[str, str], ...]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes: ...
    def name(self, index: int) -> str: ...
    def fingerprint(self) -> str: ...
    def subset(self, chosen: Tensor) -> Self: ...
    def with_classes(self, folders: tuple[str, ...], labels: Tensor) -> Self: ...


class ArrayLoader(ResumableLoader):
    """Batches of images that are already in memory, in the order of `ResumableDistributedSampler`.

    images: uint8 (M, H, W, 3). labels: int64 (M,).
    """

    def __init__(self, images: Tensor, labels: Tensor, sampler: ResumableDistributedSampler):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 (M, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        if len(images) != len(labels):
            raise ValueError(f"labels: expected one per image ({len(images)}), got {len(labels)}")
        self.images, self.labels, self.sampler = images, labels, sampler

    def __iter__(self) -> Iterator[Batch]:
        return self._counted(Batch(self.images[ids], self.labels[ids], ids) for ids in self.sampler.begin())

"""The one thing every loader yields, and what a loader and a source of images are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from cammask_fast.data.sampler import ResumableDistributedSampler, ResumableLoader


class Batch(NamedTuple):
    """A batch of decoded, resized, not yet normalised images.

    images: uint8 (N, H, W, 3), RGB. labels: int64 (N,). sample_ids: int64 (N,), stable across epochs. relevance: float16
    (N, P), and teacher_outputs: float16 (N, E) or (N, K), what a run has kept of the images, which no loader gives.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    relevance: Tensor | None = None
    teacher_outputs: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there, in the order of the fields."""
        return [tensor for tensor in self if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor through `function`."""
        return Batch(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; copies from pinned memory do not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def chunks(self, count: int) -> list[Batch]:
        """Consecutive parts, as many as `count` and of equal size where that divides the batch."""
        parts = [() if tensor is None else tensor.chunk(count) for tensor in self]
        return [Batch(*(part[i] if part else None for part in parts)) for i in range(len(parts[0]))]  # type: ignore[arg-type]


class Loader(Protocol):
    """What training and evaluation ask of a loader; its order depends on (seed, epoch) alone."""

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration yields."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned: the next iteration begins at that position."""


class ImageSource(Protocol):
    """Encoded images with labels: a folder or tar shards."""

    @property
    def where(self) -> str:
        """Where the images are, for messages."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Names of the class folders, K."""

    @property
    def labels(self) -> Tensor:
        """int64 (M,), indices into `folders`."""

    @property
    def faults(self) -> tuple[tuple[str, str], ...]:
        """(location, reason) of samples that have no index, such as those behind the cut in a damaged shard."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes:
        """The encoded bytes of an image. Raises OSError or ValueError where it cannot be read."""

    def name(self, index: int) -> str:
        """Where an image is, for messages."""

    def fingerprint(self) -> str:
        """A few characters that change with names and sizes of the images, not with the location of the whole."""

    def subset(self, chosen: Tensor) -> Self:
        """The images at the indices `chosen`, int64, with the same classes."""

    def with_classes(self, folders: tuple[str, ...], labels: Tensor) -> Self:
        """The same images under other classes; labels: int64 (M,), indices into `folders`."""


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

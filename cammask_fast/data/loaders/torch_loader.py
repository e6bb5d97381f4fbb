"""The loader without DALI: PIL decodes and torchvision resizes in the worker processes of a PyTorch DataLoader.

It also settles, for both loaders, what becomes of a sample that cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cammask_fast.data.loaders.reading import Failed, ReadError, read_sample
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.loaders.workers import iter_with_worker_check, read_ahead
from cammask_fast.data.sampler import ResumableDistributedSampler, ResumableLoader
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.data.types import Batch, ImageSource

UNREADABLE = (OSError, EOFError, ValueError)
"""What reading and decoding a sample raise when it is at fault."""


class BatchRequest(NamedTuple):
    """A batch that a loader asks its workers for: numbers, as a tensor would travel to them through a file and a socket.

    plain: ids that DALI has refused, which PIL decodes.
    """

    epoch: int
    sample_ids: tuple[int, ...]
    plain: frozenset[int] = frozenset()


class Decoded(NamedTuple):
    """A worker's answer. images: uint8 (n, S, S, 3), zeros where reasons names the row and why it cannot be read. notes: what
    was guessed of a row."""

    sample_ids: Tensor
    images: Tensor
    reasons: Mapping[int, str]
    notes: Mapping[int, str]


class BatchSampler:
    """The batches of the current epoch, as a DataLoader's sampler."""

    def __init__(self, sampler: ResumableDistributedSampler):
        self.sampler = sampler
        self.plain: set[int] = set()

    def __iter__(self) -> Iterator[BatchRequest]:
        for batch in self.sampler.begin():
            ids = tuple(batch.tolist())
            yield BatchRequest(self.sampler.epoch, ids, frozenset(self.plain.intersection(ids)))

    def __len__(self) -> int:
        return len(self.sampler)


class DecodedBatches(Dataset[Decoded | Failed]):
    """Decodes the batches it is asked for."""

    def __init__(self, source: ImageSource, transform: Transform):
        self.source, self.transform = source, transform

    def __getitem__(self, request: BatchRequest) -> Decoded | Failed:
        size = self.transform.size
        images = torch.zeros((len(request.sample_ids), size, size, 3), dtype=torch.uint8)
        reasons: dict[int, str] = {}
        notes: dict[int, str] = {}
        for row, index in enumerate(request.sample_ids):
            try:
                data = read_sample(self.source, index)
                images[row] = decode(
                    data, self.transform, epoch=request.epoch, sample_id=index, note=partial(notes.__setitem__, row)
                )
            except UNREADABLE as error:
                reasons[row] = error_reason(error)
            except ReadError as error:
                return Failed(str(error))
        return Decoded(torch.tensor(request.sample_ids), images, reasons, notes)


class Sampled(Protocol):
    """What `replace_or_drop_unreadable` needs of a loader."""

    sampler: ResumableDistributedSampler
    source: ImageSource
    bad: UnreadableSamples


def replace_or_drop_unreadable(loader: Sampled, decoded: Decoded) -> Batch | None:
    """The rule for samples that cannot be read: each is counted and listed; in training its place is taken by the next
    readable sample of its batch (after the last comes the first), with that one's label and id, so that the batch keeps its
    size; in evaluation it is left out. None for a batch without any readable sample. Raises ValueError when there are too many.
    """
    ids, images, reasons, notes = decoded
    for row, note in notes.items():
        loader.bad.guessed(loader.source.name(int(ids[row])), note)
    for row in reasons:
        loader.bad.add(loader.source.name(int(ids[row])), reasons[row])
    if reasons:
        good = torch.tensor([row for row in range(len(ids)) if row not in reasons], dtype=torch.int64)
        if (
            not len(good) and loader.sampler.shuffle and loader.sampler.world_size > 1
        ):  # the others would wait for its gradients
            raise ValueError(f"{loader.bad.summary()}, among them all of one batch: remove or replace them")
        if not len(good):
            return None
        next_good = torch.searchsorted(good, torch.arange(len(ids))) % len(good)
        rows = good[next_good] if loader.sampler.shuffle else good
        images, ids = images[rows.to(images.device)], ids[rows]
    return Batch(images, loader.source.labels[ids], ids)


def error_reason(error: BaseException) -> str:
    """The reason of an unreadable sample in a few words, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


class TorchLoader(ResumableLoader):
    """Batches of a source, decoded by `workers` processes (0: in this one) in the order of `ResumableDistributedSampler`.

    Samples that cannot be read follow the rule of `replace_or_drop_unreadable`. A worker that dies ends the iteration with a
    ValueError.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        sampler: ResumableDistributedSampler,
        *,
        bad: UnreadableSamples,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        if workers < 0:
            raise ValueError(f"--workers: expected 0 or more, got {workers}")
        self.source, self.labels, self.bad, self.transform = source, source.labels, bad, transform
        self.sampler = sampler
        self._loader = read_ahead(DecodedBatches(source, transform), BatchSampler(sampler), workers, pin_memory=pin_memory)
        record_index_errors(source, bad)

    def __iter__(self) -> Iterator[Batch]:
        return self._counted(
            replace_or_drop_unreadable(self, Decoded(*decoded)) for decoded in iter_with_worker_check(self._loader)
        )

    def _counted(self, batches: Iterator[Batch | None]) -> Iterator[Batch]:
        return (batch for batch in super()._counted(batches) if batch is not None)


def record_index_errors(source: ImageSource, bad: UnreadableSamples) -> None:
    """Count and list what the source lost before it could number its samples."""
    bad.lost = len(source.faults)
    for location, reason in source.faults:
        bad.add(location, reason)

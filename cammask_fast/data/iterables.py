"""Batches of people's own: any iterable of (images, labels), such as a torch DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor

from cammask_fast.data.types import Batch

LAYOUTS = "uint8 (N, H, W, 3), uint8 (N, 3, H, W) or float (N, 3, H, W) in [0, 1]"


def to_uint8(images: Any) -> Tensor:
    """Images in any of the usual layouts as uint8 (N, H, W, 3).

    Args:
        images: uint8 (N, H, W, 3), uint8 (N, 3, H, W), or float (N, 3, H, W) in [0, 1], not normalised; a tensor or a NumPy
            array.

    Raises:
        ValueError: for other types, shapes and dtypes, and for floats outside [0, 1], which were probably normalised already.
    """
    if isinstance(images, ndarray):
        images = torch.as_tensor(images)
    if not isinstance(images, Tensor):
        raise ValueError(f"images: expected a tensor, {LAYOUTS}, got {type(images).__name__}")
    channels_last = images.ndim == 4 and images.shape[-1] == 3
    channels_first = images.ndim == 4 and images.shape[1] == 3
    if not (channels_last or channels_first) or (images.dtype != torch.uint8 and not images.is_floating_point()):
        raise ValueError(f"images: expected {LAYOUTS}, got {images.dtype} {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images: expected floats in [0, 1], got {low:.3g} to {high:.3g}: leave out the normalisation, it is done here"
            )
        images = (images.float() * 255).round().to(torch.uint8)
    return images if channels_last else images.permute(0, 2, 3, 1).contiguous()


def to_labels(labels: Any, *, images: int, classes: int | None = None) -> Tensor:
    """Labels as int64 (N,).

    Args:
        labels: whole numbers, a tensor, an array or a list.
        images: how many there must be.
        classes: how many there are, if that is known; labels on a GPU are not compared with it, which would wait for the GPU.

    Returns:
        int64 (N,), on the device of the labels.

    Raises:
        ValueError: for other types, shapes and values.
    """
    expected = f"labels: expected whole numbers, int ({images},)"
    try:
        found = torch.as_tensor(labels)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(f"{expected}, got {type(labels).__name__}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.shape != (images,):
        raise ValueError(f"{expected}, got {found.dtype} {tuple(found.shape)}")
    if images and classes is not None and found.device.type == "cpu":
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels: expected 0 to {classes - 1} for the {classes} classes of the model, got {low} to {high}")
    return found.long()


class IterableLoader:
    """A loader over an iterable of (images, labels) that can be iterated once per epoch, as DataLoaders and lists can.

    Args:
        batches: yields images as `to_uint8` takes them, and int labels (N,).
        image_size: what the model takes; other sizes are refused.
        classes: how many the model has, to refuse labels outside.
        drop_last: leave out a last batch that is smaller than the first (training).

    Raises:
        ValueError: when there are no batches, an iterator that is used up, or batches that do not fit.
    """

    def __init__(self, batches: Iterable[Any], *, image_size: int, classes: int | None = None, drop_last: bool = False):
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
            raise ValueError(f"data: expected a folder name or an iterable of (images, labels), got {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise ValueError("data: an iterator is used up after one epoch: give a list of batches or a DataLoader")
        self.batches, self.image_size, self.classes, self.drop_last, self.epoch = batches, image_size, classes, drop_last, 0
        sizes = [] if isinstance(batches, Sized) and not drop_last else [len(batch.labels) for batch in self._all()]
        self._count = len(self._kept(sizes)) if sizes else len(batches) if isinstance(batches, Sized) else 0
        if not self._count:
            raise ValueError("data: there are no batches")
        self.batch_size = sizes[0] if sizes else 0
        self.images = sum(self._kept(sizes))

    def _kept(self, sizes: list[int]) -> list[int]:
        return sizes[:-1] if self.drop_last and len(sizes) > 1 and sizes[-1] < sizes[0] else sizes

    def _all(self) -> Iterator[Batch]:
        first = 0
        for number, pair in enumerate(self.batches):
            if not isinstance(pair, (tuple, list)) or len(pair) < 2:
                raise ValueError(f"data: expected (images, labels), got {type(pair).__name__} as batch {number}")
            images = to_uint8(pair[0])
            if images.shape[1:3] != (self.image_size, self.image_size):
                height, width = images.shape[1:3]
                raise ValueError(
                    f"images: this model takes {self.image_size} x {self.image_size} pixels, got {height} x {width}"
                )
            labels = to_labels(pair[1], images=len(images), classes=self.classes)
            yield Batch(images, labels, torch.arange(first, first + len(images)))
            first += len(images)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._all()):
            if number < self._count:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch; a position inside of it is not known."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the epoch."""
        self.epoch = int(state["epoch"])

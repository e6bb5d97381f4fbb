"""How images are loaded: with DALI or plain PyTorch, by how many workers, and how many bad ones are tolerated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cammask_fast.data.loaders.dali_loader import HARDWARE_SHARE, DaliLoader, dali_installed
from cammask_fast.data.loaders.dali_versions import dali_failure
from cammask_fast.data.loaders.torch_loader import TorchLoader
from cammask_fast.data.loaders.unreadable import DEFAULT_MAX_BAD, UnreadableSamples
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.transforms import Transform
from cammask_fast.data.types import ImageSource
from cammask_fast.data.warn import warn_once

LOADERS = ("auto", "dali", "torch")
REPORT = "bad_samples.tsv"
MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Options of both loaders. kind: `auto` is DALI where it works. workers: see the loaders; None: the cores that this
    process may use, at most 8. device: where DALI's batches lie. report: file with the unreadable samples. rank, world_size:
    this process among those that share the data. hardware_share: of the GPU's JPEG decoder."""

    kind: str = "auto"
    workers: int | None = None
    device: torch.device | str = "cpu"
    max_bad: float = DEFAULT_MAX_BAD
    report: Path = Path(REPORT)
    rank: int = 0
    world_size: int = 1
    hardware_share: float = HARDWARE_SHARE

    def __post_init__(self) -> None:
        if self.kind not in LOADERS:
            raise ValueError(f"unknown loader {self.kind!r}; known: {', '.join(LOADERS)}")

    @property
    def uses_dali(self) -> bool:
        """Whether DALI loads the images. With `auto` it does where it is installed and works; a failure is reported once."""
        if self.kind != "auto" or not dali_installed():
            return self.kind == "dali"
        failure = dali_failure(torch.device(self.device))
        if failure is not None:
            warn_once(f"NVIDIA DALI is installed, but does not work ({failure}): images are loaded by PyTorch")
        return failure is None

    def build(
        self, source: ImageSource, transform: Transform, *, batch_size: int, shuffle: bool = False, seed: int = 0
    ) -> TorchLoader | DaliLoader:
        """The loader of a source.

        Args:
            source: encoded images with labels.
            transform: size and augmentations.
            batch_size: images per batch and process.
            shuffle: shuffle each epoch and drop its last incomplete batch, as in training.
            seed: of the order.

        Returns:
            The DALI or the PyTorch loader.

        Raises:
            ValueError: for options that cannot work.
        """
        workers = min(MOST_WORKERS, len(os.sched_getaffinity(0))) if self.workers is None else self.workers
        bad = UnreadableSamples(source.where, len(source), max_share=self.max_bad, report=self.report, writes=self.rank == 0)
        device, sampler = torch.device(self.device), self.sampler(len(source), batch_size, shuffle=shuffle, seed=seed)
        if self.uses_dali:
            share = self.hardware_share
            return DaliLoader(source, transform, sampler, bad=bad, workers=workers, device=device, hardware_share=share)
        return TorchLoader(source, transform, sampler, bad=bad, workers=workers, pin_memory=device.type == "cuda")

    def sampler(self, count: int, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> ResumableDistributedSampler:
        """The sampler of this process.

        Args:
            count: samples in the source.
            batch_size: images per batch and process.
            shuffle: shuffle each epoch and drop its last incomplete batch, as in training.
            seed: of the order.

        Returns:
            The sampler.
        """
        return ResumableDistributedSampler(
            count, batch_size=batch_size, shuffle=shuffle, seed=seed, rank=self.rank, world_size=self.world_size
        )

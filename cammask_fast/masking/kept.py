"""What a run keeps of each training image, by its sample id: what the frozen teacher says of it is the same at every visit.

The first visit computes, later ones look up; a look-up is a gather on the device, outside the compiled step. Which images are
known is noted on the host, where the loaders leave the ids, so that the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cammask_fast import distributed
from cammask_fast.cam import relevance_of
from cammask_fast.config import TrainConfig
from cammask_fast.data.augment import Augment
from cammask_fast.data.sampler import ResumableLoader
from cammask_fast.data.types import Batch, Loader
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.model.classifier import Classifier

MERGED_AT_ONCE = 2**16
"""Rows that processes exchange in one message."""


class SampleStore:
    """float16 rows by sample id, on a device.

    1.28 million maps of 196 patches are 502 MB. known: bool (M,) on the host, which rows hold something.
    """

    def __init__(self, count: int, width: int, device: torch.device):
        self.rows = torch.zeros(count, width, dtype=torch.float16, device=device)
        self.known = torch.zeros(count, dtype=torch.bool)
        self._own = torch.zeros(count, dtype=torch.bool)
        """Rows that this process has written and the others have not seen."""

    def missing(self, sample_ids: Tensor) -> Tensor:
        """Positions in `sample_ids`, int64 (N,) on the host, of those that are not known."""
        return (~self.known[sample_ids]).nonzero()[:, 0]

    def put(self, sample_ids: Tensor, values: Tensor) -> None:
        """Keep values (N, width) of any float type under ids on the host."""
        self.rows.index_copy_(0, sample_ids.to(self.rows.device, non_blocking=True), values.to(torch.float16))
        self.known[sample_ids] = True
        self._own[sample_ids] = True

    def get(self, sample_ids: Tensor) -> Tensor:
        """Rows, float16 (N, width), of ids on the device."""
        return self.rows.index_select(0, sample_ids)

    def merge(self) -> None:
        """Give every process the rows that any has written since the last call; all processes call it at the same step."""
        if distributed.is_initialized():
            own = self._own.to(self.rows.device, torch.float32)
            writers = distributed.all_reduce_sum(own.clone())
            for some in writers.nonzero()[:, 0].split(MERGED_AT_ONCE):
                values = torch.where(own[some, None] > 0, self.rows[some].float(), 0.0)
                self.rows[some] = (distributed.all_reduce_sum(values) / writers[some, None]).to(torch.float16)
            self.known |= writers.cpu() > 0
        self._own.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, for a checkpoint."""
        return {"rows": self.rows, "known": self.known.to(torch.uint8)}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Raises ValueError on rows of other images or another model."""
        if saved["rows"].shape != self.rows.shape:
            raise ValueError(f"kept rows: expected {tuple(self.rows.shape)}, got {tuple(saved['rows'].shape)}")
        self.rows.copy_(saved["rows"])
        self.known.copy_(saved["known"])
        self._own.zero_()


class TeacherMemory:
    """What the frozen teacher says of every training image, kept: its relevance at the image's label (`Batch.relevance`).

    Rounding to float16 applies from the first visit on, so that a run that resumes with what was kept goes on bit for bit.
    """

    def __init__(self, teacher: Classifier, config: TrainConfig, count: int):
        """teacher: stored in the type of the products. count: training images, whose ids are 0 to count - 1."""
        self.teacher, self.config = teacher, config
        self.relevance = SampleStore(count, teacher.visual.config.patches, teacher.head.weight.device)

    @classmethod
    def of_run(cls, teacher: Classifier, config: TrainConfig, train: Loader) -> TeacherMemory | None:
        """The memory of a run.

        Args:
            teacher: the frozen classifier.
            config: settings; `cam_source` says whether anything is kept.
            train: loader of the training images.

        Returns:
            The memory, or None where nothing is kept.

        Raises:
            ValueError: the loader's sample ids change from epoch to epoch.
        """
        if config.cam_source == "student":
            return None
        if not isinstance(train, ResumableLoader):
            raise ValueError(
                "cam_source teacher: maps are kept by sample id, and batches of an iterable have none that stay: train on a "
                "folder, or use cam_source student"
            )
        return cls(teacher, config, train.sampler.count)

    def add_to(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on a device with what is kept of its images; what is not known yet is computed."""
        ids, batch = batch.sample_ids.cpu(), batch.to(device)
        missing = self.relevance.missing(ids)
        if len(missing):
            new = batch if len(missing) == len(ids) else batch.map(lambda tensor: tensor[missing.to(device)])
            self._compute(new, ids[missing])
        return batch._replace(relevance=self.relevance.get(batch.sample_ids))

    def _compute(self, batch: Batch, ids: Tensor) -> None:
        most = max(1, self.config.batch_size // self.config.accumulate)  # as many as a micro-batch, at most
        for images, labels, some in zip(*(t.split(most) for t in (batch.images, batch.labels, ids)), strict=True):
            self.relevance.put(some, teacher_relevance(self.teacher, images, labels, self.config))

    def merge(self) -> None:
        """See `SampleStore.merge`."""
        self.relevance.merge()

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, for a checkpoint."""
        return {f"relevance.{name}": value for name, value in self.relevance.state_dict().items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Without what was kept, which may be missing, it is computed again. Raises ValueError on what does not fit."""
        if "relevance.rows" in saved:
            self.relevance.load_state_dict({name: saved[f"relevance.{name}"] for name in ("rows", "known")})


def teacher_relevance(teacher: Classifier, images: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    """The frozen teacher's map of images at their labels, in the form in which it is kept.

    It is divided by its maximum, since a relevance of 1e-6 would have few bits as float16.

    Args:
        teacher: in any compute dtype.
        images: uint8 (N, H, W, 3).
        labels: int64 (N,).
        config: settings; `cam` and `cam_start_layer` choose the map.

    Returns:
        float16 (N, P).
    """
    dtype = teacher.visual.conv1.weight.dtype
    found = relevance_of(teacher, images, labels, config.cam, start_layer=config.cam_start_layer, dtype=dtype)
    return normalise_relevance(found).to(torch.float16)


def refuse_moving_pixels(config: TrainConfig, augment: Augment) -> None:
    """Raise ValueError where the maps of images are kept and the images move under them."""
    if config.cam_source == "teacher" and augment.moves_pixels:
        raise ValueError(
            "--cam-source teacher keeps one map per image, and random-crop, flip and rand-augment move its pixels: leave them "
            "out (color-jitter may stay), or use --cam-source student"
        )

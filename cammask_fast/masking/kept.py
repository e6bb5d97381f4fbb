"""What a run keeps of each training image, by its sample id: maps, and features of the frozen teacher that do not change.

The first visit computes, later ones look up; a look-up is a gather on the device, outside the compiled step. Which images are
known is noted on the host, where the loaders leave the ids, so that the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cammask_fast import distributed
from cammask_fast.cam import relevance_of
from cammask_fast.config import TrainConfig
from cammask_fast.data.augment import Augment
from cammask_fast.data.sampler import ResumableLoader
from cammask_fast.data.types import Batch, Loader
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking.counterfactual import masked_input
from cammask_fast.masking.randomness import MaskRandomness
from cammask_fast.model.classifier import Classifier, Prediction
from cammask_fast.strategy import Strategy, parse_strategy

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

    def forget(self) -> None:
        """Everything counts as not known."""
        self.known.zero_()
        self._own.zero_()

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


class ImageMemory:
    """What a run keeps of every training image, as it joins the batches of the images.

    `Batch.relevance`: the map at the image's label, of the frozen teacher, or of the student every `cam_every` epochs.
    `Batch.teacher_outputs`: the teacher's features (fd) or logits (kd) of the distilled input, where that is the same at every
    visit.
    Rounding to float16 applies from the first visit on, so that a run that resumes with what was kept goes on bit for bit.

    Args:
        teacher: frozen, in the dtype of the products.
        student: as it trains; its maps are made with the weights that it has then.
        config: says what is kept.
        count: training images, whose ids are 0 to count - 1.
    """

    def __init__(self, teacher: Classifier, student: Classifier, config: TrainConfig, count: int):
        self.teacher, self.student, self.config = teacher, student, config
        device, vit = teacher.head.weight.device, teacher.visual.config
        widths = {"relevance": vit.patches if keeps_maps(config) else 0}
        outputs = vit.output_dim if config.resolved.distill == "fd" else len(teacher.head.weight)
        widths["teacher_outputs"] = outputs if config.teacher_outputs == "kept" else 0
        self.stores = {name: SampleStore(count, width, device) for name, width in widths.items() if width}
        self.period = 0
        """How often the student's maps have been made anew."""

    @classmethod
    def of_run(cls, teacher: Classifier, student: Classifier, config: TrainConfig, train: Loader) -> ImageMemory | None:
        """The memory of a run.

        Args:
            teacher: frozen, in the dtype of the products.
            student: as it trains.
            config: says what is kept.
            train: loader of the training images.

        Returns:
            The memory, or None where nothing is kept.

        Raises:
            ValueError: the loader's sample ids change from epoch to epoch.
        """
        if not keeps_maps(config) and config.teacher_outputs == "computed":
            return None
        if not isinstance(train, ResumableLoader):
            raise ValueError(
                "cam_source teacher, cam_every and teacher_outputs kept need sample ids, and batches of an iterable have none "
                "that stay: train on a folder, or leave these settings out"
            )
        return cls(teacher, student, config, train.sampler.count)

    def add_to(self, batch: Batch, device: torch.device, *, epoch: int) -> Batch:
        """Give a batch what is kept of its images; what is not known yet is computed.

        Args:
            batch: as the loader yields it.
            device: of the model.
            epoch: from 0; the student's maps are made anew in every `cam_every`-th.

        Returns:
            The batch on the device, with the fields that are kept.
        """
        stores = list(self.stores.values())
        period = 0 if self.config.cam_source == "teacher" else epoch // self.config.cam_every
        if period != self.period and "relevance" in self.stores:
            self.period = period
            self.stores["relevance"].forget()
        ids, batch = batch.sample_ids.cpu(), batch.to(device)
        missing = stores[0].missing(ids)
        if len(missing):
            new = batch if len(missing) == len(ids) else batch.map(lambda tensor: tensor[missing.to(device)])
            self._compute(new, ids[missing])
        return batch._replace(**{name: store.get(batch.sample_ids) for name, store in self.stores.items()})

    def _compute(self, batch: Batch, ids: Tensor) -> None:
        """Micro-batch by micro-batch, so that a step needs no more memory than the others."""
        most, dtype = max(1, self.config.batch_size // self.config.accumulate), self.teacher.visual.conv1.weight.dtype
        mapped = self.teacher if self.config.cam_source == "teacher" else self.student.stored_in(dtype)
        for images, labels, some in zip(*(t.split(most) for t in (batch.images, batch.labels, ids)), strict=True):
            relevance = None
            if "relevance" in self.stores:
                relevance = kept_relevance(mapped, images, labels, self.config)
                self.stores["relevance"].put(some, relevance)
            if "teacher_outputs" in self.stores:
                self.stores["teacher_outputs"].put(some, kept_outputs(self.teacher, images, relevance, self.config))

    def merge(self) -> None:
        """See `SampleStore.merge`."""
        for store in self.stores.values():
            store.merge()

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, and the period of the student's maps, for a checkpoint."""
        found = {f"{name}.{part}": t for name, store in self.stores.items() for part, t in store.state_dict().items()}
        return {**found, "period": torch.tensor(self.period)}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take what was kept; it may be missing, and is computed again. Raises ValueError on what does not fit."""
        if not saved:
            return
        self.period = int(saved["period"])
        for name, store in self.stores.items():
            store.load_state_dict({part: saved[f"{name}.{part}"] for part in ("rows", "known")})


def keeps_maps(config: TrainConfig) -> bool:
    """Whether a map is kept from one visit of an image to the next."""
    return config.cam_source == "teacher" or config.cam_every > 1


def kept_relevance(model: Classifier, images: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
    """The map of images at their labels as it is kept: divided by its maximum, as a relevance of 1e-6 has few bits in float16.

    Args:
        model: stored in any type of the products.
        images: uint8 (N, H, W, 3).
        labels: int64 (N,).
        config: kind, first layer and contrast of the map.

    Returns:
        float16 (N, P), in [0, 1].
    """
    dtype = model.visual.conv1.weight.dtype
    options: dict[str, Any] = {"start_layer": config.cam_start_layer, "contrast": config.cam_contrast}
    found = relevance_of(model, images, labels, config.cam, **options, dtype=dtype)
    return normalise_relevance(found).to(torch.float16)


@torch.no_grad()
def kept_outputs(teacher: Classifier, images: Tensor, relevance_NP: Tensor | None, config: TrainConfig) -> Tensor:
    """What is distilled of the images, or of what is left of them when the kept map has masked them, as it is kept.

    Args:
        teacher: stored in any type of the products.
        images: uint8 (N, H, W, 3).
        relevance_NP: float16 (N, P), of `kept_relevance`; None for clean images.
        config: the masking strategy, one that draws no random numbers, and fd or kd.

    Returns:
        float16 (N, E), the features, or (N, K), the logits.
    """
    vit, dtype = teacher.visual.config, teacher.visual.conv1.weight.dtype
    tokens: dict[str, Tensor | None] = {}
    if relevance_NP is not None:
        strategy = parse_strategy(config.resolved.masking)
        masked = masked_input(images, relevance_NP.float(), strategy, MaskRandomness(), grid=vit.grid)
        tokens = {"kept_tokens": masked.kept_tokens, "key_mask": masked.key_mask}
    patches = normalise(images, patch_size=vit.patch_size, dtype=dtype, layout="patches")
    found: Prediction = teacher(patches, **tokens)
    return (found.features if config.resolved.distill == "fd" else found.logits).to(torch.float16)


def check_kept(config: TrainConfig, strategy: Strategy | None) -> None:
    """Refuse to keep what the method does not need, or what is another at every visit.

    Args:
        config: settings of the run.
        strategy: its masking strategy, None for clean images.

    Raises:
        ValueError: with what to change.
    """
    asked = "cam_source teacher" if config.cam_source == "teacher" else f"cam_every {config.cam_every}"
    if keeps_maps(config) and (strategy is None or not strategy.needs_cam):
        masking = config.resolved.masking
        raise ValueError(
            f"{asked}: method {config.method!r} with masking {masking!r} needs no map: leave it out, or choose an object or "
            "context mask"
        )
    if config.cam_source == "teacher" and config.cam_every > 1:
        raise ValueError("cam_every: the teacher's maps stay as they are: leave it out, or use cam_source student")
    if config.teacher_outputs == "kept" and config.resolved.distill == "none":
        raise ValueError(f"teacher_outputs kept: method {config.method!r} distils nothing: leave it out")
    if config.teacher_outputs == "kept" and strategy is not None:
        same = strategy.fill == "none" and strategy.needs_cam and config.cam_source == "teacher"
        if not same:
            raise ValueError(
                f"teacher_outputs kept: with masking {config.resolved.masking!r} and maps of the {config.cam_source} an image "
                "is masked otherwise at every visit: it needs clean images, or an object or context no-fill with cam_source "
                "teacher"
            )


def refuse_moving_pixels(config: TrainConfig, augment: Augment) -> None:
    """Refuse to keep what is said of images that change.

    Args:
        config: settings of the run.
        augment: augmentations of its training images.

    Raises:
        ValueError: with what to leave out.
    """
    if keeps_maps(config) and augment.moves_pixels:
        option = "--cam-source teacher" if config.cam_source == "teacher" else "--cam-every"
        raise ValueError(
            f"{option} keeps one map per image, and random-crop, flip and rand-augment move its pixels: leave them out "
            "(color-jitter may stay), or leave out the option"
        )
    if config.teacher_outputs == "kept" and augment != Augment():
        raise ValueError("--teacher-outputs kept: the teacher sees another image after every --augment: leave one of them out")

"""Where the time of our eager step goes: seconds of each stage, from the moments at which the step calls the model."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.masking import MaskedInput, MaskRandomness
from cammask_fast.model.classifier import Classifier, Prediction
from cammask_fast.precision import compute_dtype
from cammask_fast.step import Cotangents, StudentForward, eager_forward, step_body

STAGES = ("task", "cam", "selection and fill", "teacher", "masked student")


def stages(
    student: Classifier, teacher: Classifier, config: TrainConfig, batch: Batch, draws: MaskRandomness | None
) -> dict[str, float]:
    """Time the stages of one eager step; clean forward and clean backward are `task`.

    Args:
        student: its gradients are added to `.grad`.
        teacher: frozen.
        config: settings of the method.
        batch: images and labels.
        draws: random numbers of the batch.

    Returns:
        Seconds per stage; stages that a method lacks are left out.
    """
    seconds: dict[str, float] = {}
    stage, since = "task", time.perf_counter()

    def enter(name: str) -> None:
        nonlocal stage, since
        if batch.images.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0.0) + now - since
        stage, since = name, now

    dtype = compute_dtype(config.precision, student.head.weight)
    inner, masks = eager_forward(student, config, dtype)(), draws is not None

    def forward(patches: Tensor, masked: MaskedInput | None = None, *, tapped: bool = False) -> StudentForward:
        enter("task" if masked is None else "masked student")
        one = inner(patches, masked, tapped=tapped)
        is_clean = masked is None

        def tap_gradients(score: Tensor) -> Iterable[Tensor]:
            enter("cam")
            return one.tap_gradients(score)

        def pull_back(cotangents: Cotangents) -> None:
            enter("task" if is_clean else "masked student")
            one.pull_back(cotangents)
            if is_clean and masks:
                enter("selection and fill")

        return StudentForward(one.prediction, one.taps, tap_gradients, pull_back)

    stored = teacher.stored_in(dtype)

    def observed(*arguments: Tensor, **options: Tensor) -> Prediction:
        enter("teacher")
        return stored(*arguments, **options)

    step_body(student.visual.config, config, dtype)(forward, observed, batch, draws, 1.0)
    enter("end")
    return {name: seconds[name] for name in STAGES if name in seconds}

"""The training loop of every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from cammask_fast.config import TrainConfig
from cammask_fast.data.batch import Batch, Loader
from cammask_fast.evaluate import accuracy
from cammask_fast.metrics import DataWait
from cammask_fast.model.classifier import Classifier, interpolate
from cammask_fast.precision import product_dtype, resolve, use_matrix_units
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, draw_for_step

Progress = Callable[[str, int, int, float, float], None]
"""Called as (phase, images done, images in total, mean loss since the last call, share of the time spent waiting for data)."""


class FineTuned(NamedTuple):
    """best: the checkpoint with the best validation accuracy (for WiSE-FT: the last one interpolated with the zero-shot
    weights). last: the checkpoint after the last step."""

    best: Classifier
    last: Classifier


class NonFiniteLoss(ValueError):  # noqa: N818  (reads as what happened)
    """The loss became NaN or infinite."""


def fine_tune(
    pretrained: Classifier,
    train: Loader,
    validation: Loader | None,
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    log_every: int = 10,
) -> FineTuned:
    """Fine-tune a copy of `pretrained`; return the checkpoint with the best validation accuracy and the last one.

    `pretrained` is also the teacher. Without a validation loader, and for WiSE-FT, the last checkpoint counts. The loader's
    batches are optimiser steps; `config.accumulate` cuts them into micro-batches. Raises ValueError on settings that
    cannot work and NonFiniteLoss with the step number.
    """
    if config.resolved.trained == "head":
        config = replace(config, optim=replace(config.optim, weight_decay=0.0))
    device, dtype = pretrained.head.weight.device, product_dtype(config.precision, pretrained.head.weight)
    teacher, strategy = pretrained.frozen_copy(), build_strategy(config)
    patches, total = teacher.visual.config.patches, config.epochs * len(train) * config.batch_size
    student = teacher.frozen_copy().train()
    compiled = config.compile != "off" and (config.compile != "auto" or device.type == "cuda")
    use_matrix_units(resolve(config.precision, device))
    state = TrainState.create(student, config, steps_per_epoch=len(train), compiled=compiled)
    step = build_train_step(state, teacher, config)
    running, wait = torch.zeros((), device=device), DataWait(device)
    for epoch in range(config.epochs):
        train.set_epoch(epoch)
        for batch in wait.over(train):
            parts = [
                Batch(*part) for part in zip(*(tensor.chunk(config.accumulate) for tensor in batch.to(device)), strict=True)
            ]
            running += step([(part, draw_for_step(strategy, part, patches, state.generator)) for part in parts]).total
            state.step += 1
            if state.step % log_every == 0:
                _report(progress, state.step, config.batch_size, total, running.item() / log_every, wait.share)
                running.zero_()
        if validation is not None or epoch + 1 == config.epochs:
            score = math.nan if validation is None else accuracy(student.eval().stored_in(dtype), validation, device=device)
            state.keep_if_best(score, take_last=validation is None or config.resolved.interpolate)
            student.train()
    if not math.isfinite(running.item()):
        _report(progress, state.step, config.batch_size, total, running.item(), wait.share)
    best = teacher.frozen_copy()
    best.load_state_dict(state.best_weights)
    if config.resolved.interpolate:
        best.load_state_dict(interpolate(teacher.state_dict(), best.state_dict(), config.alpha))
    return FineTuned(best.requires_grad_(True), student.requires_grad_(True).eval())


def _report(progress: Progress | None, step: int, batch_size: int, total: int, loss: float, waited: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss is {loss} at step {step} or shortly before: try a lower learning rate (--lr), a longer warm-up or "
            "--precision fp32, and check the images"
        )
    if progress is not None:
        progress("train", step * batch_size, total, loss, waited)

"""One training step: losses and gradients of every method, with as little arithmetic as eager autograd allows.

One clean forward serves the CAM and the task loss; the CAM's pullback computes no weight gradients; the clean graph is freed
before the masked forward begins.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.cam import grad_cam, mm_cam
from cammask_fast.config import TrainConfig
from cammask_fast.data.batch import Batch
from cammask_fast.kernels.masked_fill import normalise
from cammask_fast.losses import feature_distillation, logit_distillation
from cammask_fast.masking import Draws, Strategy, draw_masking, masked_input, parse_strategy
from cammask_fast.model.classifier import Classifier, Prediction
from cammask_fast.model.vit import Taps


class Losses(NamedTuple):
    """Scalars on the device, detached. total = w_task * task + w_distill * distill."""

    total: Tensor
    task: Tensor
    distill: Tensor


class Step(Protocol):
    """Adds the gradients of one (micro-)batch to the student's `.grad`, multiplied by `scale` (1 / accumulation)."""

    def __call__(self, batch: Batch, draws: Draws | None, *, scale: float = 1.0) -> Losses: ...


def build_strategy(config: TrainConfig) -> Strategy | None:
    """The masking strategy of a run, or None for clean images."""
    masking = config.resolved.masking
    return None if masking == "none" else parse_strategy(masking, upsample=config.upsample)


def build_step(student: Classifier, teacher: Classifier | None, config: TrainConfig) -> Step:
    """The step of a method. teacher: frozen, needed where the method distils. Raises ValueError on what cannot work."""
    method, strategy = config.resolved, build_strategy(config)
    vit = student.visual.config
    if method.trained == "none":
        raise ValueError(f"method {config.method!r} trains nothing; use `cammask evaluate` or `cammask zeroshot`")
    if strategy is not None and strategy.threshold is None:
        strategy.k(vit.patches)
    if config.cam_start_layer >= vit.layers:
        raise ValueError(f"cam_start_layer: expected 0..{vit.layers - 1} for this model, got {config.cam_start_layer}")

    def distance(ours: Prediction, theirs: Prediction) -> Tensor:
        if method.distill == "fd":
            return feature_distillation(ours.features, theirs.features)
        return logit_distillation(ours.logits, theirs.logits, temperature=config.kd_temperature)

    def relevance(logits: Tensor, labels: Tensor, taps: Taps) -> Tensor:
        if config.cam == "grad-cam":
            return grad_cam(logits, labels, taps)
        return mm_cam(logits, labels, taps, start_layer=config.cam_start_layer)

    def step(batch: Batch, draws: Draws | None, *, scale: float = 1.0) -> Losses:
        taps = Taps() if strategy is not None and strategy.needs_cam else None
        clean = normalise(batch.images, dtype=student.head.weight.dtype)
        prediction = student(clean, taps=taps)
        task = F.cross_entropy(prediction.logits, batch.labels)
        if method.distill == "none":
            (config.w_task * scale * task).backward()
            return _detached(config, task, torch.zeros_like(task))
        assert teacher is not None
        if strategy is None:
            with torch.no_grad():
                target = teacher(clean)
            distill = distance(prediction, target)
            ((config.w_task * task + config.w_distill * distill) * scale).backward()
            return _detached(config, task, distill)
        cam = None if taps is None else relevance(prediction.logits, batch.labels, taps)
        (config.w_task * scale * task).backward()
        assert draws is not None
        masked = masked_input(batch.images, cam, strategy, draws, grid=vit.grid, dtype=clean.dtype)
        del prediction, taps
        pixels = clean if masked.pixels is None else masked.pixels
        with torch.no_grad():
            target = teacher(pixels, kept_tokens=masked.kept_tokens, key_mask=masked.key_mask)
        ours = student(pixels, kept_tokens=masked.kept_tokens, key_mask=masked.key_mask)
        distill = distance(ours, target)
        if cam is not None:  # NaN compares as not masked: let it reach the loss instead of passing silently
            distill = distill.masked_fill(~cam.isfinite().all(), torch.nan)
        (config.w_distill * scale * distill).backward()
        return _detached(config, task, distill)

    return step


def _detached(config: TrainConfig, task: Tensor, distill: Tensor) -> Losses:
    task, distill = task.detach(), distill.detach()
    return Losses(config.w_task * task + config.w_distill * distill, task, distill)


def draw_for_step(strategy: Strategy | None, batch: Batch, patches: int, generator: torch.Generator) -> Draws | None:
    """The random numbers of one step, or None where the method masks nothing."""
    if strategy is None:
        return None
    return draw_masking(strategy, count=len(batch.labels), patches=patches, generator=generator)

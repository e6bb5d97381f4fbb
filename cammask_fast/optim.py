"""AdamW under a one-cycle schedule, as in the paper's recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cammask_fast.config import OptimConfig


class Clipped(NamedTuple):
    """What a step found: whether gradients and loss are finite, bool; the gradients' global norm before clipping. On the
    device, () or (1,)."""

    finite: Tensor
    norm: Tensor


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> AdamW:
    """AdamW (torch's fused kernel) over the parameters that require a gradient."""
    trained = [p for p in parameters if p.requires_grad]
    betas = (0.9, config.beta2)  # the schedule moves beta1 at every step
    return AdamW(trained, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def build_schedule(optimizer: AdamW, config: OptimConfig, *, total_steps: int) -> OneCycleLR:
    """One cycle per run, stepped once per optimiser step; momentum is cycled too, so beta1 runs 0.95 -> 0.85 -> 0.95.

    Args:
        optimizer: its learning rate and beta1 are set at every step.
        config: highest learning rate and shape of the cycle.
        total_steps: optimiser steps of the run.

    Returns:
        torch's schedule.
    """
    rising = config.pct_start * total_steps
    return OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=total_steps,
        pct_start=config.pct_start if rising != 1 else (1 + 1e-9) / total_steps,  # torch divides by a rise of one step less one
        anneal_strategy="cos",
        div_factor=config.div_factor,
        final_div_factor=config.final_div_factor,
    )


def schedule_table(config: OptimConfig, *, total_steps: int) -> Tensor:
    """Learning rate and beta1 of every step under `build_schedule`: float64 (total_steps, 2)."""
    optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], config)
    schedule = build_schedule(optimizer, config, total_steps=total_steps)
    group, rows = optimizer.param_groups[0], []
    for step in range(total_steps):
        rows.append((group["lr"], group["betas"][0]))
        if step + 1 < total_steps:
            optimizer.step()  # moves nothing: there is no gradient
            schedule.step()
    return torch.tensor(rows, dtype=torch.float64)


class FlatAdamW:
    """AdamW with clipping by global norm over one flat tensor, for a step that is one graph.

    Learning rate, beta1 and the number of the step are tensors on the device, so that neither a synchronisation nor another
    graph is needed when the schedule moves them. Formulas, constants and results are those of `build_optimizer` with
    `build_schedule`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, *, total_steps: int):
        """parameters: those that train, of one dtype and device. They become views of `flat`, so that whoever reads them sees
        every update."""
        self.config = config
        self.names = tuple(parameters)
        self.shapes = [p.shape for p in parameters.values()]
        self.flat = torch.cat([p.detach().flatten() for p in parameters.values()])
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.step = torch.zeros(1, dtype=torch.int64, device=self.flat.device)
        """Updates made, for the bias corrections."""
        self.position = torch.zeros_like(self.step)
        """Place in the schedule."""
        self.schedule = schedule_table(config, total_steps=total_steps).to(self.flat.device)
        lr, beta1 = self.schedule.unbind(1)
        rates = torch.stack([lr, 1 - lr * config.weight_decay, 1 - beta1, beta1.log()], dim=1)
        self.rates = rates.to(torch.promote_types(self.flat.dtype, torch.float32))
        """(total_steps, 4): learning rate, factor of the decay, 1 - beta1 and log beta1 of every step, rounded from float64."""
        for parameter, view in zip(parameters.values(), self.weights().values(), strict=True):
            parameter.data = view

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name, as views of `flat`."""
        return self.parts(self.flat)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """What lies in a tensor like `flat`, by the name of the parameter, as views."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def update(self, gradient: Tensor, loss: Tensor) -> Clipped:
        """Clip the flat gradient to `clip_norm` and make one step, in place. Where gradient or loss are not finite, the
        schedule moves on and nothing else changes."""
        c, dtype = self.config, self.rates.dtype
        norm = torch.linalg.vector_norm(gradient, dtype=dtype)
        finite = norm.isfinite() & loss.isfinite()
        self.position.add_(1)
        self.step.add_(finite)
        lr, decay, rate1, log_beta1 = self.rates.index_select(0, self.position - 1).unbind(1)  # (1,) each
        updates = self.step.to(dtype)
        # 1 - beta**updates without its cancellation, so that float32 is enough; float64 is slow on GPUs
        correction1, correction2 = -torch.expm1(updates * log_beta1), -torch.expm1(updates * math.log(c.beta2))
        gradient = gradient * (c.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        exp_avg = torch.lerp(self.exp_avg, gradient, rate1)
        exp_avg_sq = (self.exp_avg_sq * c.beta2).addcmul(gradient, gradient, value=1 - c.beta2)
        denominator = exp_avg_sq.sqrt() / correction2.sqrt() + c.eps
        flat = self.flat * decay - lr / correction1 * exp_avg / denominator
        for tensor, new in ((self.flat, flat), (self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)):
            tensor.copy_(torch.where(finite, new, tensor))
        return Clipped(finite, norm)


def clipped_step(optimizer: AdamW, parameters: Sequence[nn.Parameter], loss: Tensor, *, clip_norm: float) -> Clipped:
    """Clip gradients to a global norm and take one step of torch's fused AdamW, as `FlatAdamW.update` does, without a
    synchronisation.

    Where the loss or a gradient is not finite, nothing changes.

    Args:
        optimizer: of the parameters.
        parameters: with their gradients; those without one are left as they are.
        loss: of the step, scalar.
        clip_norm: largest global norm.

    Returns:
        Whether everything was finite, and the norm before clipping, both on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(gradients)
    finite = norm.isfinite() & loss.isfinite()
    clip_grads_with_norm_(parameters, clip_norm, norm)
    setattr(optimizer, "found_inf", (~finite).float())  # noqa: B010  (torch's fused kernel then leaves everything as it is)
    optimizer.step()
    return Clipped(finite, norm)

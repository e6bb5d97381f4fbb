"""AdamW under a one-cycle schedule, as in the paper's recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cammask_fast.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> AdamW:
    """AdamW (torch's fused kernel) over the parameters that require a gradient."""
    trained = [p for p in parameters if p.requires_grad]
    betas = (0.9, config.beta2)  # the schedule moves beta1 at every step
    return AdamW(trained, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def build_schedule(optimizer: AdamW, config: OptimConfig, *, total_steps: int) -> OneCycleLR:
    """One cycle per run, stepped once per optimiser step; momentum is cycled too, so beta1 runs 0.95 -> 0.85 -> 0.95."""
    return OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=total_steps,
        pct_start=config.pct_start,
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
        self.schedule = schedule_table(config, total_steps=total_steps).to(self.flat.device)
        for parameter, view in zip(parameters.values(), self.weights().values(), strict=True):
            parameter.data = view

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name, as views of `flat`."""
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def update(self, gradient: Tensor) -> None:
        """Clip the flat gradient to `clip_norm` and make one step, in place."""
        c, dtype = self.config, self.flat.dtype
        self.step.add_(1)
        lr, beta1 = self.schedule.index_select(0, self.step - 1).unbind(1)  # (1,), float64 as the corrections need it
        exponent = self.step.to(self.schedule.dtype)
        correction1, correction2 = 1 - beta1**exponent, 1 - c.beta2**exponent
        size, root, decay = lr / correction1, correction2.sqrt(), 1 - lr * c.weight_decay
        norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(dtype, torch.float32))
        gradient = gradient * (c.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self.exp_avg.lerp_(gradient, (1 - beta1).to(dtype))
        self.exp_avg_sq.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
        denominator = self.exp_avg_sq.sqrt() / root.to(dtype) + c.eps
        self.flat.mul_(decay.to(dtype)).sub_(size.to(dtype) * self.exp_avg / denominator)

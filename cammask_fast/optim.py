"""AdamW under a one-cycle schedule, as in the paper's recipe."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
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

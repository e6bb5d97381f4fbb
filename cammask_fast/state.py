"""Everything a run changes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cammask_fast.config import TrainConfig
from cammask_fast.model.classifier import Classifier
from cammask_fast.optim import build_optimizer, build_schedule


@dataclass
class TrainState:
    """Student, optimiser, schedule, generator of the masking draws, and the best checkpoint so far."""

    student: Classifier
    optimizer: AdamW
    schedule: OneCycleLR
    generator: torch.Generator
    step: int = 0
    best_accuracy: float = float("-inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def create(cls, student: Classifier, config: TrainConfig, *, steps_per_epoch: int) -> TrainState:
        """Freeze what the method does not train and build the optimiser for the rest."""
        student.requires_grad_(config.resolved.trained == "all")
        student.head.requires_grad_(True)
        device = student.head.weight.device
        optimizer = build_optimizer(student.parameters(), config.optim)
        schedule = build_schedule(optimizer, config.optim, total_steps=config.epochs * steps_per_epoch)
        return cls(student, optimizer, schedule, torch.Generator(device).manual_seed(config.seed))

    def keep_if_best(self, accuracy: float, *, take_last: bool) -> None:
        """Remember the weights when `accuracy` (percent) is the best so far, or always (WiSE-FT takes the last)."""
        if take_last or accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best_weights = {name: value.detach().clone() for name, value in self.student.state_dict().items()}

"""Everything a run changes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cammask_fast.config import TrainConfig
from cammask_fast.model.classifier import Classifier
from cammask_fast.optim import FlatAdamW, build_optimizer, build_schedule


@dataclass
class TrainState:
    """Student, optimiser, schedule, generator of the masking draws, and the best checkpoint so far."""

    student: Classifier
    optimizer: AdamW | FlatAdamW
    schedule: OneCycleLR | None
    """None with `FlatAdamW`, which carries its own."""
    generator: torch.Generator
    step: int = 0
    best_accuracy: float = float("-inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def create(cls, student: Classifier, config: TrainConfig, *, steps_per_epoch: int, compiled: bool = False) -> TrainState:
        """Freeze what the method does not train and build the optimiser for the rest: torch's AdamW for the eager step,
        `FlatAdamW`, of which the parameters become views, for the compiled one."""
        student.requires_grad_(config.resolved.trained == "all")
        student.head.requires_grad_(True)
        generator = torch.Generator(student.head.weight.device).manual_seed(config.seed)
        total_steps = config.epochs * steps_per_epoch
        if compiled:
            trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
            return cls(student, FlatAdamW(trained, config.optim, total_steps=total_steps), None, generator)
        optimizer = build_optimizer(student.parameters(), config.optim)
        return cls(student, optimizer, build_schedule(optimizer, config.optim, total_steps=total_steps), generator)

    def keep_if_best(self, accuracy: float, *, take_last: bool) -> None:
        """Remember the weights when `accuracy` (percent) is the best so far, or always (WiSE-FT takes the last)."""
        if take_last or accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best_weights = {name: value.detach().clone() for name, value in self.student.state_dict().items()}

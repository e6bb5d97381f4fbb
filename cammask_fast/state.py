"""Everything a run changes while it trains, in and out of tensors and JSON."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cammask_fast.config import TrainConfig
from cammask_fast.model.classifier import Classifier
from cammask_fast.optim import FlatAdamW, build_optimizer, build_schedule


class StepStats(NamedTuple):
    """loss: mean over the finite steps since the last look, NaN without any. bad_in_a_row, skipped: steps whose loss or
    gradient was not finite, those at the end and all."""

    loss: float
    bad_in_a_row: int
    skipped: int


class Snapshot(NamedTuple):
    """A state at metadata: tensors by name, and the rest as JSON can hold it."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


@dataclass
class TrainState:
    """Student, optimiser, schedule, generator of the masking draws, position in the run, and the best checkpoint so far."""

    student: Classifier
    optimizer: AdamW | FlatAdamW
    schedule: OneCycleLR | None
    """None with `FlatAdamW`, which carries its own."""
    generator: torch.Generator
    tally: Tensor
    """float64 (4,): sum of the finite losses and their number since the last look; non-finite steps in a row, and in all."""
    step: int = 0
    epoch: int = 0
    best_accuracy: float = float("-inf")
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def create(
        cls, student: Classifier, config: TrainConfig, *, steps_per_epoch: int, compiled: bool = False, rank: int = 0
    ) -> TrainState:
        """Freeze what the method does not train and build the optimiser for the metadata: torch's AdamW for the eager step,
        `FlatAdamW`, of which the parameters become views, for the compiled one. rank: processes with donors of their own draw
        other random numbers."""
        student.requires_grad_(config.resolved.trained == "all")
        student.head.requires_grad_(True)
        device = student.head.weight.device
        own = rank if config.donors == "batch" else 0
        generator = torch.Generator(device).manual_seed(config.seed + own * 1_000_003)
        tally = torch.zeros(4, dtype=torch.float64, device=device)
        total_steps = config.epochs * steps_per_epoch
        if compiled:
            trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
            return cls(student, FlatAdamW(trained, config.optim, total_steps=total_steps), None, generator, tally)
        optimizer = build_optimizer(student.parameters(), config.optim)
        return cls(student, optimizer, build_schedule(optimizer, config.optim, total_steps=total_steps), generator, tally)

    def update(self, loss: Tensor, finite: Tensor) -> None:
        """Count a step, on the device."""
        total, steps, in_a_row, skipped = self.tally.unbind()
        good = finite.reshape(()).to(total.dtype)
        total = total + torch.where(finite.reshape(()), loss.detach().reshape(()).to(total.dtype), 0.0)
        self.tally.copy_(torch.stack([total, steps + good, (in_a_row + 1) * (1 - good), skipped + 1 - good]))

    def read_and_reset(self) -> StepStats:
        """Read the tally (waits for the device) and begin a new mean."""
        total, steps, in_a_row, skipped = self.tally.tolist()
        self.tally[:2].zero_()
        return StepStats(total / steps if steps else float("nan"), int(in_a_row), int(skipped))

    def learning_rate(self) -> float:
        """Of the next step (waits for the device in a compiled run)."""
        if isinstance(self.optimizer, FlatAdamW):
            return float(self.optimizer.schedule[min(self.step, len(self.optimizer.schedule) - 1), 0])
        assert self.schedule is not None
        return float(self.optimizer.param_groups[0]["lr"])

    def keep_if_best(self, accuracy: float, *, take_last: bool) -> None:
        """Remember the weights when `accuracy` (percent) is the best so far, or always (WiSE-FT takes the last)."""
        if take_last or accuracy > self.best_accuracy:
            self.best_accuracy, self.best_step = accuracy, self.step
            self.best_weights = {name: value.detach().clone() for name, value in self.student.state_dict().items()}

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors by name, zeros before the first step."""
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if isinstance(self.optimizer, FlatAdamW):
            of = {"exp_avg": self.optimizer.exp_avg, "exp_avg_sq": self.optimizer.exp_avg_sq}
            found = {f"{kind}.{name}": part for kind, flat in of.items() for name, part in self.optimizer.parts(flat).items()}
            return {**found, "updates": self.optimizer.step.reshape(())}
        found = {}
        for name, parameter in trained.items():
            slot = self.optimizer.state[parameter]
            if not slot:
                slot.update(
                    step=torch.zeros((), device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
            found |= {f"{kind}.{name}": slot[kind] for kind in ("exp_avg", "exp_avg_sq")}
            found["updates"] = slot["step"]
        return found

    def state_dict(self) -> Snapshot:
        """Everything, as views of the live tensors."""
        weights = {f"student.{name}": value.detach() for name, value in self.student.state_dict().items()}
        best = {} if self.best_step == self.step else {f"best.{name}": value for name, value in self.best_weights.items()}
        metadata = {
            "step": self.step,
            "epoch": self.epoch,
            "best_accuracy": repr(self.best_accuracy),
            "best_step": self.best_step,
        }
        metadata["has_best"] = bool(self.best_weights)
        return Snapshot({**weights, **self.moments(), **best, "tally": self.tally}, metadata)

    @torch.no_grad()
    def load_state_dict(self, saved: Snapshot) -> None:
        """Go on from a saved state, of an eager or a compiled run. Raises KeyError when something is missing."""
        tensors, metadata = saved
        for name, value in self.student.state_dict().items():
            value.copy_(tensors[f"student.{name}"])
        for name, value in self.moments().items():
            if name != "updates":
                value.copy_(tensors[name])
        self.step, self.epoch = int(metadata["step"]), int(metadata["epoch"])
        self.best_accuracy, self.best_step = float(metadata["best_accuracy"]), int(metadata["best_step"])
        self.tally.copy_(tensors["tally"])
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.step.fill_(int(tensors["updates"]))
            self.optimizer.position.fill_(self.step)
        else:
            assert self.schedule is not None
            for slot in self.optimizer.state.values():
                slot["step"].fill_(float(tensors["updates"]))
            self.schedule.last_epoch = self.step - 1
            with warnings.catch_warnings(action="ignore"):  # torch has not seen the optimiser's steps
                self.schedule.step()
        if metadata["has_best"]:
            device = self.student.head.weight.device
            kind = "student" if self.best_step == self.step else "best"
            self.best_weights = {name: tensors[f"{kind}.{name}"].to(device, copy=True) for name in self.student.state_dict()}
        else:
            self.best_weights = {}

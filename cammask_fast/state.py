"""Everything a run changes while it trains, in and out of tensors and JSON."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from cammask_fast.config import TrainConfig
from cammask_fast.masking.kept import ImageMemory
from cammask_fast.model.classifier import Classifier
from cammask_fast.optim import Clipped, FlatAdamW, build_optimizer, build_schedule

KEPT = "kept."
"""Before the names of what is kept of each image, in a saved state."""
METRICS = ("task", "distill", "gradient_norm", "mask_share", "cam_entropy")


class StepStats(NamedTuple):
    """loss, metrics: means over the finite steps since the last reading, NaN without any; metrics by the names of `METRICS`,
    those of this process. bad_in_a_row, skipped: steps whose loss or gradient was not finite, those at the end and all."""

    loss: float
    bad_in_a_row: int
    skipped: int
    metrics: dict[str, float]


class StepLosses(Protocol):
    """What `TrainState.update` reads of `step.Losses`."""

    @property
    def total(self) -> Tensor:
        """w_task * task + w_distill * distill."""

    @property
    def task(self) -> Tensor:
        """Cross-entropy."""

    @property
    def distill(self) -> Tensor:
        """Distillation loss."""

    @property
    def mask_share(self) -> Tensor:
        """Share of the patches that were masked."""

    @property
    def cam_entropy(self) -> Tensor:
        """Entropy of the relevance over the patches, 0 to 1; NaN without a map."""


class Snapshot(NamedTuple):
    """A state in storable form: tensors by name, and metadata that JSON can hold."""

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
    """float64 (4,): sum of the finite losses and their number since the last reading; non-finite steps in a row, and in all."""
    sums: Tensor
    """float64 (5,): the `METRICS` summed over the finite steps since the last reading."""
    step: int = 0
    epoch: int = 0
    best_accuracy: float = float("-inf")
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    kept: ImageMemory | None = None
    """What the run keeps of each image."""

    @classmethod
    def create(
        cls, student: Classifier, config: TrainConfig, *, steps_per_epoch: int, compiled: bool = False, rank: int = 0
    ) -> TrainState:
        """Freeze what the method does not train, and build the optimiser for the rest.

        Args:
            student: the classifier to train.
            config: settings of the method.
            steps_per_epoch: optimiser steps per epoch.
            compiled: build `FlatAdamW`, of which the parameters become views, for the compiled step; otherwise torch's AdamW.
            rank: of this process; with donors from the own batch, each rank draws other random numbers.

        Returns:
            The state before the first step.
        """
        student.requires_grad_(config.resolved.trained == "all")
        student.head.requires_grad_(True)
        device = student.head.weight.device
        own = rank if config.donors == "batch" else 0
        generator = torch.Generator(device).manual_seed(config.seed + own * 1_000_003)
        tally, sums = (torch.zeros(n, dtype=torch.float64, device=device) for n in (4, len(METRICS)))
        total_steps = config.epochs * steps_per_epoch
        if compiled:
            trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
            return cls(student, FlatAdamW(trained, config.optim, total_steps=total_steps), None, generator, tally, sums)
        optimizer = build_optimizer(student.parameters(), config.optim)
        return cls(student, optimizer, build_schedule(optimizer, config.optim, total_steps=total_steps), generator, tally, sums)

    def make_eager(self, config: TrainConfig, *, steps_per_epoch: int) -> None:
        """Turn the state of a compiled run into that of an eager one, at the same point of the run.

        Args:
            config: of the run.
            steps_per_epoch: of its schedule.
        """
        kept, self.kept = self.kept, None  # stays as it is
        saved = self.state_dict()
        for parameter in self.student.parameters():
            parameter.data = parameter.data.clone()  # no longer views of one tensor
        self.optimizer = build_optimizer(self.student.parameters(), config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, total_steps=config.epochs * steps_per_epoch)
        self.load_state_dict(saved)
        self.kept = kept

    def update(self, losses: StepLosses, clipped: Clipped) -> None:
        """Count a step, on the device."""
        total, steps, in_a_row, skipped = self.tally.unbind()
        kind, finite, loss = total.dtype, clipped.finite.reshape(()), losses.total
        good = finite.to(kind)
        total = total + torch.where(finite, loss.detach().reshape(()).to(kind), 0.0)
        self.tally.copy_(torch.stack([total, steps + good, (in_a_row + 1) * (1 - good), skipped + 1 - good]))
        values = (losses.task, losses.distill, clipped.norm, losses.mask_share, losses.cam_entropy)
        parts = [value.detach().reshape(()).to(kind) for value in values]
        self.sums.copy_(self.sums + torch.where(finite, torch.stack(parts), 0.0))

    def read_and_reset(self) -> StepStats:
        """Read the tally (waits for the device) and begin new means."""
        total, steps, in_a_row, skipped, *sums = torch.cat([self.tally, self.sums]).tolist()
        self.tally[:2].zero_()
        self.sums.zero_()
        mean = {name: value / steps if steps else float("nan") for name, value in zip(METRICS, sums, strict=True)}
        return StepStats(total / steps if steps else float("nan"), int(in_a_row), int(skipped), mean)

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
        kept = {} if self.kept is None else {f"{KEPT}{name}": value for name, value in self.kept.state_dict().items()}
        return Snapshot({**weights, **self.moments(), **best, **kept, "tally": self.tally, "sums": self.sums}, metadata)

    @staticmethod
    def forget_kept(saved: Snapshot) -> None:
        """Take what was kept of each image out of a saved state."""
        for name in [name for name in saved.tensors if name.startswith(KEPT)]:
            del saved.tensors[name]

    @torch.no_grad()
    def load_state_dict(self, saved: Snapshot) -> None:
        """Go on from a saved state, of an eager or a compiled run. Raises KeyError when something is missing."""
        tensors, metadata = saved
        for name, value in self.student.state_dict().items():
            value.copy_(tensors[f"student.{name}"])
        for name, value in self.moments().items():
            if name != "updates" and metadata.get("moments", True):  # a finished run has left none: see `drop_moments`
                value.copy_(tensors[name])
        self.step, self.epoch = int(metadata["step"]), int(metadata["epoch"])
        self.best_accuracy, self.best_step = float(metadata["best_accuracy"]), int(metadata["best_step"])
        if self.kept is not None:
            kept = {name.removeprefix(KEPT): value for name, value in tensors.items() if name.startswith(KEPT)}
            self.kept.load_state_dict(kept)
        self.tally.copy_(tensors["tally"])
        self.sums.copy_(tensors["sums"]) if "sums" in tensors else self.sums.zero_()  # none in checkpoints of version 0.1.0
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

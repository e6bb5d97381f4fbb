"""The settings of a training: options over the recipe, over what fits the model and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cammask_fast.config import OptimConfig, TrainConfig, options_of
from cammask_fast.fitting import Fitted, fitted_config, given_config

Options = dict[str, Any]


def given_settings(args: Options, recipe: Mapping[str, Any]) -> Options:
    """The recipe's `[train]` table under the options that were given, by name, without tables."""
    known = [one.name for settings in (TrainConfig, OptimConfig) for one in options_of(settings)]
    return {**flat({"optim": {}, **recipe}), **{name: args[name] for name in known if args.get(name) is not None}}


def train_config(args: Options, recipe: Mapping[str, Any]) -> TrainConfig:
    """The settings that were given, checked; what fits the data is not known yet."""
    return given_config(given_settings(args, recipe))


def flat(settings: Mapping[str, Any]) -> Options:
    """Settings without tables, under the names of the options. Raises ValueError where `optim` is no table."""
    if not isinstance(settings["optim"], Mapping):
        raise ValueError(f"optim: expected a table of settings, got {settings['optim']!r}")
    return {**{name: value for name, value in settings.items() if name != "optim"}, **settings["optim"]}


@dataclass
class Chosen:
    """The settings of one run, complete once the number of training images is known."""

    given: Options
    config: TrainConfig = field(init=False)
    fitted: Fitted = field(init=False, default=Fitted({}, {}))

    def __post_init__(self) -> None:
        self.config = given_config(self.given)

    def own_batch(self, arch: str, images: int, processes: int) -> int:
        """Fit the settings to a model and its data.

        Args:
            arch: name of the architecture.
            images: to train on.
            processes: that share a batch.

        Returns:
            Images per step and process; 1 where nothing trains.

        Raises:
            ValueError: the batch is larger than the data or cannot be shared evenly.
        """
        if self.config.resolved.trained == "none":
            return 1
        shares = processes * self.config.accumulate
        self.config, self.fitted = fitted_config(arch, images, self.given, shares=shares)
        if self.config.batch_size % shares:
            raise ValueError(
                f"--batch-size: {self.config.batch_size} images cannot be shared by {processes} processes with --accumulate "
                f"{self.config.accumulate}: choose a multiple of {shares}"
            )
        return self.config.batch_size // processes

    def lines(self) -> list[str]:
        """The fitted settings with their reasons, for people."""
        rows = [(f"{name} {value:g}", self.fitted.reasons[name]) for name, value in self.fitted.values.items()]
        width = max((len(setting) for setting, _ in rows), default=0)
        return [f"  {setting:{width}}  {reason}" for setting, reason in rows]

    def record(self) -> dict[str, Any]:
        """The fitted settings with their reasons, for run.json."""
        return {name: {"value": value, "reason": self.fitted.reasons[name]} for name, value in self.fitted.values.items()}

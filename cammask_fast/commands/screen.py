"""What a training is about to do, on one screen, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cammask_fast.config import TrainConfig
from cammask_fast.masking import Strategy, parse_strategy
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.precision import resolve

LOADERS = {"DaliLoader": "DALI", "TorchLoader": "PyTorch", "ArrayLoader": "in memory"}
TRAINS = {"none": "trains nothing", "head": "trains the head only", "all": "trains the image tower and the head"}
KEPT = {"fd": "features", "kd": "logits"}


def screen(
    *,
    arch: str,
    weights: str,
    tower: VisionTransformer,
    data: Sequence[str],
    watched: Mapping[str, int],
    config: TrainConfig,
    steps: int,
    chosen: Sequence[str],
    device: str,
    processes: int,
    loader: str,
) -> list[str]:
    """Lines for people, before the first step.

    Args:
        arch: name of the architecture.
        weights: whose weights the run starts from.
        tower: the image tower.
        data: lines about the training images.
        watched: images of the sets of `--eval`, by name.
        config: settings of the run.
        steps: of an epoch.
        chosen: lines about the settings that were fitted.
        device: `cpu` or `cuda`.
        processes: that share a step.
        loader: class name of the training loader.

    Returns:
        The lines.
    """
    vit = tower.config
    parameters = sum(p.numel() for p in tower.parameters()) / 1e6
    lines = [
        f"model: {arch}, {vit.layers} layers of width {vit.width}, {parameters:.1f} M parameters; {vit.image_size} pixels in "
        f"patches of {vit.patch_size}; activation {vit.activation}; weights: {weights}",
        *data,
    ]
    if watched:
        lines.append("  also evaluated: " + ", ".join(f"{name} ({images} images)" for name, images in watched.items()))
    lines.append(f"method: {method_words(config)}")
    where = f"device: {device_words(device)}, {resolve(config.precision, device)}"
    if config.resolved.trained == "none":
        return [*lines, where]
    compiled = config.compile != "off" and (config.compile != "auto" or device == "cuda")
    shared = f" on {processes} processes" if processes > 1 else ""
    parts = f", {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    lines += [
        f"{where}, {'compiled' if compiled else 'eager'} step{shared}; images loaded by {LOADERS.get(loader, loader)}",
        f"steps: {config.epochs * steps}, {config.epochs} epochs of {steps} with {config.batch_size} images{parts}",
    ]
    return [*lines, "settings that fit the model and the data (options override each):", *chosen] if chosen else lines


def method_words(config: TrainConfig) -> str:
    """What a method does, in a sentence."""
    method = config.resolved
    said = f"{config.method}, {TRAINS[method.trained]}"
    if method.distill != "none":
        images = "the training images" if method.masking == "none" else _masked(parse_strategy(method.masking), config)
        said += f" and keeps the {KEPT[method.distill]} of the frozen model on {images} (weight {config.w_distill:g})"
    if method.interpolate:
        said += f"; then averages the weights with those before, {config.alpha:.0%} new"
    return said


def _masked(strategy: Strategy, config: TrainConfig) -> str:
    if strategy.selection == "random":
        which = f"a random {strategy.threshold:.0%} of the patches"
    else:
        top = f"top {strategy.top_k}" if strategy.top_k else f"top {strategy.top_share or 0:.0%}"
        bound = top if strategy.threshold is None else f"relevance threshold {strategy.threshold:g}"
        which = f"the {strategy.selection}'s patches ({bound}, {config.cam})"
    filled = {"none": "left out", "single": "filled from another image", "multi": "filled from many other images"}
    return f"images with {which} {filled[strategy.fill]}"


def device_words(device: str) -> str:
    """The device, a GPU by its name."""
    if device == "cuda":
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"{device} ({torch.get_num_threads()} threads)"


class TimeEstimate:
    """A log that says, after the second reading of the steps, about how long the rest will take.

    The first reading holds warm-up and compilation and is not counted.
    """

    def __init__(
        self, write: Callable[[Mapping[str, Any]], None], *, config: TrainConfig, steps: int, evaluation: float,
        clock: Callable[[], float] = time.perf_counter, say: Callable[[str], None] = print,
    ):  # fmt: skip
        """write: gets every line of the log. steps: of the run. evaluation: seconds of an evaluation after an epoch."""
        self.write, self.config, self.steps, self.evaluation = write, config, steps, evaluation
        self.clock, self.say, self.readings = clock, say, list[tuple[int, float]]()

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Pass a line on. Lines of epochs take no part, except that the time of their evaluation is taken off."""
        self.write(line)
        if "loss" not in line or len(self.readings) >= 2:
            if "accuracy" in line and len(self.readings) == 1:
                self.readings[0] = (self.readings[0][0], self.clock())  # the evaluation lies behind
            return
        self.readings.append((int(line["step"]), self.clock()))
        if len(self.readings) == 2:
            (first, begun), (second, ended) = self.readings
            each, left = (ended - begun) / (second - first), self.steps - second
            epochs = self.config.epochs - line["epoch"]
            seconds = each * left + self.evaluation * epochs
            if left:
                self.say(
                    f"about {duration(seconds)} left: {left} steps of {each:.2g} s, {epochs} evaluations of "
                    f"{self.evaluation:.2g} s"
                )


def duration(seconds: float) -> str:
    """Seconds in words, to two units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    left = round(seconds)
    units = [(name, size) for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))]
    parts = []
    for name, size in units:
        count, left = divmod(left, size)
        parts.append((count, name))
    start = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    shown = [f"{count} {name}" for count, name in parts[start : start + 2] if count]
    return " ".join(shown) or "0 s"

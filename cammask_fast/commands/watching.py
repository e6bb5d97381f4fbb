"""The sets on which a run is watched: the validation images and those of `--eval`, before, during and after training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cammask_fast.data.factory import AnyLoader, EvaluationSet, open_evaluation
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.evaluate import accuracy, evaluate
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.run_dir import LOG

VALIDATION = "validation"
LEAST_TAIL = 3
"""Lines of the log, at least, that tell how a run ended."""
FAR_ABOVE_START = 1.5
UNSEEN = 3.0
"""Times the loss of guessing, and that at the start, which a run without validation images must end above."""


@dataclass
class Watched:
    """validation: None without any. sets: those of `--eval`, by name. seconds: that the last `scores` took."""

    validation: AnyLoader | None
    sets: Mapping[str, EvaluationSet]
    device: str
    seconds: float = 0.0

    def scores(self, model: Classifier) -> dict[str, float]:
        """Top-1 accuracy in percent on every set, `validation` first."""
        started = time.perf_counter()
        found = {} if self.validation is None else {VALIDATION: accuracy(model, self.validation, device=self.device)}
        found |= self.evaluate(model)
        self.seconds = time.perf_counter() - started
        return found

    def evaluate(self, model: Classifier) -> dict[str, float]:
        """Top-1 accuracy in percent on the sets of `--eval`."""
        return {
            name: evaluate([model], one.loader, groups=one.groups, classes=len(one.class_folders), device=self.device)[0].top1
            for name, one in self.sets.items()
        }

    def images(self) -> dict[str, int]:
        """How many there are, by set."""
        own = {} if self.validation is None else {VALIDATION: len(self.validation.labels)}
        return own | {name: len(one.labels) for name, one in self.sets.items()}


def watch(
    validation: AnyLoader | None, named: Sequence[str], *, image_size: int, class_folders: Sequence[str], config: LoaderConfig
) -> Watched:
    """Open the sets of `--eval`.

    Args:
        validation: loader of the validation images.
        named: NAME=FOLDER, FOLDER or whatever else `evaluate --data` takes.
        image_size: of the model, in pixels.
        class_folders: the classes of the model.
        config: how images are loaded.

    Returns:
        The sets with their loaders.

    Raises:
        ValueError: for sets that cannot be used, have other classes, or are called like another.
    """
    try:
        sets = open_evaluation(named, image_size=image_size, class_folders=class_folders, loader_config=config)
    except ValueError as error:
        message = str(error).replace("--data", "--eval")
        raise ValueError(message if message.startswith("--eval") else f"--eval: {message}") from None
    if VALIDATION in sets:
        raise ValueError(f"--eval: the validation images are called {VALIDATION}: choose another name")
    return Watched(validation, sets, str(config.device).partition(":")[0])


def comparison(before: Mapping[str, float], after: Mapping[str, float], started_from: str) -> list[str]:
    """A small table: where the run started, where it ended, and the difference, by set.

    Args:
        before: accuracies of the model before training, percent.
        after: those of the best checkpoint.
        started_from: heading of the first column.

    Returns:
        The lines of the table; none without sets.
    """
    width, column = max((len(name) for name in after), default=0), max(10, len(started_from))
    lines = [f"{'':{width}}  {started_from:>{column}}  fine-tuned   change"]
    for name, value in after.items():
        lines.append(f"{name:{width}}  {before[name]:>{column - 2}.2f} %  {value:>8.2f} %  {value - before[name]:>+7.2f}")
    return lines if after else []


def accuracy_lines(name: str, scores: Mapping[str, float], images: Mapping[str, int]) -> list[str]:
    """Lines about a model before training.

    Args:
        name: of the model.
        scores: accuracies by set, percent.
        images: of each set.

    Returns:
        A line per set.
    """
    return [
        f"{name} accuracy on the {images[VALIDATION]} validation images: {value:.2f} %"
        if of == VALIDATION
        else f"{name} accuracy on {of} ({images[of]} images): {value:.2f} %"
        for of, value in scores.items()
    ]


def diverged(
    records: Sequence[Mapping[str, Any]], *, classes: int, before: float | None, images: int, lr: float, weight: float
) -> str | None:
    """Say how a run went astray, or None where it did not.

    It did where its last steps had no finite loss, or where the loss of its training images ended above that of guessing and
    far above where it began, and the last epoch's validation accuracy is below the one at the start by more than chance
    explains. Without validation images the loss must be further up: batches of a few images are noisy.

    Args:
        records: lines of the log, in order; their `loss` is that of all processes.
        classes: number of classes K; guessing has a loss of `weight` log K.
        before: validation accuracy before training, percent; None without validation images.
        images: number of validation images.
        lr: the peak learning rate, for the advice.
        weight: of the cross-entropy in the loss; with 0 only the finite losses are looked at.

    Returns:
        The message for the user, or None.
    """
    losses = [record["loss"] for record in records if "loss" in record]
    tail = losses[-max(LEAST_TAIL, len(losses) // 10) :]
    finite = [loss for loss in tail if loss is not None]
    advice = f"; nothing is called best: start again with a lower --lr (it was {lr:g}) and --overwrite"
    if len(tail) >= LEAST_TAIL and not finite:
        return f"the run diverged: the loss or the gradients were not finite in its last steps{advice}"
    begun = next((loss for loss in losses if loss is not None), None)
    if begun is None or not finite or not weight:
        return None
    ended, guessing = mean(finite), weight * math.log(classes)
    epochs = [record["accuracy"][VALIDATION] for record in records if VALIDATION in record.get("accuracy", {})]
    if before is None or not epochs:
        astray = len(losses) > LEAST_TAIL and ended > UNSEEN * max(guessing, begun)
    else:
        astray = ended > max(guessing, FAR_ABOVE_START * begun) and before - epochs[-1] > chance(before, images)
    if not astray:
        return None
    return (
        f"the run diverged: the loss of the training images was {begun:.2f} at the start and {ended:.2f} at the end, "
        f"above the {guessing:.2f} of guessing{advice}"
    )


def chance(accuracy: float, images: int) -> float:
    """Three standard deviations of an accuracy that was measured on so many images, in points of percent."""
    share = min(max(accuracy / 100, 1 / (images + 1)), images / (images + 1))
    return 300 * math.sqrt(share * (1 - share) / images)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where it could not be written."""
    try:
        text = (out / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # a line that a kill has cut off
            continue
    return found

"""The figures of an audit: accuracies, reliance on context and object, confusions, each with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cammask_fast.audit.answers import Answers
from cammask_fast.audit.trials import TESTS, Trials
from cammask_fast.evaluate import CALIBRATION_BINS

CONTEXT, OBJECT = "context_reliance", "object_reliance"
LEVEL = 0.95
RESAMPLES = 2000
MOST_NAMED = 3
"""Classes that are named as confusions or as capturing."""
CHUNK = 100
"""Resamples of a matrix product."""


class Interval(NamedTuple):
    """A figure and its bootstrap interval; None where too few images leave none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def bounds(self) -> list[float] | None:
        """Low and high, as JSON has them."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def bootstrap(columns: Mapping[str, NDArray[np.float64]], *, seed: int, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Means over images with percentile intervals, all from the same resampled images.

    Args:
        columns: float64 (N,) by name, a value per image.
        seed: of the resampled images.
        resamples: how many.

    Returns:
        Mean and 95 % interval by name; no interval for a single image.
    """
    names, matrix = list(columns), np.stack(list(columns.values()), 1)
    count = len(matrix)
    means = matrix.mean(0)
    if count < 2:
        return {name: Interval(float(mean)) for name, mean in zip(names, means, strict=True)}
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = []
    for start in range(0, resamples, CHUNK):
        times = generator.multinomial(count, np.full(count, 1 / count), size=min(CHUNK, resamples - start))
        drawn.append(times @ matrix / count)
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: Interval(float(m), float(a), float(b)) for name, m, a, b in zip(names, means, low, high, strict=True)}


def calibration_error(answers: Answers, labels: Tensor) -> float:
    """Expected calibration error in percent over 15 equal bins of confidence, as in `evaluate`. labels: int64 (N,)."""
    right = (answers.predicted == labels[:, None]).flatten().double()
    confidence = answers.confidence.flatten()
    bin_index = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bin_index, confidence - right)
    return 100.0 * float(gap.abs().sum()) / len(right)


@dataclass(frozen=True, kw_only=True)
class ClassFindings:
    """Of one class. Accuracies in percent by test; reliance as differences of probability."""

    images: int
    left_out: int
    accuracy: dict[str, float]
    reliance: dict[str, Interval]
    """`context_reliance`, where it is known, and `object_reliance`; empty for a class without audited images."""
    confused_with: dict[str, float]
    """Where images that are right as they are go under the context of other classes: shares of their counterfactuals."""
    captured_by: dict[str, float]
    """Classes whose context turns the answer to one of their group: shares of the counterfactuals with that context."""
    captures: float | None
    """Share of other classes' counterfactuals with this class's context whose answer turns to its group."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "images": self.images, "left_out": self.left_out, "accuracy": self.accuracy,
            **{name: self.reliance[name].value if name in self.reliance else None for name in (CONTEXT, OBJECT)},
            "interval": {name: one.bounds() for name, one in self.reliance.items()},
            "confused_with": self.confused_with, "captured_by": self.captured_by, "captures": self.captures,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an audit found about one model. Accuracies and calibration errors in percent, reliance as probability."""

    images: int
    accuracy: dict[str, Interval]
    """By test."""
    probability: dict[str, Interval]
    """Of the true class, by test."""
    calibration_error: dict[str, float]
    """By test."""
    reliance: dict[str, Interval]
    """`context_reliance`, where there are images of several groups, and `object_reliance`."""
    classes: dict[str, ClassFindings]
    per_image: dict[str, NDArray[np.float64]]
    """float64 (N,) by figure: what is paired when two models are compared."""
    seed: int

    @property
    def context_reliance(self) -> float | None:
        """Mean drop of the true class's probability under other classes' context, beyond that under its own class's."""
        return self.reliance[CONTEXT].value if CONTEXT in self.reliance else None

    @property
    def object_reliance(self) -> float | None:
        """Mean drop of the true class's probability without the object, beyond that with as many random patches filled."""
        return self.reliance[OBJECT].value

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it: `accuracy`, `context_reliance`, `object_reliance`, `interval`, `classes`."""
        return {
            "accuracy": {
                test: {
                    "accuracy": self.accuracy[test].value, "probability": self.probability[test].value,
                    "calibration_error": self.calibration_error[test], "images": self.images,
                }
                for test in self.accuracy
            },
            CONTEXT: self.context_reliance, OBJECT: self.object_reliance,
            "interval": {
                **{name: one.bounds() for name, one in self.reliance.items()},
                "accuracy": {test: one.bounds() for test, one in self.accuracy.items()},
            },
            "classes": {name: one.to_dict() for name, one in self.classes.items()},
        }  # fmt: skip


def findings(trials: Trials, answers: Mapping[str, Answers], class_names: Sequence[str], *, seed: int = 0) -> Findings:
    """Summarise a model's answers.

    Args:
        trials: the tests.
        answers: from `ask`.
        class_names: of the labels, C.
        seed: of the bootstrap; models of one comparison share it.

    Returns:
        The figures, overall and for every class that has images.
    """
    labels = trials.labels[: trials.audited]
    figures = _figures(answers, labels)
    whole = bootstrap(figures, seed=seed)
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    lost = _left_out(trials, len(class_names))
    captured = _captured(trials, answers)
    classes = {}
    for label, name in enumerate(class_names):
        if not counts[label] and not lost[label]:
            continue
        rows = (labels == label).numpy()
        own = bootstrap({key: values[rows] for key, values in figures.items()}, seed=seed) if counts[label] else {}
        classes[name] = ClassFindings(
            images=counts[label], left_out=lost[label],
            accuracy={test: own[f"accuracy {test}"].value or 0.0 for test in answers} if own else {},
            reliance={key: own[key] for key in (CONTEXT, OBJECT) if key in own},
            confused_with=_named(_confusions(answers, labels, label, len(class_names)), class_names),
            captured_by=_named(captured.by(label), class_names), captures=captured.share(label),
        )  # fmt: skip
    return Findings(
        images=trials.audited,
        accuracy={test: whole[f"accuracy {test}"] for test in answers},
        probability={test: whole[f"probability {test}"] for test in answers},
        calibration_error={test: calibration_error(one, labels) for test, one in answers.items()},
        reliance={key: whole[key] for key in (CONTEXT, OBJECT) if key in whole},
        classes=classes, per_image=figures, seed=seed,
    )  # fmt: skip


def _figures(answers: Mapping[str, Answers], labels: Tensor) -> dict[str, NDArray[np.float64]]:
    """Every figure that is a mean over images, float64 (N,) by name: the mean over each image's draws."""
    found = {}
    for test in (name for name in TESTS if name in answers):
        right = (answers[test].predicted == labels[:, None]).double().mean(1)
        found[f"accuracy {test}"] = (100.0 * right).numpy()
        found[f"probability {test}"] = answers[test].truth.mean(1).numpy()
    if "other_context" in answers:  # the drops from the clean image, one minus the other
        found[CONTEXT] = found["probability same_context"] - found["probability other_context"]
    found[OBJECT] = found["probability random_filled"] - found["probability object_filled"]
    return found


def _left_out(trials: Trials, classes: int) -> list[int]:
    """Images that are not audited, by label."""
    audited = torch.bincount(trials.labels[: trials.audited], minlength=classes)
    return (trials.counts(classes) - audited).tolist()


def _confusions(answers: Mapping[str, Answers], labels: Tensor, label: int, classes: int) -> dict[int, float]:
    """Share of the counterfactuals of images that are right as they are, by what else they are taken for."""
    if "other_context" not in answers:
        return {}
    rows = (labels == label) & (answers["clean"].predicted[:, 0] == label)
    predicted = answers["other_context"].predicted[rows].flatten()
    times = torch.bincount(predicted, minlength=classes).tolist()
    return {other: count / len(predicted) for other, count in enumerate(times) if count and other != label}


class _Captured(NamedTuple):
    """Draws with another class's context, one entry each: labels of image and donor, and whether the answer turned to the
    donor's group."""

    labels: Tensor
    donors: Tensor
    turned: Tensor

    def by(self, label: int) -> dict[int, float]:
        """Share of the draws of a class that turned, by the donor's class."""
        rows = self.labels == label
        found = {
            donor: self.turned[rows & (self.donors == donor)].double().mean() for donor in self.donors[rows].unique().tolist()
        }
        return {donor: float(share) for donor, share in found.items() if share > 0}

    def share(self, donor: int) -> float | None:
        """Share of all draws with a class's context that turned; None without any."""
        rows = self.donors == donor
        return float(self.turned[rows].double().mean()) if rows.any() else None


def _captured(trials: Trials, answers: Mapping[str, Answers]) -> _Captured:
    if "other_context" not in answers:
        return _Captured(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    donors = trials.donor_labels("other_context")
    labels = trials.labels[: trials.audited, None].expand_as(donors)
    wanted = trials.groups[donors]
    turned = (trials.groups[answers["other_context"].predicted] == wanted) & (
        trials.groups[answers["clean"].predicted] != wanted
    )
    return _Captured(labels.flatten(), donors.flatten(), turned.flatten())


def _named(shares: Mapping[int, float], names: Sequence[str]) -> dict[str, float]:
    """The largest shares by class name."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:MOST_NAMED]
    return {names[label]: share for label, share in largest}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model minus another on the same counterfactuals: differences with paired intervals, by figure and by class."""

    differences: dict[str, Interval]
    """`context_reliance`, `object_reliance`, and `accuracy TEST` in points."""
    classes: dict[str, dict[str, float]]
    """Differences of reliance by class."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "difference": {name: one.value for name, one in self.differences.items()},
            "interval": {name: one.bounds() for name, one in self.differences.items()},
            "classes": self.classes,
        }


def compare(one: Findings, other: Findings) -> Comparison:
    """The differences of two models' figures, image by image.

    Args:
        one: the first model.
        other: the second, asked the same tests.

    Returns:
        First minus second, with intervals over the same resampled images.

    Raises:
        ValueError: the two come from different tests.
    """
    if one.images != other.images or one.seed != other.seed or one.per_image.keys() != other.per_image.keys():
        raise ValueError("the two models were asked different tests: compare them on the same trials")
    columns = {
        name: values - other.per_image[name] for name, values in one.per_image.items() if not name.startswith("probability")
    }
    classes = {
        name: {
            key: float(found.reliance[key].value or 0.0) - float(other.classes[name].reliance[key].value or 0.0)
            for key in found.reliance
        }
        for name, found in one.classes.items()
    }
    return Comparison(differences=bootstrap(columns, seed=one.seed), classes=classes)

"""An audit from images to findings, for one model or two on the same tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast.audit.answers import Answers, ask, object_masks
from cammask_fast.audit.figures import Comparison, Findings, compare, findings
from cammask_fast.audit.trials import Trials, build_trials
from cammask_fast.cam.localisation import object_patches
from cammask_fast.model.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Settings of an audit. cam, start_layer, share: of the map that tells object from context, see `object_masks`. donors:
    contexts per image and test. images: at most, chosen evenly over the classes. seed: of all draws."""

    cam: str = "mm-cam"
    start_layer: int = 0
    share: float = 0.5
    donors: int = 4
    images: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"--object-share: expected a share between 0 and 1, got {self.share}")
        for option, value, least in (("contexts", self.donors, 1), ("images", self.images, 2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"--{option}: expected {least} or more, got {value}")


class Audited(NamedTuple):
    """An audit of one model, or of two on the same tests. names: of the models. class_names: of the labels."""

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    trials: Trials
    answers: tuple[dict[str, Answers], ...]
    findings: tuple[Findings, ...]
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """The first model's findings as JSON has them; of two models also the other's, and the differences."""
        record = self.findings[0].to_dict()
        if self.comparison is not None:
            record |= {"against": self.findings[1].to_dict(), "comparison": self.comparison.to_dict()}
        return record


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The images of an audit. images: uint8 (M, S, S, 3). labels: int64 (M,). class_names: of the labels, C. logits: int64
    (K,), for each logit the label for which it is right, or -1 where it does not count; None: its index. groups: int64 (C,),
    classes that share a context have one number; None: every class is a group."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    logits: Tensor | None = None
    groups: Tensor | None = None
    coverage: Tensor | None = None
    """float32 (M, S, S) in [0, 1], the object's share of each pixel; None: the object is where the map is highest."""


def audit_models(
    models: Sequence[tuple[str, Classifier]], subject: Subject, config: AuditConfig, *, maps_by: Classifier | None = None,
    dtype: torch.dtype = torch.float32, progress: Callable[[int, int], None] | None = None,
) -> Audited:  # fmt: skip
    """Audit one model, or two on the same counterfactuals.

    Args:
        models: names and classifiers of one image size, in float32; the logits of all are the subject's.
        subject: the images.
        config: settings.
        maps_by: whose maps tell object from context; None: the first model's.
        dtype: in which the models answer.
        progress: called with the passes over the images done and in total.

    Returns:
        Tests, answers and findings.

    Raises:
        ValueError: models of different image sizes, or images that cannot be audited.
    """
    first, shown = models[0][1], maps_by or models[0][1]
    for name, model in [*models, ("the model of the maps", shown)]:
        size = model.visual.config.image_size
        if size != subject.images.shape[1]:
            raise ValueError(f"{name} takes {size} pixels and {models[0][0]} {subject.images.shape[1]}: expected the same")
    if subject.coverage is None:
        masks = object_masks(
            shown, subject.images, subject.labels, cam=config.cam, start_layer=config.start_layer, share=config.share,
            groups=subject.logits,
        )  # fmt: skip
    else:
        masks = object_patches(subject.coverage, grid=first.visual.config.grid)
    trials = build_trials(
        subject.images, subject.labels, masks, classes=len(subject.class_names), donors=config.donors, seed=config.seed,
        groups=subject.groups,
    )  # fmt: skip
    answers, found, passes = [], [], sum(map(trials.draws, trials.masks))
    for number, (_, model) in enumerate(models):
        stored = model.stored_in(dtype)
        said = ask(
            stored, trials, groups=subject.logits, device=model.head.weight.device, dtype=dtype,
            progress=None if progress is None else _shifted(progress, number * passes, len(models) * passes),
        )  # fmt: skip
        answers.append(said)
        found.append(findings(trials, said, subject.class_names, seed=config.seed))
    comparison = compare(*found) if len(found) == 2 else None
    names = tuple(name for name, _ in models)
    return Audited(names, subject.class_names, trials, tuple(answers), tuple(found), comparison)


def _shifted(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, total)

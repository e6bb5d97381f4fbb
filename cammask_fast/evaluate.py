"""Accuracy and calibration of classifiers over a loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast import distributed
from cammask_fast.data.types import Batch, Loader
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier

TOP = 5
CALIBRATION_BINS = 15


class Score(NamedTuple):
    """images: evaluated. top1, top5: percent. calibration_error: expected calibration error of the top-1 prediction in percent,
    over 15 equal bins of confidence. per_class: top-1 in percent by label, None for a label without images."""

    images: int
    top1: float
    top5: float
    calibration_error: float
    per_class: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return self._asdict()


class AccuracyMeter:
    """Counts on the device, read once at the end.

    groups: int64 (K,), for each logit the label for which it is right, or -1 for a logit that does not count: a prediction is
    the largest logit that counts, and it is right if its group is the label. Labels are below `classes`.
    """

    def __init__(self, groups: Tensor, classes: int):
        self.counted = (groups >= 0).nonzero()[:, 0]
        self.groups = groups[self.counted]
        device = groups.device
        self.of_class = torch.zeros((3, classes), dtype=torch.int64, device=device)
        """Images, right at top 1, right in the top 5, by label."""
        self.bins = torch.zeros((3, CALIBRATION_BINS), dtype=torch.float64, device=device)
        """Images, sum of confidences, right, by confidence."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits: (N, K). labels: int64 (N,)."""
        probabilities = logits[:, self.counted].float().softmax(1)
        finite = probabilities.isfinite().all(1, keepdim=True)  # a model that diverged predicts nothing
        probabilities = torch.where(finite, probabilities, 0.0)
        confidence, best = probabilities.topk(min(TOP, len(self.counted)), 1)
        right = (self.groups[best] == labels[:, None]) & finite
        counts = torch.stack([torch.ones_like(right[:, 0]), right[:, 0], right.any(1)]).long()
        self.of_class.index_add_(1, labels, counts)
        bin_index = (confidence[:, 0] * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        sums = torch.stack([torch.ones_like(confidence[:, 0]), confidence[:, 0], right[:, 0].float()]).double()
        self.bins.index_add_(1, bin_index, sums)

    def score(self) -> Score:
        """Over all processes. Raises ValueError when nothing was added."""
        of_class, bins = distributed.all_reduce_sum(self.of_class).tolist(), distributed.all_reduce_sum(self.bins)
        images, right, in_top = (sum(row) for row in of_class)
        if not images:
            raise ValueError("no images to evaluate")
        gap = (bins[1] - bins[2]).abs().sum().item() / images
        per_class = tuple(100.0 * hit / count if count else None for count, hit in zip(of_class[0], of_class[1], strict=True))
        return Score(images, 100.0 * right / images, 100.0 * in_top / images, 100.0 * gap, per_class)


class Predicted(NamedTuple):
    """What a model said of every image, in the order of the samples; on the CPU.

    sample_ids, labels: int64 (M,). logits: int64 (M,), the index of the largest logit that counts. groups: int64 (M,), the
    label that it stands for. probabilities: float32 (M,), its share among the logits that count.
    """

    sample_ids: Tensor
    labels: Tensor
    logits: Tensor
    groups: Tensor
    probabilities: Tensor

    def confusion(self, classes: int) -> Tensor:
        """int64 (classes, classes + 1): images of label i that were taken for label j; in the last column for none of them."""
        predicted = torch.where(self.groups < classes, self.groups, classes)
        cells = self.labels * (classes + 1) + predicted
        return torch.bincount(cells, minlength=classes * (classes + 1)).view(classes, classes + 1)


class PredictionLog:
    """Keeps the prediction for every image that is evaluated. groups: as for `AccuracyMeter`."""

    def __init__(self, groups: Tensor):
        self.groups = groups
        self.parts: list[tuple[Tensor, ...]] = []

    def __call__(self, batch: Batch, logits: Tensor) -> None:
        """Add a batch; waits for the device."""
        counted = (self.groups >= 0).nonzero()[:, 0].to(logits.device)
        probability, best = logits[:, counted].float().softmax(1).max(1)
        self.parts.append(tuple(one.cpu() for one in (batch.sample_ids, batch.labels, counted[best], probability)))

    def result(self) -> Predicted:
        """Those of all processes."""
        parts = [part for of_rank in distributed.all_gather_object(self.parts) for part in of_rank]
        ids, labels, logits, probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
        order = ids.argsort(stable=True)
        return Predicted(ids[order], labels[order], logits[order], self.groups[logits[order]], probabilities[order])


@torch.no_grad()
def evaluate(
    models: Sequence[Classifier],
    loader: Loader,
    *,
    groups: Tensor | None = None,
    classes: int | None = None,
    device: torch.device | str = "cpu",
    seen: Callable[[Batch, Tensor], None] | None = None,
) -> list[Score]:
    """Score several models in one pass over the data: every model sees each decoded batch.

    Args:
        models: classifiers of one architecture, run in the precision they are stored in.
        loader: its ranks share the images; the scores are those of all.
        groups: int64 (K,), see `AccuracyMeter`; None: each logit is right for the label of its index.
        classes: number of labels; None: as many as logits.
        device: of the models.
        seen: gets every batch, on the device, with the first model's logits (N, K), see `PredictionLog`.

    Returns:
        A score per model.

    Raises:
        ValueError: the loader is empty.
    """
    outputs = models[0].head.weight.shape[0]
    groups = (torch.arange(outputs) if groups is None else groups).to(device)
    tallies = [AccuracyMeter(groups, classes or outputs) for _ in models]
    for batch in loader:
        distributed.heartbeat("evaluation")
        batch = batch.to(device)
        dtype = models[0].visual.conv1.weight.dtype
        images = normalise(batch.images, dtype=dtype)
        for index, (model, tally) in enumerate(zip(models, tallies, strict=True)):
            logits = model(images).logits
            tally.add(logits, batch.labels)
            if seen is not None and index == 0:
                seen(batch, logits)
    return [tally.score() for tally in tallies]


def accuracy(model: Classifier, loader: Loader, *, device: torch.device | str = "cpu") -> float:
    """Top-1 accuracy of a classifier.

    Args:
        model: the classifier.
        loader: its ranks share the images.
        device: of the model.

    Returns:
        Percent.

    Raises:
        ValueError: the loader is empty.
    """
    return evaluate([model], loader, device=device)[0].top1


@torch.no_grad()
def confusion_counts(model: Classifier, loader: Loader, *, device: torch.device | str = "cpu") -> Tensor:
    """Count which class a classifier takes for which, on this process's share of the loader.

    Args:
        model: the classifier.
        loader: of labelled images.
        device: of the model.

    Returns:
        int64 (K, K) on the CPU: images of class i that the model takes for class j.
    """
    classes = model.head.weight.shape[0]
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for batch in loader:
        batch = batch.to(device)
        predicted = model(normalise(batch.images)).logits.argmax(1)
        pairs = batch.labels * classes + predicted
        counts.index_add_(0, pairs, torch.ones_like(pairs))
    return counts.view(classes, classes).cpu()

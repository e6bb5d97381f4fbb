"""What classifiers say to counterfactual tests, and object masks from their own maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast import distributed
from cammask_fast.audit.trials import TESTS, Trials
from cammask_fast.cam import relevance_of
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.patch_select import patch_select
from cammask_fast.model.classifier import Classifier

TOKENS_OF_A_GRAPH = 4096
"""Tokens whose activations the graph of a map holds at a time."""
Logits = Callable[[Tensor], Tensor]
"""From normalised pixels (n, 3, H, W) to logits (n, K)."""


class Answers(NamedTuple):
    """To one test, on the CPU. truth: float64 (N, D), the probability of the true class. predicted: int64 (N, D), the label of
    the largest logit. confidence: float64 (N, D), its probability."""

    truth: Tensor
    predicted: Tensor
    confidence: Tensor


@torch.no_grad()
def ask(
    model: Classifier | Logits, trials: Trials, *, groups: Tensor | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:  # fmt: skip
    """Put every counterfactual to a classifier.

    Args:
        model: a classifier, or any function from normalised pixels to logits.
        trials: the tests.
        groups: int64 (K,), for each logit the label for which it is right, or -1 where it does not count; None: its index.
        device: of the model.
        dtype: of the pixels.
        progress: called with the passes over the images done and in total.

    Returns:
        Answers by test, in the order of `TESTS`.

    Raises:
        ValueError: the model's logits are not finite.
    """
    logits_of: Logits = (lambda pixels: model(pixels).logits) if isinstance(model, Classifier) else model
    labels = trials.labels[: trials.audited]
    shown = replace(trials, pool=trials.pool.to(device))
    found: dict[str, Answers] = {}
    total, done = sum(trials.draws(test) for test in trials.masks), 0
    for test in (name for name in TESTS if name in trials.masks):
        columns = []
        for draw in range(trials.draws(test)):
            distributed.heartbeat("audit")
            parts = [
                _read(logits_of(pixels), labels[chunk], groups) for chunk, pixels in shown.batches(test, draw, dtype=dtype)
            ]
            columns.append([torch.cat(one) for one in zip(*parts, strict=True)])
            done += 1
            if progress is not None:
                progress(done, total)
        found[test] = Answers(*(torch.stack(one, 1) for one in zip(*columns, strict=True)))
    return found


def _read(logits: Tensor, labels: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Probability of the label, predicted label and its probability, each (n,), of logits (n, K)."""
    logits = logits.double().cpu()
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or the training diverged")
    groups = torch.arange(logits.shape[1]) if groups is None else groups.cpu()
    counted = (groups >= 0).nonzero()[:, 0]
    probabilities = logits[:, counted].softmax(1)
    stands_for = groups[counted]
    truth = (probabilities * (stands_for == labels[:, None])).sum(1)
    confidence, best = probabilities.max(1)
    return truth, stands_for[best], confidence


def object_masks(
    model: Classifier, images: Tensor, labels: Tensor, *, cam: str = "mm-cam", start_layer: int = 0, share: float = 0.5,
    groups: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The patches that a model's map marks most, as the object.

    Args:
        model: its map at the true class is taken.
        images: uint8 (M, H, W, 3).
        labels: int64 (M,).
        cam: which map, as for `relevance_of`.
        start_layer: first layer of the map.
        share: of the patches that count as the object, rounded down, at least one and never all of them.
        groups: as for `ask`; of several logits of a label the largest is explained.

    Returns:
        bool (M, P) on the CPU; patches of zero relevance are not marked.

    Raises:
        ValueError: an unknown map, a share outside (0, 1), or a map that is not finite.
    """
    if not 0 < share < 1:
        raise ValueError(f"share of the object: expected a value between 0 and 1, got {share}")
    patches, device = model.visual.config.patches, model.head.weight.device
    k = min(max(1, int(patches * share)), patches - 1)
    chunk = max(1, TOKENS_OF_A_GRAPH // (patches + 1))
    found = []
    for some, their in zip(images.split(chunk), labels.split(chunk), strict=True):
        distributed.heartbeat("audit")
        pixels = some.to(device)
        explained = their.to(device) if groups is None else _explained(model, pixels, their, groups)
        relevance = relevance_of(model, pixels, explained, cam, start_layer=start_layer)
        if not relevance.isfinite().all():
            raise ValueError("the map of an image is not finite: the weights are damaged")
        mask = patch_select(relevance, top_k=k).mask & (relevance > 0)  # ties at zero are no object
        found.append(mask.cpu())
    return torch.cat(found) if found else torch.zeros(0, patches, dtype=torch.bool)


@torch.no_grad()
def _explained(model: Classifier, pixels: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """int64 (n,): for each image the largest of the logits that stand for its label."""
    logits = model(normalise(pixels)).logits
    stands = groups.to(logits.device) == labels.to(logits.device)[:, None]
    return logits.masked_fill(~stands, -torch.inf).argmax(1)

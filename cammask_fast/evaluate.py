"""Accuracy of a classifier over a loader."""

from __future__ import annotations

import torch

from cammask_fast.data.batch import Loader
from cammask_fast.kernels.masked_fill import normalise
from cammask_fast.model.classifier import Classifier


@torch.no_grad()
def accuracy(model: Classifier, loader: Loader, *, device: torch.device | str = "cpu") -> float:
    """Top-1 accuracy in percent. One device synchronisation, at the end. Raises ValueError on an empty loader."""
    right = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    for batch in loader:
        batch = batch.to(device)
        logits = model(normalise(batch.images, dtype=model.visual.conv1.weight.dtype)).logits
        right += (logits.argmax(1) == batch.labels).sum()
        count += len(batch.labels)
    if not count:
        raise ValueError("no images to evaluate")
    return 100.0 * right.item() / count

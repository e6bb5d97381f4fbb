"""How well a CAM finds an object whose location is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.kernels.reference import normalise_relevance


class Localisation(NamedTuple):
    """Means over images, in percent. energy: share of the relevance on patches that touch the object. masked: share of the
    object-masked patches (normalised relevance > threshold) that touch it. area: the object's share of the patches, which a
    map that ignores the image would score."""

    energy: float
    masked: float
    area: float


def object_patches(coverage_NHW: Tensor, *, grid: int) -> Tensor:
    """Patches that the object touches: more than 5 % of the pixels covered. Coverage in [0, 1]; returns bool (N, P)."""
    return F.adaptive_avg_pool2d(coverage_NHW[:, None], grid).flatten(1) > 0.05


def localisation(relevance_NP: Tensor, object_NP: Tensor, *, threshold: float) -> Localisation:
    """How much of a map lies on the object.

    Args:
        relevance_NP: float (N, P), not negative. A map of zeros counts as spread evenly.
        object_NP: bool (N, P), patches that touch the object.
        threshold: of the object mask, on the normalised map.

    Returns:
        Means over the images, in percent.
    """
    on_object = object_NP.to(relevance_NP.dtype)
    area = on_object.mean(1)
    total = relevance_NP.sum(1)
    energy = torch.where(total > 0, (relevance_NP * on_object).sum(1) / total.clamp_min(1e-30), area)
    masked = normalise_relevance(relevance_NP) > threshold
    hit = (masked & object_NP).sum(1) / masked.sum(1).clamp_min(1)
    share = torch.where(masked.any(1), hit, area)
    return Localisation(*(100 * value.mean().item() for value in (energy, share, area)))

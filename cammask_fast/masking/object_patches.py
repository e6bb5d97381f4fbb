"""Which patches of a map are the object: by value, percentile, Otsu's criterion or rank; and the boxes around them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.kernels.reference.patch_select import highest
from cammask_fast.strategy import Cut, Strategy


class Box(NamedTuple):
    """A box in patches; right and bottom lie outside. patches: how many of its component it holds."""

    left: int
    top: int
    right: int
    bottom: int
    patches: int

    def in_window(self, window: tuple[float, float, float, float], grid: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels. window: where the grid lies, likewise; grid: patches per side."""
        left, top, right, bottom = window
        across, down = (right - left) / grid, (bottom - top) / grid
        edges = left + self.left * across, top + self.top * down, left + self.right * across, top + self.bottom * down
        return tuple(round(edge) for edge in edges)  # type: ignore[return-value]


def object_patches(relevance_NP: Tensor, cut: Cut) -> Tensor:
    """The object of each image by a rule.

    Args:
        relevance_NP: float (N, P), not negative, not normalised.
        cut: the rule. A value is compared with the map divided by its maximum; a percentile, interpolated between patches, and
            Otsu's threshold are the image's own, and patches above them are the object; of equal patches the top-k are those
            with the lower index.

    Returns:
        bool (N, P). A map that is the same everywhere has no object but by value and by rank.

    Raises:
        ValueError: more patches than the map has.
    """
    patches = relevance_NP.shape[1]
    if cut.rule == "value":
        return normalise_relevance(relevance_NP) > cut.number
    if cut.rule == "percentile":
        return relevance_NP > torch.quantile(relevance_NP, cut.number / 100, dim=1, keepdim=True)
    if cut.rule == "otsu":
        return relevance_NP > otsu(relevance_NP)[:, None]
    k = Strategy(selection="object", fill="none", top_k=int(cut.number) if cut.rule == "top" else None,
                 top_share=cut.number if cut.rule == "share" else None).k(patches)  # fmt: skip
    return highest(relevance_NP, k)


def otsu(values_NP: Tensor) -> Tensor:
    """Otsu's threshold of each row: the highest value of the lower class where the variance between the classes is largest.

    Exact, from the values themselves and no histogram. Source: Otsu, A threshold selection method from gray-level histograms.

    Args:
        values_NP: float (N, P).

    Returns:
        (N,), in the dtype of the values; a row of equal values has that value.
    """
    values, count = values_NP.double().sort(dim=1).values, values_NP.shape[1]
    below = torch.arange(1, count, device=values.device, dtype=torch.float64)
    sums = values.cumsum(1)
    means = sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / (count - below)
    between = below * (count - below) * (means[1] - means[0]) ** 2
    between = torch.where(values[:, 1:] > values[:, :-1], between, -1.0)  # equal values stay together
    last = torch.where(between.amax(1) < 0, count - 1, between.argmax(1))
    return values.gather(1, last[:, None])[:, 0].to(values_NP.dtype)


def component_boxes(mask_GG: Tensor) -> list[Box]:
    """The boxes of a mask's components, whose patches share an edge; the largest component first, equal ones in reading order.

    Args:
        mask_GG: bool (G, G).

    Returns:
        A box per component.
    """
    labelled, _ = ndimage.label(mask_GG.cpu().numpy())
    boxes = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labelled), 1):
        size = int((labelled == label).sum())
        boxes.append(Box(columns.start, rows.start, columns.stop, rows.stop, size))
    return sorted(boxes, key=lambda box: -box.patches)

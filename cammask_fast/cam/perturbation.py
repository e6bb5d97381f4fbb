"""How much a CAM says about its model: what becomes of the prediction when pixels are removed in the order of the map.

No masks are needed. `logits_of` maps normalised images (N, 3, S, S) to logits (N, K); `labels` are the explained classes, int64
(N,); a map is float (N, S, S), a value per pixel. All images of a batch are changed at once, on their device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from cammask_fast.cam.imputation import impute
from cammask_fast.kernels.normalise import normalise

Logits = Callable[[Tensor], Tensor]
BLUR_LENGTH, BLUR_SIGMA = 11, 5.0
"""Pixels, of RISE's Gaussian blur."""
PERCENTS = (10, 20, 30, 40, 50, 60, 70, 80, 90)
NOISE = 0.01
"""Standard deviation of ROAD's noise, in normalised pixels."""


class Curves(NamedTuple):
    """Probabilities of the explained class, float64 (N, steps + 1), from no pixel changed to all of them."""

    insertion: Tensor
    deletion: Tensor


def area_under(curve: Tensor) -> Tensor:
    """Area under curves (N, T) with equal steps by the trapezoid rule, over a width of 1: (N,)."""
    return (curve.sum(1) - (curve[:, 0] + curve[:, -1]) / 2) / (curve.shape[1] - 1)


def pixel_order(map_NHW: Tensor, *, lowest_first: bool = False) -> Tensor:
    """The rank of each pixel in the order of the map, int64 (N, H, W): 0 for the highest, or the lowest; ties in the order of
    the pixels."""
    flat = map_NHW.flatten(1)
    order = flat.argsort(dim=1, descending=not lowest_first, stable=True)
    ranks = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks).view(map_NHW.shape)


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax probability of each image's label, float64 (N,)."""
    return logits.double().softmax(1).gather(1, labels[:, None])[:, 0]


def insertion_deletion(
    logits_of: Logits, pixels: Tensor, labels: Tensor, map_NHW: Tensor, *, steps: int | None = None
) -> Curves:
    """RISE's insertion and deletion (Petsiuk et al., section 4.2): the highest pixels first, over a blurred image, or replaced
    by the mean colour.

    Args:
        logits_of: the model.
        pixels: normalised images (N, 3, S, S).
        labels: explained classes.
        map_NHW: float (N, S, S).
        steps: in which all pixels are changed; None: S, of S pixels each, as RISE does.

    Returns:
        Curves; `area_under` makes a number of each.

    Raises:
        ValueError: fewer than one step.
    """
    count = map_NHW[0].numel()
    steps = pixels.shape[-1] if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    per_step = -(-count // steps)
    rank = pixel_order(map_NHW)[:, None]
    blurred, mean = blur(pixels), torch.zeros_like(pixels)
    curves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(-(-count // per_step) + 1):
        changed = rank < step * per_step
        for curve, before, after in zip(curves, (blurred, pixels), (pixels, mean), strict=True):
            curve.append(probability(logits_of(torch.where(changed, after, before)), labels))
    return Curves(*(torch.stack(curve, 1) for curve in curves))


def blur(pixels: Tensor) -> Tensor:
    """RISE's blur of images (N, C, H, W): 11 pixels wide, sigma 5, and zero, the mean colour, beyond the borders."""
    kernel = torch.from_numpy(_blur_kernel()).to(pixels)
    channels = pixels.shape[1]
    across = F.conv2d(
        pixels, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, len(kernel) // 2), groups=channels
    )
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(len(kernel) // 2, 0), groups=channels)


@cache
def _blur_kernel() -> NDArray[np.float64]:
    """RISE's: a single one blurred by SciPy, which folds the tails back, so that the kernel sums to 1."""
    impulse = np.zeros(BLUR_LENGTH)
    impulse[BLUR_LENGTH // 2] = 1
    return gaussian_filter1d(impulse, BLUR_SIGMA)


def perturbed_accuracy(
    logits_of: Logits,
    pixels: Tensor,
    labels: Tensor,
    map_NHW: Tensor,
    *,
    lowest_first: bool,
    percents: Sequence[int] = PERCENTS,
) -> Tensor:
    """Chefer's positive and negative perturbation (Transformer Interpretability Beyond Attention Visualization, section 4):
    whether the explained class is still predicted when a share of the pixels is black.

    Args:
        logits_of: the model.
        pixels: normalised images (N, 3, S, S).
        labels: explained classes.
        map_NHW: float (N, S, S).
        lowest_first: negative perturbation, the lowest pixels first; else positive, the highest first.
        percents: shares of the pixels, rounded down to whole pixels.

    Returns:
        bool (N, percents); the mean of `area_under` over images is the figure that is compared.
    """
    rank = pixel_order(map_NHW, lowest_first=lowest_first)[:, None]
    black = normalise(torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=pixels.device), dtype=pixels.dtype)
    count = map_NHW[0].numel()
    found = []
    for percent in percents:
        logits = logits_of(torch.where(rank < count * percent // 100, black, pixels))
        found.append(logits.argmax(1) == labels)
    return torch.stack(found, 1)


def road_changes(
    logits_of: Logits,
    pixels: Tensor,
    labels: Tensor,
    map_NHW: Tensor,
    *,
    lowest_first: bool,
    noise: Tensor,
    percentiles: Sequence[int] = PERCENTS,
) -> Tensor:
    """ROAD (Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, section 4): how the
    probability of the explained class changes when the pixels from a percentile of the map on are replaced by noisy linear
    imputation. The same thresholds as pytorch-grad-cam's: pixels that equal the percentile are removed, too.

    Args:
        logits_of: the model.
        pixels: normalised images (N, 3, S, S).
        labels: explained classes.
        map_NHW: float (N, S, S), in [0, 1].
        lowest_first: LeRF, on 1 - map; else MoRF.
        noise: (N, 3, S, S), added to imputed pixels; `NOISE` times a standard normal one is ROAD's.
        percentiles: of the map; 90 removes the highest tenth of the pixels.

    Returns:
        float64 (N, percentiles), probability afterwards less probability before; the mean over percentiles is what is compared.
    """
    ranked = 1 - map_NHW if lowest_first else map_NHW
    thresholds = percentiles_of(ranked, percentiles)
    before = probability(logits_of(pixels), labels)
    found = []
    for index in range(len(percentiles)):
        removed = ranked.double() >= thresholds[:, index, None, None]
        imputed = impute(pixels, removed) + torch.where(removed[:, None], noise, 0.0)
        found.append(probability(logits_of(imputed.to(pixels.dtype)), labels) - before)
    return torch.stack(found, 1)


def percentiles_of(map_NHW: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Percentiles of each map with linear interpolation between its values, as NumPy has them: float64 (N, percentiles)."""
    values = map_NHW.flatten(1).sort(1).values.double()
    position = torch.tensor([share / 100 * (values.shape[1] - 1) for share in percentiles], dtype=torch.float64)
    below = position.floor()
    weight = (position - below).to(values.device)
    low, high = (at.long().clamp(max=values.shape[1] - 1).to(values.device) for at in (below, below + 1))
    return torch.lerp(values[:, low], values[:, high], weight.expand(len(values), -1))

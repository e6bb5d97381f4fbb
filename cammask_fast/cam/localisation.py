"""How well a CAM finds an object whose location is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.kernels.reference import normalise_relevance

TOLERANCE = 15 / 224
"""Of the pointing game, as a share of the image's side: 15 pixels at 224."""


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
    shares = (
        energy_share(relevance_NP, object_NP), masked_share(relevance_NP, object_NP, threshold=threshold),
        object_NP.to(relevance_NP.dtype).mean(1),
    )  # fmt: skip
    return Localisation(*(100 * value.mean().item() for value in shares))


def energy_share(relevance_NP: Tensor, object_NP: Tensor) -> Tensor:
    """Share of the relevance on the object's patches, (N,); of a map of zeros the object's share of the patches."""
    on_object = object_NP.to(relevance_NP.dtype)
    total = relevance_NP.sum(1)
    return torch.where(total > 0, (relevance_NP * on_object).sum(1) / total.clamp_min(1e-30), on_object.mean(1))


def masked_share(relevance_NP: Tensor, object_NP: Tensor, *, threshold: float) -> Tensor:
    """Share of the object-masked patches on the object.

    Args:
        relevance_NP: float (N, P), not negative.
        object_NP: bool (N, P), patches that touch the object.
        threshold: of the object mask, on the normalised map.

    Returns:
        (N,); where nothing is masked the object's share of the patches.
    """
    masked = normalise_relevance(relevance_NP) > threshold
    hit = (masked & object_NP).sum(1) / masked.sum(1).clamp_min(1)
    return torch.where(masked.any(1), hit.to(relevance_NP.dtype), object_NP.to(relevance_NP.dtype).mean(1))


def to_pixels(relevance_NP: Tensor, size: int, *, upsample: str = "bilinear") -> Tensor:
    """The normalised map at every pixel.

    Args:
        relevance_NP: float (N, P), row-major patches of a square grid.
        size: pixels per side.
        upsample: `bilinear` (as `align_corners=False` has it) or `nearest`.

    Returns:
        (N, size, size) in [0, 1].

    Raises:
        ValueError: for another way to upsample, or patches that are no square grid.
    """
    if upsample not in ("bilinear", "nearest"):
        raise ValueError(f"upsample: expected bilinear or nearest, got {upsample!r}")
    count, patches = relevance_NP.shape
    grid = round(patches**0.5)
    if grid * grid != patches:
        raise ValueError(f"relevance: expected the patches of a square grid, got {patches}")
    maps = normalise_relevance(relevance_NP).view(count, 1, grid, grid)
    return F.interpolate(maps, size=(size, size), mode=upsample)[:, 0]


def pointing_game(map_NHW: Tensor, object_NHW: Tensor, *, tolerance: float) -> Tensor:
    """Whether the highest pixel of a map lies on the object or near it (Zhang et al., Excitation Backprop, section 4.1).

    Args:
        map_NHW: float (N, H, W); of equal pixels the first counts. A map of zeros points nowhere, which is a miss.
        object_NHW: bool (N, H, W).
        tolerance: largest distance to a pixel of the object, in pixels; the game's own is 15 at 224.

    Returns:
        bool (N,).
    """
    height, width = map_NHW.shape[1:]
    highest, where = map_NHW.flatten(1).max(1)
    rows = torch.arange(height, device=map_NHW.device)[None, :, None] - (where // width)[:, None, None]
    columns = torch.arange(width, device=map_NHW.device)[None, None, :] - (where % width)[:, None, None]
    near = rows.square() + columns.square() <= tolerance * tolerance
    return (near & object_NHW).flatten(1).any(1) & (highest > 0)


class Overlap(NamedTuple):
    """Pixels of N images at T thresholds. hit: int64 (N, T), on the object and above the threshold. marked: int64 (N, T), above
    it. object: int64 (N, 1), on the object. pixels: of an image."""

    hit: Tensor
    marked: Tensor
    object: Tensor
    pixels: int

    def iou(self) -> Tensor:
        """float64 (N, T): the object's intersection over union; 1 where neither map nor mask has a pixel."""
        return _ratio(self.hit, self.marked + self.object - self.hit)

    def pixel_accuracy(self) -> Tensor:
        """float64 (N, T): share of the pixels that are above the threshold on the object and not above it elsewhere."""
        wrong = self.marked + self.object - 2 * self.hit
        return 1 - wrong.double() / self.pixels

    def mean_iou(self) -> Tensor:
        """float64 (T,): the mean of the object's and of the background's intersection over union, each summed over the images
        first, as segmentation benchmarks do."""
        hit, marked, on = self.hit.sum(0), self.marked.sum(0), self.object.sum(0)
        pixels = self.pixels * len(self.hit)
        both, either = pixels - (marked + on - hit), pixels - hit  # pixels of the background
        return (_ratio(hit, marked + on - hit) + _ratio(both, either)) / 2


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp_min(1), 1.0)


def overlap(map_NHW: Tensor, object_NHW: Tensor, thresholds_T: Tensor) -> Overlap:
    """Count a map's pixels above thresholds on an object and in all, from one histogram per image.

    Args:
        map_NHW: float (N, H, W).
        object_NHW: bool (N, H, W).
        thresholds_T: (T,), rising, of the map's dtype; a pixel is above one if its value is strictly greater.

    Returns:
        The counts.
    """
    count, bins = len(map_NHW), len(thresholds_T) + 1
    passed = torch.bucketize(map_NHW.flatten(1), thresholds_T)  # how many thresholds a pixel is above
    rows = torch.arange(count, device=map_NHW.device)[:, None] * bins

    def above(cells: Tensor) -> Tensor:
        found = torch.bincount(cells, minlength=count * bins).view(count, bins)
        return found.flip(1).cumsum(1).flip(1)[:, 1:]

    cells, inside = rows + passed, object_NHW.flatten(1)
    return Overlap(above(cells[inside]), above(cells.flatten()), inside.sum(1, keepdim=True), passed.shape[1])

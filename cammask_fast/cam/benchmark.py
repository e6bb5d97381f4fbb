"""All maps and all metrics on one set of images: `cammask cam-bench` and `cf.cam_bench` without their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.cam.localisation import (
    TOLERANCE,
    Overlap,
    energy_share,
    masked_share,
    object_patches,
    overlap,
    pointing_game,
    to_pixels,
)
from cammask_fast.cam.maps import CAMS, relevance_of
from cammask_fast.cam.perturbation import NOISE, PERCENTS, area_under, insertion_deletion, perturbed_accuracy, road_changes
from cammask_fast.config import check_map
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier

RANDOM = "random"
"""A map that ignores the image: independent uniform values. What it scores is chance."""
TOKENS_AT_A_TIME, PIXELS_AT_A_TIME = 8192, 64 * 224 * 224
"""Of the images that are measured together: a map's graph and the imputation's system are in memory at once."""
GRID = tuple(index / 100 for index in range(100))
"""Thresholds among which the best is searched."""


class Metric(NamedTuple):
    """text: what is measured, in a few words. higher: whether a higher figure is the better one; None: it is neither."""

    text: str
    higher: bool | None


WITH_MASKS = {
    "energy": Metric("relevance on the object's patches", True),
    "masked": Metric("masked patches on the object", True),
    "pointing": Metric("pointing game", True),
    "iou": Metric("IoU", True),
    "miou": Metric("mIoU", True),
    "pixel_accuracy": Metric("pixel accuracy", True),
    "best_threshold": Metric("threshold of the best mIoU", None),
    "best_iou": Metric("IoU there", True),
    "best_miou": Metric("mIoU there", True),
    "best_pixel_accuracy": Metric("pixel accuracy there", True),
}
GROUPS: dict[str, dict[str, Metric]] = {
    "masks": WITH_MASKS,
    "insertion-deletion": {
        "insertion": Metric("insertion AUC", True),
        "deletion": Metric("deletion AUC", False),
    },
    "perturbation": {
        "positive": Metric("positive perturbation", False),
        "negative": Metric("negative perturbation", True),
    },
    "road": {
        "road_morf": Metric("ROAD, highest first", False),
        "road_lerf": Metric("ROAD, lowest first", True),
        "road": Metric("ROAD, combined", True),
    },
}
"""Metrics by the name of their group. All are in percent but `best_threshold`."""
METRICS = {name: metric for group in GROUPS.values() for name, metric in group.items()}


@dataclass(frozen=True, kw_only=True)
class MapProtocol:
    """How maps are measured. cams: of `CAMS` and `random`; empty: all. groups: of metrics, of `GROUPS`; empty: all that can be
    measured. start_layer, contrast: of the maps, as for `relevance_of`. upsample: how a map comes to pixels. threshold: of the
    normalised map, for the fixed figures. tolerance: of the pointing game, in pixels at an image side of 224. steps: of
    insertion and deletion; 0: as many as the image has rows, as RISE does. seed: of ROAD's noise and of the random map."""

    cams: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    start_layer: int = 0
    contrast: str = "none"
    upsample: str = "bilinear"
    threshold: float = 0.3
    tolerance: float = 224 * TOLERANCE
    steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("cams", (*CAMS, RANDOM)), ("groups", tuple(GROUPS))):
            unknown = [one for one in getattr(self, name) if one not in known]
            if unknown:
                raise ValueError(f"{name}: unknown {unknown[0]!r}; known: {', '.join(known)}")
        if self.start_layer < 0:
            raise ValueError(f"start_layer: expected 0 or more, got {self.start_layer}")
        check_map(CAMS[0], start_layer=self.start_layer, contrast=self.contrast)
        for cam in (one for one in self.cams if one != RANDOM):
            check_map(cam, start_layer=self.start_layer, contrast=self.contrast)
        if self.upsample not in ("bilinear", "nearest"):
            raise ValueError(f"upsample: expected bilinear or nearest, got {self.upsample!r}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: expected a value in [0, 1), got {self.threshold}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: expected 0 or more pixels, got {self.tolerance}")
        if self.steps < 0:
            raise ValueError(f"steps: expected 1 or more, or 0 for one per row of pixels, got {self.steps}")

    @property
    def chosen_cams(self) -> tuple[str, ...]:
        """The maps, each once; without a choice all that can honour `start_layer` and `contrast`."""
        return tuple(dict.fromkeys(self.cams)) or (*filter(self._fits, CAMS), RANDOM)

    def _fits(self, cam: str) -> bool:
        try:
            check_map(cam, start_layer=self.start_layer, contrast=self.contrast)
        except ValueError:
            return False
        return True

    def chosen_groups(self, *, masks: bool) -> tuple[str, ...]:
        """The groups of metrics in the order of `GROUPS`. Raises ValueError where masks are asked for and there are none."""
        if "masks" in self.groups and not masks:
            raise ValueError("the metrics of masks need known masks of the objects: name the folder of the masks")
        return tuple(name for name in GROUPS if (name in self.groups or not self.groups) and (masks or name != "masks"))

    def passes(self, size: int, *, masks: bool) -> int:
        """Forward passes per image and map at an image side of `size`, beside the map's own."""
        steps = -(-size * size // -(-size * size // (self.steps or size)))
        per_direction = {"masks": 0, "insertion-deletion": steps + 1, "perturbation": len(PERCENTS), "road": len(PERCENTS) + 1}
        return sum(2 * per_direction[group] for group in self.chosen_groups(masks=masks))


class MapScore(NamedTuple):
    """Of one map. values: by metric, see `METRICS`. errors: standard errors of those that are means over images, not for a
    single one. milliseconds: per image, to make the map; 0 for `random`."""

    values: dict[str, float]
    errors: dict[str, float]
    milliseconds: float


def measure_maps(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    coverage: Tensor | None = None,
    protocol: MapProtocol | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, MapScore]:
    """Measure maps of a model.

    Args:
        model: the classifier; images go to its device in chunks.
        images: uint8 (M, S, S, 3), of the model's size.
        labels: int64 (M,), the logit that each map explains.
        coverage: float (M, S, S) in [0, 1], the object's share of each pixel, or bool; more than half is the object. None: not
            known. Every image has some.
        protocol: maps, metrics and settings.
        progress: called with the images done, over all maps, and their number.

    Returns:
        Scores by map.

    Raises:
        ValueError: no images, shapes that do not fit, an image without object, or maps that are not finite.
    """
    protocol = protocol or MapProtocol()
    groups = protocol.chosen_groups(masks=coverage is not None)
    size = model.visual.config.image_size
    _check(images, labels, coverage, size)
    if not groups:
        raise ValueError("nothing to measure: without masks, ask for insertion-deletion, perturbation or road")
    scores = {}
    for index, cam in enumerate(protocol.chosen_cams):
        measured = _Measured(protocol, groups)
        generators = [torch.Generator().manual_seed(protocol.seed + which) for which in range(2)]
        for chunk in _chunks(len(images), model.visual.config.patches + 1, size):
            device = model.head.weight.device
            own = None if coverage is None else coverage[chunk].to(device).float()
            measured.add(model, cam, images[chunk].to(device), labels[chunk].to(device), own, generators)
            if progress is not None:
                progress(index * len(images) + chunk.stop, len(protocol.chosen_cams) * len(images))
        scores[cam] = measured.score()
    return scores


def _check(images: Tensor, labels: Tensor, coverage: Tensor | None, size: int) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
        raise ValueError(f"images: expected uint8 (M, {size}, {size}, 3), got {images.dtype} {tuple(images.shape)}")
    if len(labels) != len(images):
        raise ValueError(f"labels: expected one per image ({len(images)}), got {len(labels)}")
    if coverage is not None:
        if coverage.shape != images.shape[:3]:
            raise ValueError(f"masks: expected {tuple(images.shape[:3])}, got {tuple(coverage.shape)}")
        empty = ~(coverage > 0.5).flatten(1).any(1)
        if empty.any():
            raise ValueError(f"masks: {int(empty.sum())} of the {len(images)} images have no object: leave them out")


def _chunks(count: int, tokens: int, size: int) -> Iterator[slice]:
    step = max(1, min(TOKENS_AT_A_TIME // tokens, PIXELS_AT_A_TIME // size**2))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class _Measured:
    """What is known of one map so far: values per image, counts per image and threshold, and time."""

    def __init__(self, protocol: MapProtocol, groups: Sequence[str]):
        self.protocol, self.groups = protocol, groups
        self.columns: dict[str, list[Tensor]] = {}
        self.overlaps: list[Overlap] = []
        self.seconds, self.images = 0.0, 0

    def add(
        self, model: Classifier, cam: str, images: Tensor, labels: Tensor, coverage: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> None:  # fmt: skip
        """Measure one chunk on the model's device."""
        protocol, size = self.protocol, images.shape[1]
        relevance = self._relevance(model, cam, images, labels, generators[0])
        if not relevance.isfinite().all():
            raise ValueError(f"{cam}: the map of an image is not finite: the weights are damaged")
        found = to_pixels(relevance.clamp_min(0), size, upsample=protocol.upsample)
        if coverage is not None and "masks" in self.groups:
            self._against_masks(relevance.clamp_min(0), found, coverage, model.visual.config.grid)

        def logits_of(pixels: Tensor) -> Tensor:
            return model(pixels).logits

        with torch.no_grad():
            pixels = normalise(images)
            if "insertion-deletion" in self.groups:
                curves = insertion_deletion(logits_of, pixels, labels, found, steps=protocol.steps or None)
                self._keep(insertion=area_under(curves.insertion), deletion=area_under(curves.deletion))
            if "perturbation" in self.groups:
                for name, lowest in (("positive", False), ("negative", True)):
                    right = perturbed_accuracy(logits_of, pixels, labels, found, lowest_first=lowest)
                    self._keep(**{name: area_under(right.double())})
            if "road" in self.groups:
                noise = (NOISE * torch.randn(pixels.shape, generator=generators[1])).to(pixels)
                most, least = (
                    road_changes(logits_of, pixels, labels, found, lowest_first=lowest, noise=noise).mean(1)
                    for lowest in (False, True)
                )
                self._keep(road_morf=most, road_lerf=least, road=(least - most) / 2)

    def _relevance(self, model: Classifier, cam: str, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The map, timed; the first chunk is made twice, as a device is slow at first."""
        if cam == RANDOM:
            return torch.rand(len(images), model.visual.config.patches, generator=generator).to(images.device)
        for timed in (False, True) if not self.images else (True,):
            _wait(images.device)
            begun = time.perf_counter()
            relevance = relevance_of(
                model, images, labels, cam, start_layer=self.protocol.start_layer, contrast=self.protocol.contrast
            ).float()
            _wait(images.device)
            if timed:
                self.seconds += time.perf_counter() - begun
        self.images += len(images)
        return relevance

    def _against_masks(self, relevance: Tensor, found: Tensor, coverage: Tensor, grid: int) -> None:
        protocol, patches, inside = self.protocol, object_patches(coverage, grid=grid), coverage > 0.5
        self._keep(
            energy=energy_share(relevance, patches),
            masked=masked_share(relevance, patches, threshold=protocol.threshold),
            pointing=pointing_game(found, inside, tolerance=protocol.tolerance * found.shape[1] / 224),
        )
        thresholds = torch.tensor(sorted({*GRID, protocol.threshold}), dtype=found.dtype, device=found.device)
        counted = overlap(found, inside, thresholds)
        self.overlaps.append(Overlap(counted.hit.cpu(), counted.marked.cpu(), counted.object.cpu(), counted.pixels))

    def _keep(self, **columns: Tensor) -> None:
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.detach().double().cpu())

    def score(self) -> MapScore:
        """The figures over all chunks."""
        columns = {name: 100 * torch.cat(parts) for name, parts in self.columns.items()}
        values: dict[str, float] = {}
        if self.overlaps:
            hits, marked, objects = (torch.cat(parts) for parts in zip(*(one[:3] for one in self.overlaps), strict=True))
            counted = Overlap(hits, marked, objects, self.overlaps[0].pixels)
            thresholds = sorted({*GRID, self.protocol.threshold})
            over_all, iou, accuracy = counted.mean_iou(), counted.iou(), counted.pixel_accuracy()
            for prefix, at in (("", thresholds.index(self.protocol.threshold)), ("best_", int(over_all.argmax()))):
                columns |= {f"{prefix}iou": 100 * iou[:, at], f"{prefix}pixel_accuracy": 100 * accuracy[:, at]}
                values[f"{prefix}miou"] = 100 * over_all[at].item()
                if prefix:
                    values["best_threshold"] = thresholds[at]
        values |= {name: column.mean().item() for name, column in columns.items()}
        errors = {name: (column.std() / len(column) ** 0.5).item() for name, column in columns.items() if len(column) > 1}
        in_order = {name: values[name] for name in METRICS if name in values}
        return MapScore(in_order, errors, 1000 * self.seconds / self.images if self.images else 0.0)


def _wait(device: torch.device) -> None:
    """Wait for what was begun on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Maps of a model, measured: against known masks, and by what becomes of the prediction without the pixels they mark."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast.api.models import Model, as_model
from cammask_fast.audit.trials import choose_images
from cammask_fast.cam.benchmark import METRICS, MapProtocol, MapScore, measure_maps
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, IMAGE_SIZE, render, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.data.factory import BENCHMARK, folders_of, names_of, open_evaluation
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.object_masks import read_images, read_masks
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.notices import notice

EXPLAINED = ("label", "predicted")
"""Whose logit a map explains: of the image's label, or of the class that the model predicts."""
CHUNK = 64


class MapScores(dict[str, MapScore]):
    """A score per map. images: measured. masks: whether the objects were known."""

    def __init__(self, scores: Mapping[str, MapScore], *, images: int, masks: bool):
        super().__init__(scores)
        self.images, self.masks = images, masks

    def rows(self) -> list[list[str]]:
        """A row per metric: what it is, whether higher (↑) or lower (↓) is better, and a figure per map, with a standard error.
        The last row has the time per image."""
        found = [
            [metric.text, _arrow(metric.higher), *(_cell(score, name) for score in self.values())]
            for name, metric in METRICS.items()
            if any(name in score.values for score in self.values())
        ]
        times = [f"{score.milliseconds:.2f}" if score.milliseconds else "-" for score in self.values()]
        return [*found, ["ms per image", "↓", *times]]

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("%, of " + f"{self.images} images", "", *self))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<table><tr>{head}</tr>{body}</table>"


def _arrow(higher: bool | None) -> str:
    return "" if higher is None else "↑" if higher else "↓"


def _cell(score: MapScore, name: str) -> str:
    if name not in score.values:
        return "-"
    if name == "best_threshold":
        return f"{score.values[name]:.2f}"
    error = f" ± {score.errors[name]:.1f}" if name in score.errors else ""
    return f"{score.values[name]:.1f}{error}"


@torch.inference_mode(False)
def cam_bench(
    model: Model,
    data: str | Path | tuple[Any, Tensor] = BENCHMARK,
    *,
    masks: str | Path | Tensor | None = None,
    cams: Sequence[str] = (),
    metrics: Sequence[str] = (),
    images: int = 300,
    explain: str = "label",
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> MapScores:
    """Measure the maps of a model.

    Args:
        model: from `load` or `fine_tune`.
        data: `texture-digits`, whose in-distribution test images have known masks, a folder of class folders, shards, or images
            as for `cam` and their labels, int64 (M,).
        masks: folder of mask images, see `data.object_masks.read_masks`, or for given images the object's share of each pixel,
            bool or float (M, S, S); without masks only what needs none is measured.
        cams: maps, also `random`, which is chance (default: all).
        metrics: `masks`, `insertion-deletion`, `perturbation`, `road` (default: all that can be measured).
        images: at most, evenly over the classes.
        explain: `label` or `predicted`, the class that a map explains.
        progress: called with the images done, over all maps, and their number.
        **settings: fields of `MapProtocol`: upsample, threshold, tolerance, steps, seed, start_layer.

    Returns:
        Scores by map.

    Raises:
        ValueError: for unknown maps, metrics and settings, data or masks that cannot be used, or classes that do not fit.
    """
    model = as_model(model)
    unknown = set(settings) - set(MapProtocol.__dataclass_fields__) - {"cams", "groups"}
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    protocol = MapProtocol(cams=tuple(cams), groups=tuple(metrics), **settings)
    _check_choice(images, explain)
    if isinstance(data, tuple):
        read = _given(model, data, masks, images, explain)
    else:
        if isinstance(masks, Tensor):
            raise ValueError("masks: expected the folder of their images, as the data is a folder")
        model = _with_classes_of(model, str(data))
        read = read_data(
            model.with_head(), model.class_folders, str(data), LoaderConfig(device=model.device),
            masks=None if masks is None else Path(masks), images=images, explain=explain, seed=protocol.seed,
        )  # fmt: skip
    scores = measure_maps(
        model.with_head(), read.images, read.labels, coverage=read.coverage, protocol=protocol, progress=progress
    )
    return MapScores(scores, images=len(read.images), masks=read.coverage is not None)


def _with_classes_of(model: Model, where: str) -> Model:
    """The model over the data's classes, where it has none yet."""
    if model.classifier is not None:
        return model
    folders = folders_of([where])
    return replace(model.with_classes(folders if where == BENCHMARK else names_of(None, folders)), class_folders=folders)


def _given(model: Model, data: tuple[Any, Tensor], masks: Any, images: int, explain: str) -> ReadSet:
    """Images, labels and masks that are in memory."""
    if len(data) != 2 or not isinstance(data[1], Tensor) or data[1].dtype != torch.int64:
        raise ValueError("data: expected a folder, or a pair of images and labels, int64 (M,)")
    classes = len(model.with_head().head.weight)
    pixels, labels = model.pixels(data[0])[:images].cpu(), data[1][:images].cpu()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    if masks is not None and not isinstance(masks, Tensor):
        raise ValueError("masks: expected a tensor of the object's share of each pixel, as the images are given")
    coverage = None if masks is None else masks[:images].cpu().float()
    if len(labels) == len(pixels):
        labels = explained_logits(model.with_head(), pixels, labels, torch.arange(classes), explain)
    return ReadSet(pixels, labels, coverage)


def _check_choice(images: int, explain: str) -> None:
    if not isinstance(images, int) or isinstance(images, bool) or images < 1:
        raise ValueError(f"images: expected 1 or more, got {images}")
    if explain not in EXPLAINED:
        raise ValueError(f"explain: expected {' or '.join(EXPLAINED)}, got {explain!r}")


class ReadSet(NamedTuple):
    """Images to measure. images: uint8 (M, S, S, 3). labels: int64 (M,), the explained logits. coverage: float32 (M, S, S), the
    object's share of each pixel; None where no masks are known. name: of the set. loader: that read the images, if one did."""

    images: Tensor
    labels: Tensor
    coverage: Tensor | None
    name: str = ""
    loader: Any = None


def read_data(
    model: Classifier,
    folders: Sequence[str],
    data: str,
    config: LoaderConfig,
    *,
    masks: Path | None,
    images: int,
    explain: str,
    seed: int,
) -> ReadSet:
    """Read images, their masks where there are some, and choose the logit that each map explains.

    Args:
        model: the classifier.
        folders: class folders behind its logits.
        data: `texture-digits`, of which the first images of the in-distribution test set are taken, in their random order, or
            one set as for `open_evaluation`.
        config: how images are loaded.
        masks: folder of mask images; None: no masks but those of the benchmark.
        images: at most, evenly over the classes.
        explain: one of `EXPLAINED`.
        seed: of the choice of images.

    Returns:
        The images; without a mask, or with an empty one, they are left out, which is a notice.

    Raises:
        ValueError: fewer than one image, an unknown `explain`, several sets, masks for the benchmark, classes that the model
            does not have, or no image with an object.
    """
    _check_choice(images, explain)
    size = model.visual.config.image_size
    if data == BENCHMARK:
        if masks is not None:
            raise ValueError("masks: the embedded benchmark knows its own: leave the folder out")
        if size != IMAGE_SIZE or tuple(folders) != CLASS_NAMES:
            raise ValueError(
                f"{BENCHMARK} has images of {IMAGE_SIZE} pixels and the classes {', '.join(CLASS_NAMES)}; this model not"
            )
        scenes = sample_scenes(evaluation_specifications()["id"])[slice(0, images)]
        pixels, labels = render(scenes), torch.from_numpy(scenes.labels)
        explained = explained_logits(model, pixels, labels, torch.arange(len(folders)), explain)
        return ReadSet(pixels, explained, stroke_coverage(scenes), data)
    sets = open_evaluation([data], image_size=size, class_folders=folders, loader_config=config, allow_incomplete=True)
    if len(sets) > 1:
        raise ValueError(f"{data} holds several sets: name the folder of one, of {', '.join(sets)}")
    ((name, one),) = sets.items()
    chosen = choose_images(one.labels, max(images, 2), seed=seed)[:images]
    batch, loader = read_images(one.loader, chosen, config)
    found = ReadSet(batch.images, batch.labels, None, name, loader)
    if masks is not None:
        found = _with_objects(found, read_masks(masks, one.loader, batch.sample_ids.tolist()))
    return found._replace(labels=explained_logits(model, found.images, found.labels, one.groups, explain))


def _with_objects(found: ReadSet, coverage: Tensor) -> ReadSet:
    """The images that have an object."""
    usable = (coverage > 0.5).flatten(1).any(1)
    if not usable.all():
        left_out = int((~usable).sum())
        notice(f"images without a mask, or without an object in it, left out: {left_out} of {len(usable)}")
    if not usable.any():
        raise ValueError("masks: no image has an object")
    return found._replace(images=found.images[usable], labels=found.labels[usable], coverage=coverage[usable])


@torch.no_grad()
def explained_logits(model: Classifier, images: Tensor, labels: Tensor, groups: Tensor, explain: str) -> Tensor:
    """The logit that the map of each image explains.

    Args:
        model: the classifier.
        images: uint8 (M, S, S, 3).
        labels: int64 (M,).
        groups: int64 (K,), for each logit the label for which it is right, or -1 where it does not count.
        explain: `label`: the largest logit that stands for the label; `predicted`: the largest that counts.

    Returns:
        int64 (M,), on the CPU.
    """
    if explain == "label" and torch.equal(groups.cpu(), torch.arange(len(groups))):
        return labels
    device, found = model.head.weight.device, []
    for some, their in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = model(normalise(some.to(device))).logits.float().cpu()
        stands = groups.cpu() >= 0 if explain == "predicted" else groups.cpu() == their[:, None]
        found.append(logits.masked_fill(~stands, -torch.inf).argmax(1))
    return torch.cat(found)

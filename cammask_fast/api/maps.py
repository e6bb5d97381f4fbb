"""Class activation maps and counterfactual images of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cammask_fast.api.models import Model, as_model, texts
from cammask_fast.cam import relevance_of
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import parse_strategy
from cammask_fast.model.classifier import Classifier
from cammask_fast.viz.mask_images import apply
from cammask_fast.viz.plots import map_figure


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Class activation maps. images: uint8 (N, S, S, 3). relevance: float32 (N, G, G), with a maximum of 1 per image."""

    images: Tensor
    relevance: Tensor
    prompts: tuple[str, ...]

    def figure(self) -> Any:
        """A matplotlib figure: every image beside its map."""
        return map_figure(self.images, self.relevance, self.prompts)


@torch.inference_mode(False)
def cam(
    model: Model,
    images: Any,
    prompts: str | Sequence[str],
    *,
    kind: str = "mm-cam",
    start_layer: int = 0,
    contrast: str = "none",
) -> Maps:
    """Class activation maps of images for prompts or classes.

    Args:
        model: from `load` or `fine_tune`.
        images: paths, PIL images, or a tensor as `to_uint8` takes it, of the model's size.
        prompts: one for all images, or one per image: any text for a model with a text tower, else names of its classes.
        kind: `mm-cam`, `grad-cam`, `legrad`, `legrad-final` or `rollout`, see docs/maps.md.
        start_layer: first layer that the map takes in; not for `grad-cam`.
        contrast: what is subtracted from the explained score: `none`, the `mean` of the other classes, or the highest of them
            (`runner-up`); not for `rollout`. The classes are the different prompts, or those of a fine-tuned model.

    Returns:
        The images at the model's size and their maps, on the CPU.

    Raises:
        ValueError: for an unknown map, settings that it cannot honour, a prompt that a fine-tuned model has no class for, or
            images that cannot be read.
    """
    pixels = as_model(model).pixels(images)
    if not len(pixels):
        raise ValueError("images: expected at least one")
    asked = texts((prompts,) if isinstance(prompts, str) else prompts, "prompts")
    asked = asked * len(pixels) if isinstance(prompts, str) else asked
    if len(asked) != len(pixels):
        raise ValueError(f"prompts: expected one, or one per image ({len(pixels)}), got {len(asked)}")
    classifier, labels = _for_prompts(model, asked)
    relevance = relevance_of(classifier, pixels, labels, kind, start_layer=start_layer, contrast=contrast)
    grid = model.visual.config.grid
    return Maps(images=pixels.cpu(), relevance=normalise_relevance(relevance).view(-1, grid, grid).cpu(), prompts=asked)


@dataclass(frozen=True, kw_only=True)
class Counterfactuals:
    """images: uint8 (N, S, S, 3) after masking and filling. masks: bool (N, G, G), True where a patch was masked."""

    originals: Tensor
    images: Tensor
    masks: Tensor

    def pictures(self) -> list[Image.Image]:
        """The images as PIL images."""
        return [Image.fromarray(image.numpy()) for image in self.images]


def counterfactual(
    model: Model,
    images: Any,
    prompts: str | Sequence[str],
    *,
    masking: str = "ObjMaskSingleFill(0.3)",
    donors: Any = None,
    kind: str = "mm-cam",
    seed: int = 0,
) -> Counterfactuals:
    """Counterfactual images: the object's or the context's patches masked and refilled from other images.

    Args:
        model: as for `cam`.
        images: as for `cam`.
        prompts: as for `cam`.
        masking: a strategy under the paper's name.
        donors: images to fill from beside the given ones; needed when there is only one.
        kind: as for `cam`.
        seed: of the donors.

    Returns:
        The counterfactuals of the given images and their masks, on the CPU.

    Raises:
        ValueError: as `cam`, for an unknown strategy, and without anything to fill from.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected a whole number, got {seed!r}")
    strategy = parse_strategy(masking)
    maps = cam(model, images, prompts, kind=kind)
    pool = maps.images if donors is None else torch.cat([maps.images, model.pixels(donors).cpu()])
    if strategy.fill != "none" and len(pool) < 2:
        raise ValueError("one image has nothing to fill from: give donors=[…], more images, or a NoFill masking")
    grid, generator = model.visual.config.grid, torch.Generator().manual_seed(seed)
    masks, filled = apply(strategy, pool, len(maps.images), maps.relevance.flatten(1), generator, grid=grid)
    return Counterfactuals(originals=maps.images, images=filled, masks=masks)


def _for_prompts(model: Model, prompts: Sequence[str]) -> tuple[Classifier, Tensor]:
    """A classifier over the prompts and the label of each, on the model's device."""
    if model.clip is not None:
        distinct = tuple(dict.fromkeys(prompts))
        classifier = model.clip.classifier(distinct, ("{}",))
        if model.classifier is not None:  # a tuned image tower with the text tower it started from
            classifier = Classifier(model.classifier.visual, classifier.head.weight.detach()).eval()
        labels = [distinct.index(prompt) for prompt in prompts]
        return classifier.to(model.device), torch.tensor(labels, device=model.device)
    unknown = [prompt for prompt in prompts if prompt not in model.class_names]
    if unknown:
        known = ", ".join(model.class_names[:8])
        raise ValueError(f"prompt {unknown[0]!r}: a fine-tuned model has maps of its own classes only: {known}")
    labels = [model.class_names.index(prompt) for prompt in prompts]
    return model.with_head(), torch.tensor(labels, device=model.device)

"""The model behind `cammask mask`, what its logits stand for, and the rows that each photograph gets.

The class score is the prompt's own logit, exp(logit_scale) * cos(image, text), as in training, where the CAM differentiates the
logit of the true label alone: other prompts enter only as a contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast.cam import relevance_of
from cammask_fast.cam.localisation import to_pixels
from cammask_fast.cam.perturbation import area_under, insertion_deletion
from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.heads import Classes, matching_rows
from cammask_fast.data.class_names import some
from cammask_fast.data.datasets.texture_digits import BACKGROUNDS, CLASS_NAMES, TEMPLATES
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.model.resolution import at_resolution
from cammask_fast.model.tiny_clip import tokenizer
from cammask_fast.runtime.notices import remark

TOKENS_OF_A_GRAPH = 4096
"""Tokens whose activations the graph of a map holds at a time: 81 images of ViT-B/32, 7 of ViT-L/14 at 336 pixels."""
MOST_CLASSES = 6
"""A checkpoint with more classes gets one row per photograph unless classes are named."""


class Look(NamedTuple):
    """A model and the rows that each photograph gets."""

    model: Classifier
    names: tuple[str, ...]
    """What the logits stand for."""
    rows: tuple[int | None, ...]
    """A logit per row; None: that of the class for which the model takes the photograph."""

    def logits(self, images: Tensor) -> Tensor:
        """float32 (N, K) on the CPU. images: uint8 (N, S, S, 3)."""
        with torch.no_grad():
            device = self.model.head.weight.device
            return torch.cat([self.model(normalise(part.to(device))).logits.cpu() for part in self.parts(images)])

    def maps(self, images: Tensor, labels: Tensor, cam: str, start_layer: int, contrast: str = "none") -> Tensor:
        """Maps of images, computed a few images at a time.

        Args:
            images: uint8 (N, H, W, 3).
            labels: int64 (N,), the logits that are explained.
            cam: name of the map.
            start_layer: first layer that it takes in.
            contrast: what is subtracted from its class score.

        Returns:
            float32 (N, P) on the CPU, not normalised.
        """
        device = self.model.head.weight.device
        pairs = zip(self.parts(images), self.parts(labels), strict=True)
        options: dict[str, Any] = {"start_layer": start_layer, "contrast": contrast}
        return torch.cat([relevance_of(self.model, i.to(device), n.to(device), cam, **options).cpu() for i, n in pairs])

    def scores(self, images: Tensor, labels: Tensor, relevance: Tensor) -> Tensor:
        """RISE's insertion and deletion: areas under the label's probability while the map's highest pixels appear, or go.

        Args:
            images: uint8 (N, S, S, 3).
            labels: int64 (N,), the logits that the maps explain.
            relevance: float (N, P).

        Returns:
            float64 (N, 2) on the CPU, insertion (higher is better) and deletion (lower is better), in [0, 1].

        Raises:
            ValueError: the model has one logit only, whose probability is always 1.
        """
        if len(self.names) < 2:
            raise ValueError("--scores: probabilities need two or more prompts: add another --class, or --contrast-with PROMPT")
        device, found = self.model.head.weight.device, []
        with torch.no_grad():
            for some_images, some_labels, maps in zip(*map(self.parts, (images, labels, relevance)), strict=True):
                pixels, found_at = normalise(some_images.to(device)), to_pixels(maps.to(device), images.shape[1])
                curves = insertion_deletion(lambda x: self.model(x).logits, pixels, some_labels.to(device), found_at)
                found.append(torch.stack([area_under(curve).cpu() for curve in curves], 1))
        return torch.cat(found)

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Pieces of about `TOKENS_OF_A_GRAPH` tokens."""
        return tensor.split(max(1, TOKENS_OF_A_GRAPH // (self.model.visual.config.patches + 1)))


def look_with_prompts(
    arch: str,
    pretrained: str,
    prompts: Sequence[str],
    device: str,
    *,
    others: Sequence[str] = (),
    resolution: int | None = None,
) -> Look:
    """A pre-trained model and any text.

    Args:
        arch: name of the architecture.
        pretrained: weights; empty: the architecture's own.
        prompts: a row each, 1 or more.
        device: of the model.
        others: prompts without a row, which the prompts are compared with.
        resolution: pixels per side of the model's input; None: its own.

    Returns:
        The model, whose logits are the prompts', then the others'.

    Raises:
        ValueError: no prompt, one that is given twice, or prompts that the tiny model never saw.
    """
    if not prompts:
        raise ValueError("--class PROMPT: needed with a pre-trained model; a run or checkpoint has classes of its own")
    names = (*prompts, *others)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"the prompt {twice!r} is given twice: leave one of them out")
    if arch == "tiny":
        refuse_unknown_words(names)
        remark(
            "the tiny model was pre-trained on handwritten digits on photographs, 48 x 48 pixels, and knows nothing else: for "
            "other pictures take --arch ViT-B/32 or a run of your own"
        )
    model = load_pretrained(arch, pretrained).classifier(names, ("{}",), device=device)
    return Look(_resized(model, resolution), names, tuple(range(len(prompts))))


def look_with_checkpoint(
    checkpoint: Path, prompts: Sequence[str], device: str, *, others: Sequence[str] = (), resolution: int | None = None
) -> Look:
    """A checkpoint of `cammask train` and its own classes.

    Args:
        checkpoint: the file.
        prompts: class names, a row each; none: all classes, or with many of them the predicted one.
        device: of the model.
        others: refused: all other classes are what a class is compared with.
        resolution: pixels per side of the model's input; None: its own.

    Returns:
        The model and its rows.

    Raises:
        ValueError: a prompt is none of its classes, or there are others.
    """
    if others:
        raise ValueError(f"--contrast-with: {checkpoint} compares with its own other classes: leave it out, use --cam-contrast")
    model, description = load_classifier(checkpoint)
    model = _resized(model, resolution).to(device)
    classes = Classes.of(description)
    if prompts:
        rows = matching_rows(Classes(tuple(prompts), tuple(prompts)), classes)
        unknown = [prompt for prompt, row in zip(prompts, rows, strict=True) if row is None]
        if unknown:
            raise ValueError(
                f"--class {unknown[0]!r}: {checkpoint} has maps of its own classes only, {some(classes.names)}; a pre-trained "
                "model (--arch) takes any text"
            )
        return Look(model, classes.names, tuple(rows))
    several = len(classes.names) > MOST_CLASSES
    return Look(model, classes.names, (None,) if several else tuple(range(len(classes.names))))


def _resized(model: Classifier, resolution: int | None) -> Classifier:
    """The model at a resolution."""
    return model if resolution is None else at_resolution(model, resolution)


def refuse_unknown_words(prompts: Sequence[str]) -> None:
    """Raise ValueError for prompts with tokens that are in no caption of the tiny model's pre-training."""
    places = [caption for _, caption, _ in BACKGROUNDS.values()]
    captions = [template.format(name) for template in TEMPLATES for name in CLASS_NAMES]
    tokenize = tokenizer()
    known = set(tokenize([*captions, *(f"on {place}" for place in places), "a sketch of the number"]).flatten().tolist())
    for prompt in prompts:
        if not set(tokenize([prompt]).flatten().tolist()) <= known:
            raise ValueError(
                f"the tiny model never saw some word of {prompt!r}; it knows the digits {', '.join(CLASS_NAMES)} in prompts "
                f"such as 'a photo of the number seven.' or 'a sketch of the number two.', and on {', '.join(places)}"
            )

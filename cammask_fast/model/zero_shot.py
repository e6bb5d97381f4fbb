"""The zero-shot head from class names and prompt templates, and the shipped tiny CLIP as a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor

from cammask_fast.data.datasets.texture_digits import TEMPLATES
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.files import load_exactly, read_safetensors
from cammask_fast.model.templates import template_fault
from cammask_fast.model.tiny_clip import build_tiny_clip, tokenizer
from cammask_fast.model.vit import VisionTransformer

TINY_WEIGHTS = "tiny_clip.safetensors"


@torch.no_grad()
def zero_shot_weights(
    clip: CLIP, tokenize: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Weights of the zero-shot head, exp(logit_scale) included.

    Per class: the mean over templates of the normalised text embeddings, normalised again.

    Args:
        clip: the model whose text tower embeds the prompts.
        tokenize: maps strings to token ids.
        class_names: K names.
        templates: format strings with one `{}` for the name.

    Returns:
        float32 (K, E).

    Raises:
        ValueError: no class, or a template without a `{}` for the name.
    """
    if not class_names:
        raise ValueError("class names: expected at least one")
    for template in templates:
        fault = template_fault(template)
        if fault:
            raise ValueError(f"prompt template {template!r}: {fault}")
    formatters = [template.format for template in templates]
    weights = open_clip.build_zero_shot_classifier(clip, tokenize, list(class_names), formatters)  # (E, K)
    return weights.T.float() * clip.logit_scale.exp().float()


def load_tiny_clip() -> CLIP:
    """The shipped two-tower CLIP in float32, evaluation mode."""
    clip = build_tiny_clip()
    with as_file(files("cammask_fast.assets").joinpath(TINY_WEIGHTS)) as path:
        weights, _ = read_safetensors(path)
        load_exactly(clip, {name: value.float() for name, value in weights.items()}, path)
    return clip.eval()


def tiny_provenance() -> dict[str, Any]:
    """Command, seed, data hash, versions and zero-shot accuracies of the shipped weights."""
    return json.loads(files("cammask_fast.assets").joinpath("tiny_clip.json").read_text())


def tiny_classifier(class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Classifier:
    """The shipped CLIP as a zero-shot classifier over `class_names`."""
    clip = load_tiny_clip()
    assert isinstance(clip.visual, VisionTransformer)
    return Classifier(clip.visual, zero_shot_weights(clip, tokenizer(), class_names, templates)).eval()

"""A classifier at another resolution than it was trained at: its positional embeddings interpolated."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cammask_fast.model.classifier import Classifier


def at_resolution(model: Classifier, size: int) -> Classifier:
    """A frozen copy of a classifier that takes images of another size; itself where the size is its own.

    Args:
        model: the classifier.
        size: pixels per side, a multiple of the patch size.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ValueError: for any other size.
    """
    config = model.visual.config
    if size == config.image_size:
        return model
    patch = config.patch_size
    if size < patch or size % patch:
        below = max(patch, size // patch * patch)
        raise ValueError(
            f"--resolution {size}: expected a multiple of the model's patches of {patch} pixels, such as {below} or "
            f"{below + patch}"
        )
    resized = model.frozen_copy()
    visual = resized.visual
    visual.config = replace(config, image_size=size)
    embedding = interpolated(visual.positional_embedding.detach(), visual.config.grid)
    visual.positional_embedding = nn.Parameter(embedding, requires_grad=False)
    return resized


def interpolated(embedding_LD: Tensor, grid: int) -> Tensor:
    """Positional embeddings on another grid, bicubic with antialiasing as in open_clip; that of CLS stays.

    Args:
        embedding_LD: float (L, D), CLS first, then a square grid of patches.
        grid: patches per side of the result, G.

    Returns:
        (G * G + 1, D) in the same dtype.
    """
    side = round((len(embedding_LD) - 1) ** 0.5)
    patches = embedding_LD[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding_LD[:1], resized[0].flatten(1).T.to(embedding_LD.dtype)])

"""The counterfactual as a chain of PyTorch operators, each a pass over the batch: what the kernels are measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD


def counterfactual_op_by_op(images_u8: Tensor, relevance: Tensor, donors: Tensor, threshold: float) -> Tensor:
    """Object mask, single-fill and normalisation in vectorised PyTorch without a loop over images.

    The map is up-sampled to pixels and compared with the threshold; the float batch is cloned and gathered along the batch with
    a full int64 index (N, 3, H, W).

    Args:
        images_u8: uint8 (N, H, W, 3).
        relevance: float32 (N, P), the raw map.
        donors: int64 (N,).
        threshold: of the object mask.

    Returns:
        float32 (N, 3, H, W).
    """
    count, height, width, _ = images_u8.shape
    grid = math.isqrt(relevance.shape[1])
    mean = torch.tensor(CLIP_MEAN, device=images_u8.device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=images_u8.device).view(1, 3, 1, 1)
    images = images_u8.permute(0, 3, 1, 2).contiguous().float() / 255
    cam = relevance / (relevance.amax(1, keepdim=True) + 1e-8)
    mask = F.interpolate(cam.view(count, 1, grid, grid), size=(height, width), mode="nearest") > threshold
    donor_images = torch.gather(images.clone(), 0, donors.view(-1, 1, 1, 1).expand_as(images).contiguous())
    return (torch.where(mask, donor_images, images) - mean) / std

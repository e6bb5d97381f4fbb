"""Linear imputation: removed pixels become the weighted mean of their eight neighbours, all at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RESIDUAL = 1e-7
"""Of the equations below, where the iteration ends; values are then those of a direct solver to about 1e-6 at 224 pixels."""
CHECKED_EVERY = 8
"""Iterations between two looks at the residual, each of which waits for the device."""


def impute(images: Tensor, removed: Tensor) -> Tensor:
    """Replace pixels by the solution of x = sum(w x of the neighbours) / sum(w), w = 1/6 beside and 1/12 across (Rong et al.,
    A Consistent and Efficient Evaluation Strategy for Attribution Methods, section 4.2), without the noise.

    Times 12, the system is symmetric and positive definite; conjugate gradients in float64 solve it for all images and channels
    at once, on their device.

    Args:
        images: float (N, C, H, W).
        removed: bool (N, H, W), pixels to replace. An image without any other becomes zero.

    Returns:
        (N, C, H, W) in the images' dtype; pixels that were not removed are untouched.
    """
    unknown = removed[:, None].double()  # a factor is faster than a choice
    known = F.pad(torch.where(removed[:, None], 0.0, images.double()), (1, 1, 1, 1))
    total = neighbours(F.pad(torch.ones_like(unknown[:1]), (1, 1, 1, 1)))  # the weights inside of the image
    mean = known.sum((2, 3), keepdim=True) / (1 - unknown).sum((2, 3), keepdim=True).clamp_min(1)

    padded = F.pad((mean * unknown), (1, 1, 1, 1))
    direction = padded[..., 1:-1, 1:-1]  # the border stays zero
    found = direction.clone()
    residual = (neighbours(known) + neighbours(padded)).addcmul_(total, found, value=-1).mul_(unknown)
    direction.copy_(residual)
    norm = _dot(residual, residual)
    for step in range(removed[0].numel() if len(removed) else 0):
        if step % CHECKED_EVERY == 0 and residual.abs().max() <= RESIDUAL:
            break
        image_of = neighbours(padded).neg_().addcmul_(total, direction).mul_(unknown)
        length = _share(norm, _dot(direction, image_of))
        found.addcmul_(length, direction)
        residual.addcmul_(length, image_of, value=-1)
        norm, before = _dot(residual, residual), norm
        direction.mul_(_share(norm, before)).add_(residual)
    return torch.where(removed[:, None], found.to(images.dtype), images)


def neighbours(padded: Tensor) -> Tensor:
    """12 times the weighted sum of each pixel's eight neighbours. padded: (N, C, H + 2, W + 2), zero on the border; returns
    (N, C, H, W)."""
    middle = padded[..., 1:-1]
    across = (padded[..., :-2] + padded[..., 2:]).add_(middle, alpha=2)
    both = (across[..., :-2, :] + across[..., 2:, :]).add_(across[..., 1:-1, :], alpha=2)
    return both.sub_(middle[..., 1:-1, :], alpha=4)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((2, 3), keepdim=True)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where a system is solved and nothing is left."""
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)

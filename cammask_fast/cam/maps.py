"""Class activation maps of a CLIP classifier from the taps of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.config import Cam
from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps

CAMS = get_args(Cam)


def class_score(logits: Tensor, labels: Tensor) -> Tensor:
    """The scalar that both CAMs differentiate: the sum over the batch of each image's logit at its label."""
    return logits.gather(1, labels[:, None]).sum()


def mm_cam(logits: Tensor, labels: Tensor, taps: Taps, *, start_layer: int = 0) -> Tensor:
    """MM-CAM: the CLS row of the relevance rollout over the patches. One layer's L x L probabilities live at a time.

    Args:
        logits: (N, K) from the forward that filled `taps`; its graph is kept, and no weight gradient is computed.
        labels: int64 (N,), the class whose logit is explained.
        taps: queries, keys, values and outputs of all layers.
        start_layer: first layer of the rollout; 0 takes all, as the paper does.

    Returns:
        (N, P), not normalised.

    Raises:
        ValueError: start_layer is not a layer of the model.
    """
    outputs = taps.outputs[start_layer:]
    if not outputs:
        raise ValueError(f"cam_start_layer: expected 0..{len(taps.outputs) - 1}, got {start_layer}")
    gradients = torch.autograd.grad(class_score(logits, labels), outputs, retain_graph=True)
    with torch.no_grad():
        return cls_rollout(taps, gradients)


def cls_rollout(taps: Taps, gradients: Sequence[Tensor]) -> Tensor:
    """The CLS row of the rollout over the last len(gradients) layers, from the gradients at their attention outputs, first
    layer first: (N, P), in float32 even under 16-bit attention."""
    keys = taps.keys[-1]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    relevance = F.pad(torch.ones(len(keys), 1, dtype=dtype, device=keys.device), (0, keys.shape[2] - 1))  # e_CLS
    layers = zip(taps.queries[::-1], taps.keys[::-1], taps.values[::-1], gradients[::-1], strict=False)  # from the last layer
    for q, k, v, gradient in layers:
        relevance = cls_relevance(relevance, q, k, v, gradient)
    return relevance[:, 1:]


def grad_cam(logits: Tensor, labels: Tensor, taps: Taps) -> Tensor:
    """Grad-CAM at ln_1 of the last block: relu(sum_channels(a * sum_tokens g)) over the patches.

    The sum over tokens includes CLS.

    Args:
        logits: (N, K) from the forward that filled `taps`; its graph is kept, and no weight gradient is computed.
        labels: int64 (N,), the class whose logit is explained.
        taps: has ln_1 of the last block.

    Returns:
        (N, P), not normalised; may be zero everywhere.
    """
    assert taps.last_ln_1 is not None
    (gradient,) = torch.autograd.grad(class_score(logits, labels), taps.last_ln_1, retain_graph=True)
    with torch.no_grad():
        return weighted_activation(taps, gradient)


def weighted_activation(taps: Taps, gradient: Tensor) -> Tensor:
    """Grad-CAM's map from the gradient (N, L, D) at ln_1 of the last block."""
    assert taps.last_ln_1 is not None
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    weights = gradient.sum(1, keepdim=True, dtype=dtype)  # (N, 1, D)
    return torch.relu((taps.last_ln_1.to(dtype) * weights).sum(-1))[:, 1:]


def relevance_of(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    cam: str,
    *,
    start_layer: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The CAM of images at their labels.

    Args:
        model: the classifier; a frozen one will do, and autograd may be switched off around the call.
        images: uint8 (N, H, W, 3), of the model's image size.
        labels: int64 (N,), the class of each image's map.
        cam: `mm-cam` or `grad-cam`.
        start_layer: first layer of MM-CAM's rollout.
        dtype: of the model's products, as it is stored.

    Returns:
        float32 (N, P), row-major patches, not normalised.

    Raises:
        ValueError: for an unknown map or start layer.
    """
    if cam not in CAMS:
        raise ValueError(f"unknown cam {cam!r}; known: {', '.join(CAMS)}")
    taps = Taps()
    with torch.enable_grad():
        pixels = normalise(images, dtype=dtype).requires_grad_(True)  # the taps of a frozen model need a graph, too
        logits = model(pixels, taps=taps).logits
        if cam == "grad-cam":
            return grad_cam(logits, labels, taps)
        return mm_cam(logits, labels, taps, start_layer=start_layer)

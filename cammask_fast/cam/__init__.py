"""Class activation maps of a CLIP classifier from the taps of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.masked_fill import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps

__all__ = ["class_score", "grad_cam", "mm_cam", "relevance_of"]


def class_score(logits: Tensor, labels: Tensor) -> Tensor:
    """The scalar that both CAMs differentiate: the sum over the batch of each image's logit at its label."""
    return logits.gather(1, labels[:, None]).sum()


def mm_cam(logits: Tensor, labels: Tensor, taps: Taps, *, start_layer: int = 0) -> Tensor:
    """MM-CAM: the CLS row of the relevance rollout over the patches, (N, P), not normalised.

    logits: (N, K) from the forward that filled `taps`; its graph is kept, and no weight gradient is computed. labels: int64
    (N,). start_layer: first layer of the rollout (0: all, the paper's). One layer's L x L probabilities live at a time.
    """
    outputs = taps.outputs[start_layer:]
    if not outputs:
        raise ValueError(f"cam_start_layer: expected 0..{len(taps.outputs) - 1}, got {start_layer}")
    gradients = torch.autograd.grad(class_score(logits, labels), outputs, retain_graph=True)
    with torch.no_grad():
        keys = taps.keys[-1]
        dtype = torch.promote_types(keys.dtype, torch.float32)  # the rollout stays float32 under 16-bit attention
        relevance = torch.zeros(keys.shape[0], keys.shape[2], dtype=dtype, device=keys.device)
        relevance[:, 0] = 1.0
        for layer in reversed(range(start_layer, len(taps.outputs))):
            q, k, v = taps.queries[layer], taps.keys[layer], taps.values[layer]
            relevance = cls_relevance(relevance, q, k, v, gradients[layer - start_layer])
    return relevance[:, 1:]


def grad_cam(logits: Tensor, labels: Tensor, taps: Taps) -> Tensor:
    """Grad-CAM at ln_1 of the last block: relu(sum_channels(a * sum_tokens g)) over the patches, (N, P), not normalised.

    The sum over tokens includes CLS. Can be zero everywhere.
    """
    assert taps.last_ln_1 is not None
    (gradient,) = torch.autograd.grad(class_score(logits, labels), taps.last_ln_1, retain_graph=True)
    with torch.no_grad():
        weights = gradient.sum(1, keepdim=True)  # (N, 1, D)
        return torch.relu((taps.last_ln_1 * weights).sum(-1))[:, 1:]


def relevance_of(model: Classifier, images: Tensor, labels: Tensor, cam: str) -> Tensor:
    """The CAM of uint8 (N, H, W, 3) images at their labels: float (N, P), not normalised. cam: mm-cam or grad-cam."""
    taps = Taps()
    logits = model(normalise(images), taps=taps).logits
    return grad_cam(logits, labels, taps) if cam == "grad-cam" else mm_cam(logits, labels, taps)

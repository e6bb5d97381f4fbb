"""Class activation maps of a CLIP classifier from the taps of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.config import Cam
from cammask_fast.kernels.cls_relevance import averaged, cls_relevance_layer
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps

CAMS = get_args(Cam)
WITHOUT_GRAPH = (
    "a class activation map needs the gradients of the logits: run the model outside torch.no_grad() and "
    "torch.inference_mode(), on images or with weights that require gradients, or call `relevance_of`, which needs neither"
)
EMPTY_TAPS = "taps: expected those that were filled by the forward pass which gave the logits"


def class_score(logits: Tensor, labels: Tensor) -> Tensor:
    """The scalar that both CAMs differentiate: the sum over the batch of each image's logit at its label."""
    return logits.gather(1, labels[:, None]).sum()


def _gradients_of_score(logits: Tensor, labels: Tensor, taps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients at the taps. Raises ValueError for labels that do not fit, and where there is no graph from taps to logits."""
    count, classes = logits.shape
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(f"labels: expected int64 ({count},), got {labels.dtype} {tuple(labels.shape)}")
    has_values = labels.device.type == "cpu" and type(labels) is Tensor  # a fake tensor has none; a GPU's would be waited for
    if count and has_values and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    if not logits.requires_grad or not all(tap.requires_grad for tap in taps):
        raise ValueError(WITHOUT_GRAPH)
    gradients = torch.autograd.grad(class_score(logits, labels), taps, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        raise ValueError(EMPTY_TAPS)
    return gradients


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
    if not taps.outputs:
        raise ValueError(EMPTY_TAPS)
    if not isinstance(start_layer, int) or not 0 <= start_layer < len(taps.outputs):
        raise ValueError(f"cam_start_layer: expected 0..{len(taps.outputs) - 1}, got {start_layer}")
    gradients = _gradients_of_score(logits, labels, taps.outputs[start_layer:])
    with torch.no_grad():
        return cls_rollout(taps.detached(), gradients)


def cls_rollout(taps: Taps, gradients: Sequence[Tensor]) -> Tensor:
    """The CLS row of the rollout over the last len(gradients) layers, from the gradients at their attention outputs, first
    layer first: (N, P), in float32 even under 16-bit attention. Detached taps bring the softmax statistics of the forward;
    in the compiled step Inductor is told to hand them over (`cammask_fast/inductor_options.py`)."""
    keys = taps.keys[-1]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    relevance = F.pad(torch.ones(len(keys), 1, dtype=dtype, device=keys.device), (0, keys.shape[2] - 1))  # e_CLS
    logsumexps = taps.logsumexps or [None] * len(taps.keys)
    layers = zip(taps.queries[::-1], taps.keys[::-1], taps.values[::-1], logsumexps[::-1], gradients[::-1], strict=False)
    added = None
    for q, k, v, lse, gradient in layers:  # from the last
        relevance, added = cls_relevance_layer(relevance, added, q, k, v, gradient, lse=lse)
    return averaged(relevance, added)[:, 1:]


def grad_cam(logits: Tensor, labels: Tensor, taps: Taps) -> Tensor:
    """Grad-CAM at ln_1 of the last block: relu(sum_channels(a * sum_tokens g)) over the patches.

    The sum over tokens includes CLS.

    Args:
        logits: (N, K) from the forward that filled `taps`; its graph is kept, and no weight gradient is computed.
        labels: int64 (N,), the class whose logit is explained.
        taps: has ln_1 of the last block.

    Returns:
        (N, P), not normalised; may be zero everywhere.

    Raises:
        ValueError: no forward has filled the taps, or the logits have no graph.
    """
    if taps.last_ln_1 is None:
        raise ValueError(EMPTY_TAPS)
    (gradient,) = _gradients_of_score(logits, labels, [taps.last_ln_1])
    with torch.no_grad():
        return weighted_activation(taps, gradient)


def weighted_activation(taps: Taps, gradient: Tensor) -> Tensor:
    """Grad-CAM's map from the gradient (N, L, D) at ln_1 of the last block."""
    if taps.last_ln_1 is None:
        raise ValueError(EMPTY_TAPS)
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
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = (one.clone() if one.is_inference() else one for one in (images, labels))  # such have no graph
        pixels = normalise(images, dtype=dtype).requires_grad_(True)  # the taps of a frozen model need a graph, too
        logits = model(pixels, taps=taps).logits
        if cam == "grad-cam":
            return grad_cam(logits, labels, taps)
        return mm_cam(logits, labels, taps, start_layer=start_layer)

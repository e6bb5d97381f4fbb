"""Class activation maps of a CLIP classifier from the taps of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.cam.own_scores import own_layer_gradients
from cammask_fast.config import Cam, check_map
from cammask_fast.kernels.cls_relevance import averaged, cls_relevance_layer
from cammask_fast.kernels.legrad import legrad
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps

CAMS = get_args(Cam)
WITHOUT_BACKWARD = ("legrad", "rollout")
"""Maps that need no graph from the logits to the taps."""
WITHOUT_GRAPH = (
    "a class activation map needs the gradients of the logits: run the model outside torch.no_grad() and "
    "torch.inference_mode(), on images or with weights that require gradients, or call `relevance_of`, which needs neither"
)
EMPTY_TAPS = "taps: expected those that were filled by the forward pass which gave the logits"


def class_score(logits: Tensor, labels: Tensor) -> Tensor:
    """The scalar that MM-CAM and Grad-CAM differentiate: the sum over the batch of each image's logit at its label."""
    return logits.gather(1, labels[:, None]).sum()


def score_weights(logits: Tensor, labels: Tensor, contrast: str = "none") -> Tensor:
    """The gradient of the explained score at the logits: 1 at each image's label, and the contrast's share at the others.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        contrast: what is subtracted from the label's logit: `none`, the `mean` of the others, or the highest of them
            (`runner-up`), one of the highest where several are equal.

    Returns:
        (N, K) in the dtype of the logits; rows of a contrast sum to 0.
    """
    at_labels = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
    if contrast == "none":
        return at_labels
    if contrast == "mean":
        return at_labels - (1 - at_labels) / (logits.shape[1] - 1)
    others = logits.masked_fill(at_labels > 0, -torch.inf)
    return at_labels.scatter_(1, others.argmax(1, keepdim=True), -1.0)


def _gradients_of_score(logits: Tensor, labels: Tensor, taps: Sequence[Tensor], contrast: str = "none") -> Sequence[Tensor]:
    """Gradients at the taps. Raises ValueError for labels that do not fit, and where there is no graph from taps to logits."""
    _check_labels(logits, labels)
    if not logits.requires_grad or not all(tap.requires_grad for tap in taps):
        raise ValueError(WITHOUT_GRAPH)
    weights = score_weights(logits.detach(), labels, contrast)
    gradients = torch.autograd.grad(logits, taps, weights, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        raise ValueError(EMPTY_TAPS)
    return gradients


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    count, classes = logits.shape
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(f"labels: expected int64 ({count},), got {labels.dtype} {tuple(labels.shape)}")
    has_values = labels.device.type == "cpu" and type(labels) is Tensor  # a fake tensor has none; a GPU's would be waited for
    if count and has_values and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def mm_cam(logits: Tensor, labels: Tensor, taps: Taps, *, start_layer: int = 0, contrast: str = "none") -> Tensor:
    """MM-CAM: the CLS row of the relevance rollout over the patches. One layer's L x L probabilities live at a time.

    Args:
        logits: (N, K) from the forward that filled `taps`; its graph is kept, and no weight gradient is computed.
        labels: int64 (N,), the class whose logit is explained.
        taps: queries, keys, values and outputs of all layers.
        start_layer: first layer of the rollout; 0 takes all, as the paper does.
        contrast: see `score_weights`.

    Returns:
        (N, P), not normalised.

    Raises:
        ValueError: start_layer is not a layer of the model.
    """
    if not taps.outputs:
        raise ValueError(EMPTY_TAPS)
    if not isinstance(start_layer, int) or not 0 <= start_layer < len(taps.outputs):
        raise ValueError(f"cam_start_layer: expected 0..{len(taps.outputs) - 1} for this model, got {start_layer}")
    gradients = _gradients_of_score(logits, labels, taps.outputs[start_layer:], contrast)
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


def grad_cam(logits: Tensor, labels: Tensor, taps: Taps, *, contrast: str = "none") -> Tensor:
    """Grad-CAM at ln_1 of the last block: relu(sum_channels(a * sum_tokens g)) over the patches.

    The sum over tokens includes CLS.

    Args:
        logits: (N, K) from the forward that filled `taps`; its graph is kept, and no weight gradient is computed.
        labels: int64 (N,), the class whose logit is explained.
        taps: has ln_1 of the last block.
        contrast: see `score_weights`.

    Returns:
        (N, P), not normalised; may be zero everywhere.

    Raises:
        ValueError: no forward has filled the taps, or the logits have no graph.
    """
    if taps.last_ln_1 is None:
        raise ValueError(EMPTY_TAPS)
    (gradient,) = _gradients_of_score(logits, labels, [taps.last_ln_1], contrast)
    with torch.no_grad():
        return weighted_activation(taps, gradient)


def weighted_activation(taps: Taps, gradient: Tensor) -> Tensor:
    """Grad-CAM's map from the gradient (N, L, D) at ln_1 of the last block."""
    if taps.last_ln_1 is None:
        raise ValueError(EMPTY_TAPS)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    weights = gradient.sum(1, keepdim=True, dtype=dtype)  # (N, 1, D)
    return torch.relu((taps.last_ln_1.to(dtype) * weights).sum(-1))[:, 1:]


def attention_rollout(taps: Taps, *, start_layer: int = 0) -> Tensor:
    """The CLS row of the product over layers of (I + mean over heads of P) / 2: attention alone, no gradient and no class.

    The row is carried from the last layer to the first, as MM-CAM's is, by the same kernel: r + r P is its r + r (P * relu(dP))
    where every dP is 1, which unit vectors in the place of dO and V make. No L x L array outlives a layer.
    Source: attention rollout (ACL 2020).

    Args:
        taps: has queries and keys of all layers.
        start_layer: first layer of the product.

    Returns:
        (N, P), in float32 at least; with the row's share of CLS it would sum to 1.
    """
    if not taps.queries:
        raise ValueError(EMPTY_TAPS)
    keys = taps.keys[-1]
    unit = F.pad(keys.new_ones(1), (0, keys.shape[3] - 1))
    chosen = Taps(queries=taps.queries, keys=taps.keys, logsumexps=taps.logsumexps)
    chosen.values = [unit.expand_as(key) for key in taps.keys]
    units = [unit.expand_as(query) for query in taps.queries[start_layer:]]
    return cls_rollout(chosen, units) * 0.5 ** len(units)


def positive_gradients(values: Sequence[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """LeGrad's map: relu of the gradient at the attention probabilities, mean over heads and queries, sum over layers.

    Args:
        values: (N, A, L, d) per layer.
        gradients: of a class score at the attention outputs of the same layers: (N, A, L, d), or (N, A, 1, d) where only the
            CLS row is not zero.

    Returns:
        (N, P), in float32 at least, not normalised.

    Raises:
        ValueError: there are no layers, or more of one than of the other.
    """
    total = None
    for v, gradient in zip(values, gradients, strict=True):
        total = legrad(total, v, gradient)
    if total is None:
        raise ValueError(EMPTY_TAPS)
    return total.mean(1)[:, 1:] / total.shape[2]


def map_of(cam: str, taps: Taps, gradients: Iterable[Tensor], *, start_layer: int = 0) -> Tensor:
    """A map from detached taps and the gradients that it reads, (N, P).

    Args:
        cam: name of the map.
        taps: detached, of all layers.
        gradients: at ln_1 of the last block for `grad-cam`, at the attention outputs from `start_layer` on for the others; none
            for `rollout`.
        start_layer: first layer that the map takes in.

    Returns:
        (N, P), row-major patches, not normalised.
    """
    if cam == "rollout":
        return attention_rollout(taps, start_layer=start_layer)
    if cam in ("legrad", "legrad-final"):
        return positive_gradients(taps.values[start_layer:], gradients)
    gradients = list(gradients)
    return weighted_activation(taps, gradients[0]) if cam == "grad-cam" else cls_rollout(taps, gradients)


def relevance_of(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    cam: str,
    *,
    start_layer: int = 0,
    contrast: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The CAM of images at their labels.

    Args:
        model: the classifier; a frozen one will do, and autograd may be switched off around the call.
        images: uint8 (N, H, W, 3), of the model's image size.
        labels: int64 (N,), the class of each image's map.
        cam: a name of `CAMS`.
        start_layer: first layer that the map takes in; not for `grad-cam`.
        contrast: see `score_weights`; not for `rollout`.
        dtype: of the model's products, as it is stored.

    Returns:
        float32 (N, P), row-major patches, not normalised.

    Raises:
        ValueError: for an unknown map or start layer, and settings that the map cannot honour.
    """
    config = model.visual.config
    check_map(cam, start_layer=start_layer, contrast=contrast, layers=config.layers, classes=len(model.head.weight))
    taps = Taps(own_scores=cam == "legrad")
    with torch.inference_mode(False), torch.set_grad_enabled(cam not in WITHOUT_BACKWARD):
        images, labels = (one.clone() if one.is_inference() else one for one in (images, labels))  # such have no graph
        pixels = normalise(images, dtype=dtype)
        if cam not in WITHOUT_BACKWARD:
            pixels.requires_grad_(True)  # the taps of a frozen model need a graph, too
        logits = model(pixels, taps=taps).logits
        _check_labels(logits, labels)
        if cam == "rollout":
            gradients: Iterable[Tensor] = ()
        elif cam == "legrad":
            weights = {name: weight.detach() for name, weight in model.named_parameters()}
            score = score_weights(logits, labels, contrast)
            gradients = own_layer_gradients(weights, taps, score, activation=config.activation, start_layer=start_layer)
        else:
            at = [taps.last_ln_1] if cam == "grad-cam" else taps.outputs[start_layer:]
            gradients = _gradients_of_score(logits, labels, at, contrast)  # type: ignore[arg-type]
        with torch.no_grad():
            return map_of(cam, taps.detached(), gradients, start_layer=start_layer)

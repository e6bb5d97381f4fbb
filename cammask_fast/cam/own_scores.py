"""Gradients of each layer's own class score, which LeGrad takes: in closed form, without a pass through the layers above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from cammask_fast.model.vit import Taps, activation_gradient


def own_layer_gradients(
    weights: Mapping[str, Tensor], taps: Taps, score_NK: Tensor, *, activation: str, start_layer: int = 0
) -> Iterator[Tensor]:
    """Gradients of the layers' own class scores at their attention outputs.

    The score of a layer is the classifier's on the mean of the layer's tokens: s = score . head(normalise(ln_post(mean) proj)).
    All tokens of an image have the same share g / L of its gradient, so that the MLP's second matrix meets one vector per
    image. What remains per token are the products with the MLP's first matrix and the attention's projection: 5 D^2
    multiply-adds, where a backward pass through a whole layer takes 12 D^2.
    Source: LeGrad (ICCV 2025), s^l from the mean of the tokens of layer l.

    Args:
        weights: of a Classifier by name, without gradients, as the forward took them.
        taps: detached, of a forward with `own_scores`.
        score_NK: (N, K), the gradient of the score at a layer's logits.
        activation: of the model's MLPs.
        start_layer: first layer.

    Yields:
        (N, A, L, d) per layer from start_layer on, before out_proj.
    """
    pooled = torch.stack(taps.pooled[start_layer:])  # (layers, N, D)
    _, pullback = vjp(partial(_logits_of, weights), pooled)  # type: ignore[misc]
    at_pooled = pullback(score_NK.to(pooled.dtype).expand(len(pooled), -1, -1))[0] / taps.attended[0].shape[1]
    for layer, gradient in enumerate(at_pooled, start_layer):
        block, attended = f"visual.transformer.resblocks.{layer}.", taps.attended[layer]
        gradient = gradient.to(attended.dtype)
        behind = (gradient @ weights[f"{block}mlp.c_proj.weight"])[:, None]
        at_normed = activation_gradient(behind, taps.hidden[layer], activation) @ weights[f"{block}mlp.c_fc.weight"]
        norm = partial(_layer_norm, weight=weights[f"{block}ln_2.weight"], bias=weights[f"{block}ln_2.bias"])
        _, through_norm = vjp(norm, attended)  # type: ignore[misc]
        at_attended = gradient[:, None] + through_norm(at_normed)[0]
        at_output = at_attended @ weights[f"{block}attn.out_proj.weight"]
        yield at_output.unflatten(-1, (taps.values[layer].shape[1], -1)).transpose(1, 2)


def _logits_of(weights: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    """What the classifier says of tokens (..., D): (..., K)."""
    normed = _layer_norm(pooled, weight=weights["visual.ln_post.weight"], bias=weights["visual.ln_post.bias"])
    features = normed.to(weights["visual.proj"].dtype) @ weights["visual.proj"]
    return F.linear(F.normalize(features, dim=-1), weights["head.weight"], weights["head.bias"]).to(pooled.dtype)


def _layer_norm(x: Tensor, *, weight: Tensor, bias: Tensor) -> Tensor:
    """As `LayerNorm` of the model does."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias).to(x.dtype)

"""Image tower plus linear head: the thing that is fine-tuned, and the frozen teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cammask_fast.model.vit import Taps, VisionTransformer


class Prediction(NamedTuple):
    """features: (N, E), before normalisation. logits: (N, K)."""

    features: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """logits = normalise(features) @ weight.T + bias.

    weight: (K, E), exp(logit_scale) times the zero-shot text weights at the start; bias: (K,), zero at the start. Both train.
    """

    def __init__(self, visual: VisionTransformer, weight: Tensor):
        super().__init__()
        if weight.ndim != 2 or weight.shape[1] != visual.config.output_dim:
            raise ValueError(f"weight: expected (K, {visual.config.output_dim}), got {tuple(weight.shape)}")
        self.visual = visual
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(
        self,
        images: Tensor,
        *,
        kept_tokens: Tensor | None = None,
        key_mask: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Prediction:
        """Classify a batch.

        Args:
            images: (N, 3, H, W) or (N, P, 3 * p * p), normalised.
            kept_tokens: see `VisionTransformer.forward`.
            key_mask: see `VisionTransformer.forward`.
            taps: see `VisionTransformer.forward`.

        Returns:
            Features (N, E) and logits (N, K).
        """
        features = self.visual(images, kept_tokens=kept_tokens, key_mask=key_mask, taps=taps)
        return Prediction(features, self.head(F.normalize(features, dim=-1)))

    def stored_in(self, dtype: torch.dtype) -> Classifier:
        """A frozen copy whose weights are those that a forward in `dtype` takes; itself where nothing would change."""
        if self.visual.conv1.weight.dtype == dtype:
            return self
        stored = self.frozen_copy()
        for name, parameter in stored.named_parameters():
            parameter.data = parameter.data if keeps_precision(name) else parameter.data.to(dtype)
        return stored

    def frozen_copy(self) -> Classifier:
        """A teacher: the same weights, no gradients, evaluation mode."""
        return copy.deepcopy(self).requires_grad_(False).eval()


def compute_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A classifier's weights as a forward in `dtype` takes them, differentiable: norms, projection and head stay as they are
    (they work on few numbers and decide the losses), everything else is cast. No copy where the type is right already."""
    return {name: value if keeps_precision(name) else value.to(dtype) for name, value in weights.items()}


class ComputeCopy:
    """A classifier's weights as a forward in `dtype` takes them, for eager steps: a cast weight is a leaf of its own, and what
    a backward pass finds there is added to the parameter's `.grad`, in the parameter's type. Leaves and gradients lie in the
    same memory in every step: a `.grad` that was set to None is given its old memory again."""

    def __init__(self, model: Classifier, dtype: torch.dtype):
        parameters = {name: p for name, p in model.named_parameters() if not keeps_precision(name)}
        self._parameters: list[Tensor] = list(parameters.values())
        self._leaves = [torch.empty_like(p, dtype=dtype).requires_grad_(p.requires_grad) for p in self._parameters]
        self._weights = dict(model.named_parameters()) | dict(zip(parameters, self._leaves, strict=True))
        self._gradients: dict[int, Tensor] = {}
        self._scratch = self._parameters[0].new_empty(0)
        for index, leaf in enumerate(self._leaves):
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(partial(self._hand_over, index))

    @torch.no_grad()
    def refreshed(self) -> dict[str, Tensor]:
        """The weights by name, with the parameters' present values."""
        torch._foreach_copy_(self._leaves, self._parameters)
        return self._weights

    def _hand_over(self, index: int, leaf: Tensor) -> None:
        parameter, gradient, leaf.grad = self._parameters[index], leaf.grad, None
        assert gradient is not None
        if parameter.grad is None:
            if index not in self._gradients:
                self._gradients[index] = torch.empty_like(parameter)
            parameter.grad = self._gradients[index].copy_(gradient)
        elif parameter.is_cuda:
            parameter.grad.add_(gradient)
        else:  # to add a tensor of another type, PyTorch would cast it into new memory, which costs more than the sum
            if len(self._scratch) < gradient.numel():
                self._scratch = parameter.new_empty(gradient.numel())
            parameter.grad.add_(self._scratch[: gradient.numel()].view_as(gradient).copy_(gradient))


def keeps_precision(name: str) -> bool:
    """Whether a parameter is never cast: layer norms, visual.proj, the head."""
    return ".ln_" in name or name in ("visual.proj", "head.weight", "head.bias")


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end over all parameters, the head included (WiSE-FT).

    Args:
        start: weights by name, as the zero-shot model has them.
        end: weights by name, as the fine-tuned model has them.
        alpha: 0 gives start, 1 gives end.

    Returns:
        New tensors by name.

    Raises:
        ValueError: the two hold different parameters.
    """
    if start.keys() != end.keys():
        raise ValueError("the two state dicts hold different parameters: they are not of one architecture")
    return {name: torch.lerp(start[name], end[name], alpha) for name in start}

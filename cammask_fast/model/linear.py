"""Linear layers: x Wᵀ + b, with oneDNN's products where PyTorch itself would not take them.

On a CPU PyTorch multiplies float32 matrices with its BLAS. At the sizes of a ViT's layers, a few hundred tokens, oneDNN is
faster (PyTorch carries it for 16-bit products and its compiler); it takes a transposed weight as it lies, so it serves the
gradient at the input too. Everywhere else `linear` is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_state = threading.local()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., I). weight: (O, I). bias: (O,). Returns (..., O)."""
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def gradients_at(inputs: Sequence[Tensor], output: Tensor, cotangent: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of `output` at activations, with no weight gradient computed on the way; the graph is kept. cotangent: like
    output, which is a scalar without one."""
    with _weight_gradients("left out"):
        return torch.autograd.grad(output, list(inputs), cotangent, retain_graph=True)


def backward(outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """torch.autograd.backward, but a weight that has a `.grad` already gets its gradient added there by the product that
    computes it, without a copy in between."""
    with _weight_gradients("added"):
        torch.autograd.backward(list(outputs), list(cotangents))


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not _ONEDNN:
        return False
    return x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """x: (M, I). weight: (O, I). bias: (O,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        at_x, at_weight, at_bias = ctx.needs_input_grad
        at_weights = getattr(_state, "weight_gradients", "returned")
        if at_weights == "left out":
            at_weight = at_bias = False
        elif at_weights == "added" and at_weight and weight.is_leaf and weight.grad is not None:
            torch.addmm(weight.grad, grad.t(), x, out=weight.grad)
            at_weight = False
        return (
            _product(grad, weight.t()) if at_x else None,
            grad.t() @ x if at_weight else None,
            grad.sum(0) if at_bias else None,
        )


@contextmanager
def _weight_gradients(what: str) -> Iterator[None]:
    """What becomes of the weight gradients of a backward pass: `returned` to autograd, `left out` or `added` to `.grad`.
    Autograd tells a function written in Python which inputs require a gradient, not which gradients were asked for."""
    _state.weight_gradients = what
    try:
        yield
    finally:
        _state.weight_gradients = "returned"


if _ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(x_shape) * int(weight_shape[0])

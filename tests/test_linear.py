"""Linear layers on oneDNN: PyTorch's values and gradients within float32's own error, and no weight gradient unasked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.step.memory import LiveStorages
from bench.step.work import count_flops
from cammask_fast.model import linear as linear_module
from cammask_fast.model.linear import backward, gradients_at, linear

needs_onednn = pytest.mark.skipif(not linear_module._ONEDNN, reason="this PyTorch was built without oneDNN")
SHAPES = [(2, 197, 768, 96), (3, 1, 7, 5), (1, 50, 33, 64), (4, 65, 96, 288)]


def values_and_gradients(function: object, inputs: list[Tensor | None], cotangent: Tensor) -> list[Tensor]:
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], cotangent)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("count", "length", "width", "out"), SHAPES)
def test_values_and_gradients_are_as_exact_as_pytorchs(count: int, length: int, width: int, out: int, biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(count, width, length).mT  # not contiguous
    inputs = [x, torch.randn(out, width), torch.randn(out) if biased else None]
    cotangent = torch.randn(count, out, length).mT
    exact = values_and_gradients(F.linear, [t if t is None else t.double() for t in inputs], cotangent.double())
    plain = values_and_gradients(F.linear, inputs, cotangent)
    ours = values_and_gradients(linear, inputs, cotangent)
    for name, gold, theirs, found in zip(("value", "x", "weight", "bias"), exact, plain, ours, strict=False):
        assert found.shape == gold.shape
        assert found.dtype == torch.float32
        scale = gold.abs().max()
        allowed = 2 * (theirs - gold).abs().max() / scale + 4 * torch.finfo(torch.float32).eps
        assert (found - gold).abs().max() / scale <= allowed, name


@needs_onednn
def test_float32_on_a_cpu_takes_onednn_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    product = linear_module._product

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(x.dtype)
        return product(x, weight, bias)

    monkeypatch.setattr(linear_module, "_product", noted)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    graph_breaks_are_errors = torch.compile(linear, backend="eager", fullgraph=True)
    graph_breaks_are_errors(torch.randn(3, 4), torch.randn(5, 4))
    assert linear(torch.randn(3, 4, device="meta"), torch.randn(5, 4, device="meta")).shape == (3, 5)
    assert calls == []
    linear(torch.randn(3, 4), torch.randn(5, 4))
    assert calls == [torch.float32]


def test_no_weight_gradient_unless_asked_for() -> None:
    x, weight, bias = (
        torch.randn(6, 4, requires_grad=True),
        torch.randn(5, 4, requires_grad=True),
        torch.zeros(5, requires_grad=True),
    )
    hidden = 2 * x
    out = linear(hidden, weight, bias)
    product = 2 * 6 * 4 * 5
    found: list[Tensor] = []
    assert count_flops(lambda: found.extend(gradients_at([hidden], out, torch.ones_like(out)))) == product
    assert torch.allclose(found[0], weight.sum(0).expand(6, 4))
    assert weight.grad is bias.grad is x.grad is None
    assert count_flops(lambda: out.sum().backward()) == 2 * product, "the graph is kept, and weights have their gradients again"
    assert weight.grad is not None
    assert bias.grad is not None


def test_a_failed_pullback_leaves_weight_gradients_on() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with pytest.raises(RuntimeError):
        gradients_at([torch.zeros(3, requires_grad=True)], linear(x, weight).sum())
    linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), torch.zeros(5, requires_grad=True)
    product = 2 * 6 * 4 * 5
    assert count_flops(lambda: linear(x, weight, bias).sum().backward()) == 2 * product
    assert torch.equal(bias.grad, torch.full((5,), 6.0))  # type: ignore[arg-type]


def test_a_step_adds_weight_gradients_where_they_lie() -> None:
    """No tensor of a weight's size is made on the way, and a gradient that was there stays in the sum."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True), torch.zeros(5, requires_grad=True)
    cotangent = torch.randn(6, 5)
    backward([linear(x, weight, bias)], [cotangent])
    assert weight.grad is not None
    assert torch.allclose(weight.grad, cotangent.t() @ x)
    place, before = weight.grad.data_ptr(), weight.grad.clone()
    out = linear(x, weight, bias)
    with LiveStorages([x, weight, bias, weight.grad, cotangent, out]) as memory:
        backward([out], [cotangent])
    assert memory.peak < weight.nbytes
    assert weight.grad.data_ptr() == place
    assert torch.allclose(weight.grad, 2 * before)
    assert torch.allclose(bias.grad, 2 * cotangent.sum(0))  # type: ignore[arg-type]
    (returned,) = torch.autograd.grad(linear(x, weight, bias), weight, cotangent)
    assert torch.allclose(returned, before), "asked for in autograd's own way, a gradient is returned"
    assert torch.allclose(weight.grad, 2 * before)
    half = weight[:3]
    backward([linear(x, half)], [cotangent[:, :3]])
    assert torch.allclose(weight.grad[:3], 3 * before[:3]), "a view's gradient reaches the whole"

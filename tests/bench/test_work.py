"""Counted work: formulas, and refusal of what has none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.step.race import ARCHS
from bench.step.work import PRODUCTS, UncountedOperator, count_flops, forward_unit
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer


@torch.library.custom_op("cammask_test::product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def test_two_operations_per_multiply_add() -> None:
    x, weight = torch.randn(3, 5, 7), torch.randn(11, 7, requires_grad=True)
    forward = 2 * 3 * 5 * 7 * 11
    assert count_flops(lambda: F.linear(x, weight)) == forward
    assert count_flops(lambda: F.linear(x, weight, torch.randn(11))) == forward
    assert count_flops(lambda: F.linear(x, weight).sum().backward()) == 2 * forward, "x needs no gradient"
    assert count_flops(lambda: torch.softmax(x, -1).exp().sum()) == 0


def test_attention_counts_with_what_its_backward_recomputes() -> None:
    """Two products forward; five backward, one of them the scores once more. The same in every version of PyTorch."""
    q, k, v = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 17 * 17 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach())) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * product


def test_an_operator_without_a_formula_is_refused() -> None:
    a = torch.randn(4, 4)
    with pytest.raises(UncountedOperator, match="cammask_test::product"):
        count_flops(lambda: _product(a, a))
    with pytest.raises(UncountedOperator, match="aten::addmm_:"):
        count_flops(lambda: torch.zeros(4, 4).addmm_(a, a))
    images, cam = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.rand(2, 4)
    assert count_flops(lambda: counterfactual_batch(images, cam, torch.tensor([1, 0]), threshold=0.3)) == 0


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("mm", True), ("addmm_", True), ("_scaled_mm", True), ("_int_mm", True), ("addmv", True), ("vdot", True),
        ("bmm_", True), ("matmul", True), ("linear_backward", True), ("_efficient_attention_forward", True),
        ("slow_conv3d", True), ("_scaled_dot_product_attention_math_for_mps", True), ("lstm_cell", True),
        ("add", False), ("mul", False), ("native_layer_norm", False), ("linalg_vector_norm", False),
        ("lerp", False), ("softmax", False), ("clamp_min", False), ("linspace", False), ("common", False),
    ],
)  # fmt: skip
def test_operators_whose_names_say_that_they_multiply_matrices(name: str, *, works: bool) -> None:
    assert bool(PRODUCTS.search(name)) == works


@pytest.mark.parametrize(("arch", "gigaflops"), [("ViT-B/32", 8.82), ("ViT-B/16", 35.13), ("ViT-L/14", 162.0)])
def test_one_forward_unit(arch: str, gigaflops: float) -> None:
    """By hand: 12 D² L in the linear layers of a block, 2 D L² in its attention; patch embedding, projection and head."""
    vit = ARCHS[arch]
    with FakeTensorMode():
        unit = forward_unit(Classifier(VisionTransformer(vit), torch.zeros(1000, vit.output_dim)), 2) / 2
    length, width = vit.patches + 1, vit.width
    blocks = vit.layers * (12 * width**2 * length + 2 * width * length**2)
    ends = vit.patches * 3 * vit.patch_size**2 * width + width * vit.output_dim + 1000 * vit.output_dim
    assert unit == 2 * (blocks + ends)
    assert unit / 1e9 == pytest.approx(gigaflops, abs=0.05)

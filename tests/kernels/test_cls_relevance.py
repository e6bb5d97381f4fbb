"""cls_relevance against the written-out L x L rollout, element by element in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cammask_fast.kernels.reference import cls_relevance


def attention_inputs(
    count: int, heads: int, length: int, width: int, *, layers: int, seed: int = 0
) -> list[tuple[Tensor, ...]]:
    """(q, k, v, grad_out) per layer, float64 (N, A, L, d); in the last layer only the CLS row of the gradient is not zero."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, heads, length, width)
    tensors = [[torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qkvg"] for _ in range(layers)]
    tensors[-1][3][:, :, 1:] = 0
    return [tuple(layer) for layer in tensors]


def attended(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> Tensor:
    """A_bar of one image: mean over heads of relu(P * dP), (L, L), with loops over heads and queries."""
    heads, length, width = k.shape
    total = torch.zeros(length, length, dtype=torch.float64)
    for head in range(heads):
        for i in range(length):
            scores = torch.stack([(q[head, i] * k[head, j]).sum() / math.sqrt(width) for j in range(length)])
            exponentials = (scores - scores.max()).exp()
            probabilities = exponentials / exponentials.sum()
            gradients = torch.stack([(grad_out[head, i] * v[head, j]).sum() for j in range(length)])
            total[i] += (probabilities * gradients).clamp_min(0)
    return total / heads


def rollout(layers: list[tuple[Tensor, ...]]) -> Tensor:
    """Row CLS of R, (N, L): R = I, then R += A_bar R from the first layer to the last, on whole matrices."""
    rows = []
    for image in range(len(layers[0][0])):
        R = torch.eye(layers[0][0].shape[2], dtype=torch.float64)
        for layer in layers:
            R = R + attended(*(tensor[image] for tensor in layer)) @ R
        rows.append(R[0])
    return torch.stack(rows)


def row_by_row(layers: list[tuple[Tensor, ...]], *, cls_only_last: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same through cls_relevance: the CLS row alone, from the last layer to the first."""
    count, _, length, _ = layers[0][0].shape
    relevance = torch.zeros(count, length, dtype=dtype)
    relevance[:, 0] = 1
    for index in reversed(range(len(layers))):
        q, k, v, grad_out = (tensor.to(dtype) for tensor in layers[index])
        if cls_only_last and index == len(layers) - 1:
            q, grad_out = q[:, :, :1], grad_out[:, :, :1]
        relevance = cls_relevance(relevance, q, k, v, grad_out)
    return relevance


@pytest.mark.parametrize("cls_only_last", [True, False])
def test_equals_the_full_rollout_over_layers(cls_only_last: bool) -> None:
    layers = attention_inputs(2, 2, 10, 4, layers=3)
    torch.testing.assert_close(row_by_row(layers, cls_only_last=cls_only_last), rollout(layers), rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(2, 7),
    width=st.integers(1, 5),
    depth=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_equals_the_full_rollout_at_any_shape(count: int, heads: int, length: int, width: int, depth: int, seed: int) -> None:
    layers = attention_inputs(count, heads, length, width, layers=depth, seed=seed)
    torch.testing.assert_close(row_by_row(layers, cls_only_last=True), rollout(layers), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [37, 50, 65, 197])
def test_odd_token_counts_and_the_error_of_float32(length: int) -> None:
    layers = attention_inputs(1, 2, length, 16, layers=2, seed=length)
    (q, k, v, g), expected = layers[0], torch.eye(length, dtype=torch.float64)
    for Q, K, V, G in layers:
        expected = expected + (torch.softmax(Q @ K.mT / 4, -1) * (G @ V.mT)).clamp_min(0).mean(1)[0] @ expected
    torch.testing.assert_close(row_by_row(layers, cls_only_last=True)[0], expected[0], rtol=1e-12, atol=1e-12)
    single = row_by_row(layers, cls_only_last=True, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single[0].double(), expected[0], rtol=0, atol=1e-5 * expected[0].max().item())
    one = torch.full((1, length), 1 / length, dtype=torch.float64)
    by_loops = one[0] @ attended(q[0], k[0], v[0], g[0]) + one[0] if length < 60 else None
    if by_loops is not None:
        torch.testing.assert_close(cls_relevance(one, q, k, v, g)[0], by_loops, rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter_and_inputs_stay_as_they_are() -> None:
    ((q, k, v, g),) = attention_inputs(3, 2, 9, 4, layers=1)
    relevance = torch.rand(3, 9, dtype=torch.float64)
    expected = cls_relevance(relevance, q, k, v, g)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v, g)]
    wide = torch.stack([relevance, relevance], -1)[..., 0]
    assert not any(tensor.is_contiguous() for tensor in (*strided, wide))
    copies = [tensor.clone() for tensor in (wide, *strided)]
    assert torch.equal(cls_relevance(wide, *strided), expected)
    assert all(torch.equal(a, b) for a, b in zip(copies, (wide, *strided), strict=True))


def test_negative_gradients_add_nothing_and_relevance_only_grows() -> None:
    ((q, k, v, g),) = attention_inputs(2, 2, 6, 4, layers=1)
    relevance = torch.rand(2, 6, dtype=torch.float64)
    assert torch.equal(cls_relevance(relevance, q, k, v.abs(), -g.abs()), relevance)
    assert (cls_relevance(relevance, q, k, v, g) >= relevance).all()


def test_large_scores_stay_finite() -> None:
    ((q, k, v, g),) = attention_inputs(1, 1, 5, 4, layers=1)
    assert cls_relevance(torch.ones(1, 5), *(t.float() for t in (1e4 * q, 1e4 * k, v, g))).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("relevance", [(2, 8), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 9, 4)]),
        ("v", [(2, 9), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 8, 4), (2, 3, 9, 4)]),
        ("q", [(2, 9), (2, 3, 2, 4), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 2, 4)]),
        ("q", [(2, 9), (2, 3, 9, 5), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 9, 5)]),
        ("grad_out", [(2, 9), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 9, 4), (2, 3, 1, 4)]),
    ],
)
def test_mismatched_shapes_name_the_argument(name: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cls_relevance(*(torch.zeros(shape) for shape in shapes))

"""cls_relevance: the reference against the written-out L x L rollout; then the op and the kernels against the reference."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from cammask_fast.kernels.backend import INTERPRETED
from cammask_fast.kernels.cls_relevance import (
    ALL_KEYS,
    SHARED,
    all_keys,
    averaged,
    cls_relevance_ineligible,
    cls_relevance_layer,
    needs_statistics,
    plan_cls_relevance,
)
from cammask_fast.kernels.cls_relevance import cls_relevance as kernel_cls_relevance
from cammask_fast.kernels.launch import Launch
from cammask_fast.kernels.reference import cls_relevance

DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if torch.cuda.is_available() else ()))


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
    for function in (cls_relevance, kernel_cls_relevance):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            function(*(torch.zeros(shape) for shape in shapes))


def test_other_arguments_that_do_not_fit_are_named() -> None:
    r, x = torch.zeros(2, 9), torch.zeros(2, 3, 9, 32)
    with pytest.raises(
        ValueError, match=r"^added: expected torch.float32 \(2, 3, 9\) on cpu, got torch.float32 \(2, 2, 9\) on cpu"
    ):
        cls_relevance_layer(r, torch.zeros(2, 2, 9), x, x, x, x)
    for name, arguments in {
        "k": (r, x, x[0], x, x),
        "relevance": (r.half(), x, x, x, x),
        "q": (r, x.half(), x, x, x),
        "v": (r, x, x, x.double(), x),
        "grad_out": (r, x, x, x, x.half()),
        "lse": (r, x, x, x, x, torch.zeros(2, 3, 8)),
        "lse: expected torch.float32 (2, 3, 9), got torch.float16": (r, x, x, x, x, torch.zeros(2, 3, 9).half()),
    }.items():
        lse = arguments[5] if len(arguments) == 6 else None
        for function in (cls_relevance, kernel_cls_relevance):
            with pytest.raises(ValueError, match=f"^{re.escape(name)}"):
                function(*arguments[:5], lse=lse)
    with pytest.raises(ValueError, match=r"^relevance: expected the device of k, cpu, got meta"):
        kernel_cls_relevance(r.to("meta"), x, x, x, x)


def layer(
    count: int,
    heads: int,
    length: int,
    width: int,
    *,
    dtype: torch.dtype,
    last: bool = False,
    seed: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """(relevance, q, k, v, grad_out); q, k, v are views of a packed projection (N, L, 3D), as the model has them."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(count, length, 3 * heads * width, generator=generator).to(dtype)
    q, k, v = (part.unflatten(-1, (heads, width)).transpose(1, 2) for part in packed.chunk(3, -1))
    grad_out = torch.randn(count, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
    relevance = torch.rand(count, length, generator=generator)
    q = (q * scale**0.5).to(dtype) if scale != 1 else q
    k = (k * scale**0.5).to(dtype) if scale != 1 else k
    return (relevance, q[:, :, :1], k, v, grad_out[:, :, :1]) if last else (relevance, q, k, v, grad_out)


def statistics(q: Tensor, k: Tensor) -> Tensor:
    """lse as flash attention returns it: float32, natural."""
    return torch.logsumexp(q.double() @ k.double().mT * k.shape[-1] ** -0.5, -1).float()


def assert_twice_as_good(ours: Tensor, pytorch: list[Tensor], gold: Tensor) -> None:
    """Largest and mean error at most twice PyTorch's in the same dtype, plus one float32 epsilon of the largest value."""
    unit = torch.finfo(torch.float32).eps * gold.abs().max().item()
    ours_error, pytorch_error = ((x.cpu().double() - gold).abs() for x in (ours, torch.stack(pytorch)))
    assert ours_error.max().item() <= 2 * pytorch_error.max().item() + unit
    assert ours_error.mean().item() <= 2 * pytorch_error.mean().item() + unit


def in_orders(inputs: tuple[Tensor, ...], lse: Tensor | None, *, count: int = 32) -> list[Tensor]:
    """PyTorch's result with the channels of each head in `count` orders, the given one first: the same sums, rounded otherwise.

    How exact PyTorch is shows over many roundings only: one of them is, on four numbers, at times five times better than usual.
    """
    width, generator = inputs[1].shape[-1], torch.Generator().manual_seed(0)
    orders = [torch.arange(width), *(torch.randperm(width, generator=generator) for _ in range(count - 1))]
    relevance, *heads = inputs
    return [cls_relevance(relevance, *(x[..., order.to(x.device)] for x in heads), lse=lse) for order in orders]


def check_kernel(inputs: tuple[Tensor, ...], device: torch.device) -> None:
    gold = cls_relevance(*(x.double() for x in inputs))
    moved = tuple(x.to(device) for x in inputs)
    for lse in (None, statistics(inputs[1], inputs[2]).to(device)):
        pytorch = in_orders(moved, lse)
        ours = kernel_cls_relevance(*moved, lse=lse)
        assert ours.dtype == torch.float32
        assert ours.shape == gold.shape
        assert_twice_as_good(ours, pytorch, gold)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("count", "heads", "length", "width"),
    [(1, 2, 50, 64), (3, 1, 65, 32), (1, 2, 100, 32), (1, 1, 129, 64), (1, 1, 197, 64), (1, 1, 257, 64)],
)
def test_kernel_is_as_exact_as_pytorch(
    triton_backend: torch.device, dtype: torch.dtype, last: bool, count: int, heads: int, length: int, width: int
) -> None:
    check_kernel(layer(count, heads, length, width, dtype=dtype, last=last), triton_backend)


@pytest.mark.triton
@pytest.mark.parametrize(("length", "heads", "dtype"), [(18, 3, torch.float32), (65, 3, torch.float16)], ids=str)
def test_layers_in_a_row_average_the_heads_on_the_way(
    triton_backend: torch.device, length: int, heads: int, dtype: torch.dtype
) -> None:
    """In the programs of the next layer, for 3 heads in a block of 4; also in a layer of one query."""
    tops = [layer(1, heads, length, 32, dtype=dtype, last=last, seed=seed) for seed, last in enumerate((True, False, True))]
    tops = [tuple(x.to(triton_backend) for x in inputs) for inputs in tops]
    row, averages = tops[0][0], [tops[0][0]]
    added: Tensor | None = None
    for _, *layer_inputs in tops:
        before = averaged(row, added)
        row, added = cls_relevance_layer(row, added, *layer_inputs)
        assert added.shape == (1, heads, length)
        torch.testing.assert_close(row, before, rtol=1e-6, atol=0)
        averages.append(kernel_cls_relevance(averages[-1], *layer_inputs))
        torch.testing.assert_close(averaged(row, added), averages[-1], rtol=1e-5, atol=0)
    assert added is not None
    strided = torch.stack([added, added], -1)[..., 0]
    assert torch.equal(cls_relevance_layer(row, strided, *tops[1][1:])[1], cls_relevance_layer(row, added, *tops[1][1:])[1])


def test_plain_layers_in_a_row_are_the_rollout() -> None:
    layers = attention_inputs(2, 2, 10, 4, layers=3)
    row, added = torch.eye(10, dtype=torch.float64)[:1].repeat(2, 1), None
    for inputs in reversed(layers):
        row, added = cls_relevance_layer(row, added, *inputs)
    torch.testing.assert_close(averaged(row, added), rollout(layers), rtol=1e-12, atol=1e-12)
    given = torch.rand(2, 2, 10, dtype=torch.float64)
    out = averaged(*cls_relevance_layer(row, given, *layers[0]))
    torch.testing.assert_close(out, cls_relevance(row + given.mean(1), *layers[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.triton
def test_programs_with_some_of_the_keys(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shared memory is small, 16-bit inputs go the way of float32."""
    monkeypatch.setattr("cammask_fast.kernels.cls_relevance._shared_memory", lambda _: 16 * 1024)
    check_kernel(layer(1, 2, 100, 64, dtype=torch.float16), triton_backend)


@pytest.mark.triton
@pytest.mark.parametrize("last", [False, True])
def test_kernel_at_the_greatest_length(triton_backend: torch.device, last: bool) -> None:
    check_kernel(layer(1, 1, 577, 32, dtype=torch.float16, last=last), triton_backend)


@pytest.mark.triton
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(2, 70),
    width=st.sampled_from([32, 64]),
    dtype=st.sampled_from(DTYPES),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_at_any_shape(
    triton_backend: torch.device, count: int, heads: int, length: int, width: int, dtype: torch.dtype, last: bool, seed: int
) -> None:
    check_kernel(layer(count, heads, length, width, dtype=dtype, last=last, seed=seed), triton_backend)


@pytest.mark.triton
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-6, torch.float32), (30.0, torch.float32), (1e4, torch.float32), (1e-6, torch.float16), (300.0, torch.float16)],
    ids=str,
)
def test_kernel_on_tiny_and_confident_and_huge_scores(
    triton_backend: torch.device, scale: float, last: bool, dtype: torch.dtype
) -> None:
    check_kernel(layer(2, 1, 50, 64, dtype=dtype, last=last, scale=scale), triton_backend)


@pytest.mark.triton
@pytest.mark.parametrize("last", [False, True])
def test_no_probability_is_above_one_where_lse_is_rounded_down(triton_backend: torch.device, last: bool) -> None:
    """At scores of 1e6 the next lower float32 is up to 6 % away in exp. One query of each image counts, so that nothing is
    added to its r P relu(dP) <= r relu(dP)."""
    _, q, k, v, grad_out = layer(16, 1, 50, 32, dtype=torch.float32, last=last, scale=1e6)
    lse = torch.nextafter(statistics(q, k), torch.tensor(-math.inf))
    assert 1e5 < lse.max() < 1e8
    relevance = torch.zeros(16, 50)
    relevance[range(16), [0 if last else 3 * image for image in range(16)]] = 1.0
    out = kernel_cls_relevance(
        *(x.to(triton_backend) for x in (relevance, q, k, v, grad_out)), lse=lse.to(triton_backend)
    ).cpu()
    gradients = torch.relu(grad_out.double() @ v.double().mT)[:, 0]
    most = relevance + (relevance[:, None, : q.shape[2]].double() @ gradients)[:, 0]
    assert (out <= most * (1 + 1e-5)).all()
    assert ((out > relevance) & out.double().isclose(most)).any(), "some keys take all of a query's attention"


@pytest.mark.triton
@pytest.mark.parametrize("last", [False, True])
def test_kernel_on_zero_relevance_zero_gradients_and_the_top_row(triton_backend: torch.device, last: bool) -> None:
    relevance, q, k, v, grad_out = (x.to(triton_backend) for x in layer(2, 2, 50, 32, dtype=torch.float32, last=last))
    nothing = torch.zeros_like(relevance)
    assert torch.equal(kernel_cls_relevance(nothing, q, k, v, grad_out), nothing)
    assert torch.equal(kernel_cls_relevance(relevance, q, k, v, grad_out * 0), relevance)
    top = nothing.index_fill(1, torch.tensor([0], device=nothing.device), 1.0)
    whole, row = (kernel_cls_relevance(top, a, k, v, b) for a, b in ((q, grad_out), (q[:, :, :1], grad_out[:, :, :1])))
    torch.testing.assert_close(whole, row)


@pytest.mark.triton
@pytest.mark.parametrize("argument", ["q", "k", "v", "grad_out", "relevance"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_nan_reaches_the_output(triton_backend: torch.device, argument: str, last: bool, dtype: torch.dtype) -> None:
    inputs = dict(zip(("relevance", "q", "k", "v", "grad_out"), layer(2, 1, 50, 32, dtype=dtype, last=last), strict=True))
    inputs = {name: value.clone().to(triton_backend) for name, value in inputs.items()}
    inputs[argument][1][..., 0] = math.nan
    out = kernel_cls_relevance(**inputs)
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


@pytest.mark.triton
def test_kernel_takes_contiguous_and_wider_strides(triton_backend: torch.device) -> None:
    relevance, q, k, v, grad_out = (x.to(triton_backend) for x in layer(2, 2, 37, 32, dtype=torch.float32))
    expected = kernel_cls_relevance(relevance, q, k, v, grad_out)
    assert torch.equal(kernel_cls_relevance(relevance, *(x.contiguous() for x in (q, k, v, grad_out))), expected)
    spread = torch.stack([relevance, relevance], -1)[..., 0]
    padded = torch.nn.functional.pad(v, (0, 5))[..., :32]
    assert torch.equal(kernel_cls_relevance(spread, q, k, padded, grad_out), expected)


@pytest.mark.triton
def test_equal_inputs_give_equal_bits(triton_backend: torch.device) -> None:
    inputs = tuple(x.to(triton_backend) for x in layer(2, 3, 65, 64, dtype=torch.float16))
    assert torch.equal(kernel_cls_relevance(*inputs), kernel_cls_relevance(*inputs))


def planned(
    length: int,
    *,
    has_lse: bool,
    last: bool = False,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    shared: int = SHARED,
) -> list[Launch]:
    x = torch.empty(2, 3, length, width, dtype=dtype, device="meta")
    q = x[:, :, :1] if last else x
    r, added = torch.empty(2, length, device="meta"), torch.empty(2, 3, length, device="meta")
    lse = torch.empty(q.shape[:3], device="meta") if has_lse else None
    scratch = torch.empty(2, *x.shape[:3], device="meta") if needs_statistics(q, x, lse, shared) else None
    return plan_cls_relevance(r, added, scratch, r, added, q, x, x, q, lse, shared=shared)


def launches(length: int, **options: Any) -> list[str]:
    plan = planned(length, **options)
    names = [launch.kernel.__name__.removeprefix("_cls_relevance_").removesuffix("fwd_kernel") for launch in plan]
    return [name + launch.arguments.get("STATISTICS", "") for name, launch in zip(names, plan, strict=True)]


def test_a_layer_is_one_launch_unless_statistics_come_first() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for length in (50, 197, 257, 577):
            assert launches(length, has_lse=True, dtype=dtype) == ["lse"]
            for has_lse in (False, True):
                assert launches(length, has_lse=has_lse, last=True, dtype=dtype) == ["row_"]
    for length in (50, 197, 257):
        assert launches(length, has_lse=False, dtype=torch.bfloat16) == ["inside"]
    for options in ({"length": 50}, {"length": 577, "dtype": torch.bfloat16}, {"length": 258, "dtype": torch.float16}):
        assert launches(**options, has_lse=False) == ["statistics_", "scratch"]


def test_a_program_has_all_keys_where_its_shared_memory_holds_them() -> None:
    """64 KiB, as on Turing, hold those of ViT-B/32, or of narrow heads."""
    turing = 64 * 1024
    assert launches(197, has_lse=False, dtype=torch.bfloat16, shared=turing) == ["statistics_", "scratch"]
    assert launches(50, has_lse=False, dtype=torch.bfloat16, shared=turing) == ["inside"]
    assert launches(197, has_lse=False, dtype=torch.bfloat16, width=32, shared=turing) == ["inside"]
    for length in range(2, 258):
        tiles, apart = all_keys(length, 64, 2) or pytest.fail(f"{length} tokens")
        assert tiles.block_keys + apart >= length
        assert tiles.block_keys == 64 or tiles.block_keys // 2 + apart < length
        assert tiles in ALL_KEYS.values()
    assert [length for length in range(2, 300) if (all_keys(length, 64, 2) or (None, False))[1]] == [65, 129, 257]
    assert all_keys(258, 64, 2) is all_keys(197, 64, 4) is None
    (launch,) = planned(257, has_lse=True, dtype=torch.bfloat16)
    assert launch.grid == (2 * 3,)
    assert launch.arguments["CLS_APART"] == 1
    assert launch.arguments["BLOCK_K"] == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 64])
def test_both_passes_round_a_score_in_the_same_tile(width: int, dtype: torch.dtype) -> None:
    statistics_launch, layer_launch = planned(577, has_lse=False, width=width, dtype=dtype)
    for name in ("BLOCK_Q", "BLOCK_K", "HEAD_DIM", "PRECISION"):
        assert statistics_launch.arguments[name] == layer_launch.arguments[name], name
    assert statistics_launch.options == layer_launch.options


@pytest.mark.parametrize("last", [False, True])
def test_the_op_is_registered_as_torch_wants_it(last: bool) -> None:
    inputs = layer(2, 2, 9, 32, dtype=torch.float32, last=last)
    op = torch.ops.cammask.cls_relevance.default
    relevance, *heads = inputs
    torch.library.opcheck(op, (relevance, None, *heads, None))
    torch.library.opcheck(op, (torch.rand(9, 2).T, torch.rand(2, 2, 9), *heads, None))
    torch.library.opcheck(op, (relevance, torch.rand(9, 2, 2).T, *heads, statistics(*heads[:2])))


def test_compiles_once_for_every_batch_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def doubled(*inputs: Tensor) -> Tensor:
        return 2 * kernel_cls_relevance(*inputs)

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=counter)
    for count in (2, 3, 7):
        inputs = tuple(x.contiguous() for x in layer(count, 2, 9, 32, dtype=torch.float32, seed=count))
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(*inputs), doubled(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("last", [False, True])
def test_counted_work_is_the_references_plus_statistics_of_their_own(last: bool) -> None:
    inputs = layer(2, 3, 9, 32, dtype=torch.float32, last=last)
    lse = statistics(inputs[1], inputs[2])

    def counted(function: Any, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*inputs, **options)
        return int(counter.get_total_flops())

    reference = counted(cls_relevance)
    assert reference > 0
    assert counted(kernel_cls_relevance, lse=lse) == counted(cls_relevance, lse=lse) == reference
    assert counted(kernel_cls_relevance) == reference
    inputs = layer(1, 2, 258, 32, dtype=torch.float32, last=last)
    assert counted(kernel_cls_relevance) == counted(cls_relevance) + (0 if last else 2 * 2 * 258 * 258 * 32)


def test_statistics_at_hand_change_only_the_rounding() -> None:
    for last in (False, True):
        inputs = tuple(x.double() for x in layer(2, 2, 9, 32, dtype=torch.float32, last=last))
        lse = torch.logsumexp(inputs[1] @ inputs[2].mT * 32**-0.5, -1)
        torch.testing.assert_close(cls_relevance(*inputs, lse=lse), cls_relevance(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there Triton can run")
def test_asking_for_triton_without_a_gpu_says_why(triton_backend: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^cls_relevance: backend 'triton' needs CUDA tensors, got cpu"):
        kernel_cls_relevance(*layer(1, 1, 9, 32, dtype=torch.float32))


def test_ineligible_inputs() -> None:
    def obstacle(*inputs: Tensor) -> str:
        return str(cls_relevance_ineligible(*inputs))

    fine = layer(1, 1, 9, 32, dtype=torch.float32)
    assert obstacle(*fine) == "None"
    assert "float64" in obstacle(*(x.double() for x in fine))
    assert "relevance is torch.float64" in obstacle(fine[0].double(), *fine[1:])
    assert "48 wide" in obstacle(*layer(1, 1, 9, 48, dtype=torch.float32))
    assert "578 tokens" in obstacle(*layer(1, 1, 578, 32, dtype=torch.float32))
    assert "grad_out has stride 2" in obstacle(*fine[:4], torch.zeros(1, 1, 9, 64)[..., ::2])

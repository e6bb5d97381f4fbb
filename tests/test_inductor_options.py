"""The passes of the step: what is merged and what must not be; which attention hands its logsumexp to which relevance; which
sums are written, and which are staged; and that torch.compile takes the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from cammask_fast.config import Compile
from cammask_fast.inductor_options import (
    HandOverLogsumexp,
    MergeEqualNodes,
    StepPasses,
    SumColumnsInStages,
    WriteSumsOnce,
    inductor_options,
)
from cammask_fast.kernels.cls_relevance import cls_relevance

aten = torch.ops.aten
BF16 = torch.bfloat16


def merged(function: Callable[..., Any], *inputs: Tensor) -> tuple[GraphModule, int]:
    """The graph of a function after the pass, and how many nodes went."""
    graph = make_fx(function)(*inputs)
    before = len(graph.graph.nodes)
    MergeEqualNodes()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph, before - len(graph.graph.nodes)


def test_equal_chains_become_one() -> None:
    x, y = torch.randn(4), torch.randn(4)

    def twice(x: Tensor, y: Tensor) -> Tensor:
        return (x.exp() * y).sum(0, keepdim=True) + (x.exp() * y).sum(0, keepdim=True).sin()

    graph, gone = merged(twice, x, y)
    assert gone == 3
    assert torch.equal(graph(x, y), twice(x, y))


DIFFERENT: dict[str, Callable[[Tensor], Any]] = {
    "other argument": lambda x: aten.add.Scalar(x, 1) + aten.add.Scalar(x, 2),
    "other type of number": lambda x: (aten.full.default([2], 1), aten.full.default([2], 1.0), aten.full.default([2], True)),
    "minus zero": lambda x: (1 / aten.full.default([2], 0.0)) - (1 / aten.full.default([2], -0.0)),
    "other keyword": lambda x: x.to(torch.float16).to(torch.float32) + x.to(torch.bfloat16).to(torch.float32),
    "random numbers": lambda x: torch.rand(3) - torch.rand(3),
    "dropout": lambda x: aten.bernoulli.p(x, 0.5) + aten.bernoulli.p(x, 0.5),
    "memory to be filled": lambda x: (torch.empty(2).fill_(1.0), torch.empty(2).fill_(2.0)),
    "two results": lambda x: (x.exp(), x.exp()),
    "after a write": lambda x: (aten.mul.Tensor(x, x).sin(), x.add_(1), aten.mul.Tensor(x, x).sin()),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_stays(name: str) -> None:
    assert merged(DIFFERENT[name], torch.zeros(3))[1] == 0


def rewritten(
    rewrite: Callable[[Graph], None], function: Callable[..., Any], *inputs: Tensor, symbolic: bool = False
) -> GraphModule:
    """The graph of a function in Inductor's operators, after a pass; without it, the same numbers come out."""
    graph = make_fx(function, select_decomp_table(), tracing_mode="symbolic" if symbolic else "fake")(*inputs)
    rewrite(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def count(graph: GraphModule, target: object) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


def residual_stream(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two residual sums with a norm behind each, as in a block: x + a has two readers, and so has (x + a) + b."""
    one = x + a
    two = one + F.layer_norm(one.float(), one.shape[-1:]).to(b.dtype) * b
    return F.layer_norm(two.float(), two.shape[-1:]).to(two.dtype) + two * 2


def test_a_sum_with_several_readers_is_written() -> None:
    x, a, b = (torch.randn(2, 3, 8, dtype=BF16) for _ in range(3))
    graph = rewritten(WriteSumsOnce(), residual_stream, x, a, b)
    assert count(graph, aten.as_strided.default) == 2
    assert torch.equal(graph(x, a, b), residual_stream(x, a, b))
    (first, second) = (node for node in graph.graph.nodes if node.target is aten.as_strided.default)
    assert first.args[0].target is second.args[0].target is aten.add.Tensor
    for written in (first, second):
        assert list(written.args[0].users) == [written]
        assert len(written.users) >= 2
        assert written.meta["val"].shape == (2, 3, 8)


def test_a_rounded_result_with_several_readers_is_written() -> None:
    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x * 3).to(BF16)
        return y.sin(), y.cos()

    x = torch.randn(2, 3, 4)
    graph = rewritten(WriteSumsOnce(), rounded, x)
    assert count(graph, aten.as_strided.default) == 1
    assert all(torch.equal(a, b) for a, b in zip(graph(x), rounded(x), strict=True))


LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "one reader": (lambda x, y: (x + y).sin(), (torch.zeros(2, 3, 4, dtype=BF16),) * 2),
    "float32": (lambda x, y: (lambda s: (s.sin(), s.cos()))(x + y), (torch.zeros(2, 3, 4),) * 2),
    "narrow before": (lambda x: (lambda s: (s.sin(), s.cos()))(x.half()), (torch.zeros(2, 3, 4, dtype=BF16),)),
    "a matrix": (lambda x, y: (lambda s: (s.sin(), s.cos()))(x + y), (torch.zeros(3, 4, dtype=BF16),) * 2),
    "broadcast": (
        lambda x, y: (lambda s: (s.sin(), s.cos()))(x + y),
        (torch.zeros(2, 3, 4, dtype=BF16), torch.zeros(4, dtype=BF16)),
    ),
    "a number": (lambda x: (lambda s: (s.sin(), s.cos()))(x + 1), (torch.zeros(2, 3, 4, dtype=BF16),)),
    "made wider": (lambda x: (lambda s: (s.sin(), s.cos()))(x.float()), (torch.zeros(2, 3, 4, dtype=BF16),)),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_values_are_left_to_inductor(name: str) -> None:
    function, inputs = LEFT[name]
    assert count(rewritten(WriteSumsOnce(), function, *inputs), aten.as_strided.default) == 0


def test_a_symbolic_batch_is_left_to_inductor() -> None:
    inputs = tuple(torch.randn(2, 3, 8, dtype=BF16) for _ in range(3))
    assert count(rewritten(WriteSumsOnce(), residual_stream, *inputs, symbolic=True), aten.as_strided.default) == 0


def bias_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A pointwise result (N, L, C), its product as a matrix, and its column sums, as in the backward of a linear layer."""
    wide = x.float()
    rows = (wide * torch.sigmoid(wide)).to(x.dtype).view(-1, x.shape[-1])
    return rows @ weight, rows.sum(0, keepdim=True)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
def test_column_sums_in_stages_are_as_exact(dtype: torch.dtype, symbolic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 7, 6), (6, 3)))
    graph = rewritten(SumColumnsInStages(), bias_gradients, x, weight, symbolic=symbolic)
    (partial,) = (n for n in graph.graph.nodes if n.target is aten.sum.dim_IntList and n.args[1] == [1])
    assert partial.args[0].meta["val"].shape[1:] == (7, 6)
    assert partial.meta["val"].dtype == torch.promote_types(dtype, torch.float32)
    found, plain = graph(x, weight)[1], bias_gradients(x, weight)[1]

    wide = x.float() if dtype != torch.float64 else x
    gold = (wide * torch.sigmoid(wide)).to(dtype).double().sum((0, 1)).unsqueeze(0)
    assert found.shape == plain.shape == (1, 6)
    assert found.dtype == dtype
    ulp = torch.finfo(dtype).eps * gold.abs().max()
    assert ((found.double() - gold).abs() <= 2 * (plain.double() - gold).abs() + ulp).all()


def packed_gradients(q: Tensor, k: Tensor) -> Tensor:
    """Gradients of attention's heads (N, A, L, d), packed for one product, and their column sums."""
    heads = [t.transpose(1, 2).flatten(2) for t in (q, k)]
    return torch.cat(heads, -1).view(-1, 2 * heads[0].shape[-1]).sum(0)


def test_column_sums_of_packed_gradients_are_staged() -> None:
    q, k = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    graph = rewritten(SumColumnsInStages(), packed_gradients, q, k)
    assert count(graph, aten.sum.dim_IntList) == 2
    torch.testing.assert_close(graph(q, k), packed_gradients(q, k))


def bias_gradients_of_a_block(x: Tensor, *, keepdim: bool = False) -> list[Tensor]:
    """Column sums of six activations of different widths, each behind the one before."""
    sums = []
    for width in (6, 3, 5, 4, 2, 3):
        x = torch.tanh(x) @ torch.linspace(-1, 1, x.shape[-1] * width, dtype=x.dtype).view(-1, width)
        sums.append((x * 3).view(-1, width).sum(0, keepdim=keepdim).view(width).view(1, width))
    return [one * 2 for one in sums]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_column_sums_share_their_last_stage(dtype: torch.dtype, keepdim: bool) -> None:
    x = torch.randn(5, 7, 6).to(dtype)

    def sums(x: Tensor) -> list[Tensor]:
        return bias_gradients_of_a_block(x, keepdim=keepdim)

    graph = rewritten(SumColumnsInStages(), sums, x)
    last = [node for node in graph.graph.nodes if node.target is aten.sum.dim_IntList and node.args[1] == [0]]
    assert [node.args[0].meta["val"].shape[1] for node in last] == [6 + 3 + 5 + 4, 2 + 3]
    for found, expected in zip(graph(x), sums(x), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_a_sum_that_is_read_at_once_does_not_wait_for_another() -> None:
    """Nor does one of another number of images."""

    def read_at_once(x: Tensor) -> tuple[Tensor, ...]:
        first = x.sin().view(-1, 4).sum(0)
        second = (x * first).view(-1, 4).sum(0)
        return first, second, x[:2].cos().view(-1, 4).sum(0)

    x = torch.randn(3, 5, 4)
    graph = rewritten(SumColumnsInStages(), read_at_once, x)
    assert count(graph, aten.cat.default) == 0
    assert count(graph, aten.sum.dim_IntList) == 6
    for found, expected in zip(graph(x), read_at_once(x), strict=True):
        torch.testing.assert_close(found, expected)


NOT_STAGED: dict[str, Callable[[Tensor], Any]] = {
    "of rows": lambda x: x.sin().view(-1, 4).sum(1),
    "of everything": lambda x: x.sin().view(-1, 4).sum(),
    "over other columns": lambda x: x.sin().view(-1, 2).sum(0),
    "in another type": lambda x: x.sin().view(-1, 4).sum(0, dtype=torch.float64),
    "of a matrix": lambda x: x[0].sin().sum(0),
}


@pytest.mark.parametrize("name", NOT_STAGED)
def test_other_sums_stay_one(name: str) -> None:
    x = torch.randn(2, 3, 4)
    before = rewritten(lambda graph: None, NOT_STAGED[name], x)
    after = rewritten(SumColumnsInStages(), NOT_STAGED[name], x)
    assert [str(node.target) for node in before.graph.nodes] == [str(node.target) for node in after.graph.nodes]


@pytest.mark.parametrize("mode", [m for m in get_args(Compile) if m not in ("auto", "off")])
def test_torch_compile_takes_the_options_of_every_mode(mode: str) -> None:
    options = inductor_options(mode)
    assert isinstance(options["joint_custom_pre_pass"], StepPasses)
    torch.compile(torch.sin, options=options)


def test_the_passes_have_a_key_for_the_cache_of_compiled_graphs() -> None:
    assert StepPasses().uuid() == StepPasses().uuid() is not None


LENGTH = 37
ATTENTIONS: dict[str, Callable[..., Any]] = {
    "flash": aten._scaled_dot_product_flash_attention.default,
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True),
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True),
    "cpu": aten._scaled_dot_product_flash_attention_for_cpu.default,
}
NOTHING_TO_HAND_OVER: dict[str, Callable[..., Any]] = {
    "other keys": lambda q, k, v: aten._scaled_dot_product_flash_attention.default(q, k * 2, v),
    "other queries": lambda q, k, v: aten._scaled_dot_product_flash_attention.default(q * 2, k, v),
    "causal": lambda q, k, v: aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True),
    "other scale": lambda q, k, v: aten._scaled_dot_product_flash_attention.default(q, k, v, scale=1.0),
    "not computed": lambda q, k, v: aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False),
    "bias": lambda q, k, v: aten._scaled_dot_product_efficient_attention.default(
        q, k, v, q.new_zeros(2, 1, 1, LENGTH).expand(2, 3, q.shape[2], LENGTH), True
    ),
    "mask": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, attn_mask=q.new_zeros(2, 1, 1, LENGTH)
    ),
    "plain formula": lambda q, k, v: (torch.softmax(q @ k.mT * 32**-0.5, -1) @ v,),
}


def handed_over(attention: Callable[..., Any], *, rows: int = LENGTH) -> Any:
    """The last argument of a relevance behind an attention: a node's value, or None. No data: PyTorch's CUDA operators have
    shapes everywhere."""

    def both(r: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v)[0], cls_relevance(r, q, k, v, g)

    r, k = (torch.empty(*shape, device="meta") for shape in ((2, LENGTH), (2, 3, LENGTH, 32)))
    q = torch.empty(2, 3, rows, 32, device="meta")
    graph = make_fx(both)(r, q, k, torch.empty_like(k), torch.empty_like(q))
    HandOverLogsumexp()(graph.graph)
    graph.graph.lint()
    (call,) = (node for node in graph.graph.nodes if node.target is torch.ops.cammask.cls_relevance.default)
    return None if call.args[-1] is None else call.args[-1].meta["val"]


@pytest.mark.parametrize("rows", [LENGTH, 1])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_fused_attention_hands_its_logsumexp_over(name: str, rows: int) -> None:
    lse = handed_over(ATTENTIONS[name], rows=rows)
    assert (lse.shape, lse.dtype) == ((2, 3, rows), torch.float32)


@pytest.mark.parametrize("name", NOTHING_TO_HAND_OVER)
def test_another_softmax_is_not_handed_over(name: str) -> None:
    assert handed_over(NOTHING_TO_HAND_OVER[name]) is None


def test_a_given_logsumexp_stays() -> None:
    def with_lse(r: Tensor, q: Tensor, lse: Tensor) -> Tensor:
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)[0]
        return cls_relevance(r, q, q, q, out, lse=lse)

    graph = make_fx(with_lse)(torch.rand(2, 9), torch.randn(2, 3, 9, 32), torch.zeros(2, 3, 9))
    before = str(graph.graph)
    HandOverLogsumexp()(graph.graph)
    assert str(graph.graph) == before


def test_the_relevance_is_that_of_its_own_statistics() -> None:
    """And the next layer's finds its own attention."""

    def two_layers(r: Tensor, *layers: Tensor) -> Tensor:
        for q, k, v, g in (layers[:4], layers[4:]):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            r = cls_relevance(r, q, k, v, g * out)
        return r

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 9, 32, generator=generator, dtype=torch.float64) for _ in range(8)]
    r = torch.rand(2, 9, dtype=torch.float64)
    graph = make_fx(two_layers)(r, *inputs)
    HandOverLogsumexp()(graph.graph)
    graph.recompile()
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.cammask.cls_relevance.default]
    assert len({call.args[-1] for call in calls} - {None}) == 2
    torch.testing.assert_close(graph(r, *inputs), two_layers(r, *inputs), rtol=1e-13, atol=1e-13)


def test_inductor_runs_the_passes_over_an_inference_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = MergeEqualNodes.__call__

    def counted(self: MergeEqualNodes, graph: Any) -> None:
        before = len(graph.nodes)
        run(self, graph)
        seen.append(before - len(graph.nodes))

    monkeypatch.setattr(MergeEqualNodes, "__call__", counted)

    def fourth_power(x: Tensor) -> Tensor:  # of products alone: there is no C++ to compile
        return torch.mm(torch.mm(x, x), torch.mm(x, x))

    x = torch.randn(8, 8)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch({"fx_graph_cache": False}):
        out = torch.compile(fourth_power, options=inductor_options("default"))(x)
    assert seen == [1]
    torch.testing.assert_close(out, fourth_power(x))

"""The passes of the step: what is merged and what must not be; which attention hands its logsumexp to which relevance; and that
torch.compile takes the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from cammask_fast.config import Compile
from cammask_fast.inductor_options import HandOverLogsumexp, MergeEqualNodes, StepPasses, inductor_options
from cammask_fast.kernels.cls_relevance import cls_relevance

aten = torch.ops.aten


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

"""Merging of equal nodes: what is merged, what must not be, and that torch.compile takes the options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from cammask_fast.config import Compile
from cammask_fast.inductor_options import MergeEqualNodes, inductor_options

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
    assert isinstance(options["joint_custom_pre_pass"], MergeEqualNodes)
    torch.compile(torch.sin, options=options)


def test_the_pass_has_a_key_for_the_cache_of_compiled_graphs() -> None:
    assert MergeEqualNodes().uuid() == MergeEqualNodes().uuid() is not None


def test_inductor_runs_the_pass_over_an_inference_graph(monkeypatch: pytest.MonkeyPatch) -> None:
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

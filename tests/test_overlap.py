"""All-reduces of a compiled step run under its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import utils as inductor
from torch.func import vjp

from bench.step.overlap import generated_code, overlap, two_ranks
from cammask_fast import distributed
from cammask_fast.config import OptimConfig
from cammask_fast.distributed import sum_gradients
from cammask_fast.distributed.overlap import overlap_all_reduce, overlap_options
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness
from tests.test_step import CONFIGS, TINY, batch, pair

LAYERS, WIDTH = 4, 32


@pytest.fixture
def ranks() -> Iterator[None]:
    with two_ranks():
        yield


def perceptron(weights: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """A step of plain gradient descent with its gradients in one bucket per layer: new weights, norm of the gradients."""

    def forward(weights: list[Tensor]) -> Tensor:
        hidden = images
        for weight in weights:
            hidden = (hidden @ weight).relu()
        return hidden.square().mean()

    loss, pullback = vjp(forward, weights)[:2]
    (gradients,) = pullback(torch.ones_like(loss))
    summed, loss = sum_gradients(gradients, loss, bucket_bytes=WIDTH * WIDTH * 8)
    norm = torch.stack([gradient.square().sum() for gradient in summed]).sum().sqrt()
    return torch.stack([weight - 0.1 * gradient / norm for weight, gradient in zip(weights, summed, strict=True)]), loss


def inputs() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5 for _ in range(LAYERS)]
    return weights, torch.randn(64, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.usefixtures("ranks")
def test_buckets_travel_under_the_backward_pass_and_change_no_result() -> None:
    """Each layer's all-reduce stands before the products of the layers below it, every wait after the last product."""
    compiled = torch.compile(perceptron, fullgraph=True, options=overlap_options())
    found = overlap(generated_code(lambda: compiled(*inputs())))
    assert found.products == 3 * LAYERS - 1
    assert found.all_reduces == LAYERS
    assert found.products_after_first_all_reduce == 2 * (LAYERS - 1)
    assert found.waits_before_last_product == 0
    torch._dynamo.reset()
    for ours, theirs in zip(compiled(*inputs()), perceptron(*inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Kernel:
    """Of a schedule: what the pass asks of a node."""

    def __init__(self, name: str, *needs: str) -> None:
        self.name, self.needs = name, [SimpleNamespace(name=need.strip("()"), is_fake=need[0] == "(") for need in needs]

    def get_buffer_names(self) -> list[str]:
        return [self.name]

    @property
    def unmet_dependencies(self) -> list[SimpleNamespace]:
        return self.needs

    def is_extern(self) -> bool:
        return self.name[0] == "m"

    def is_template(self) -> bool:
        return self.name[0] == "t"


def test_buckets_at_the_end_of_the_graph_are_sent_early_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """m, t: products, p: other kernels, b: filling of buckets, a: all-reduces, w: waits, u: updates. In parentheses: the needs
    by which Inductor keeps collectives in order."""
    monkeypatch.setattr(inductor, "contains_collective", lambda node: node.name[0] == "a")
    monkeypatch.setattr(inductor, "contains_wait", lambda node: node.name[0] == "w")
    kernels = [
        Kernel("m1"), Kernel("p1", "m1"), Kernel("m2", "p1"), Kernel("t2", "p1"), Kernel("m3", "p1"), Kernel("m4", "m3"),
        Kernel("b1", "m3"), Kernel("c1", "b1"), Kernel("a1", "c1"), Kernel("w1", "a1"), Kernel("u1", "w1"),
        Kernel("b2", "t2"), Kernel("a2", "b2", "(w1)", "(a1)"), Kernel("w2", "a2"),
        Kernel("b3", "m4"), Kernel("a3", "b3", "(w2)"), Kernel("w3", "a3"), Kernel("u2", "w2", "w3", "u1"),
    ]  # fmt: skip
    ordered = [kernel.name for kernel in overlap_all_reduce(kernels)]
    expected = ["m1", "p1", "m2", "t2", "b2", "m3", "b1", "c1", "a1", "a2", "m4", "b3", "a3", "w1", "u1", "w2", "w3", "u2"]
    assert ordered == expected


def gathered(monkeypatch: pytest.MonkeyPatch, gradients: list[Tensor], loss: Tensor) -> tuple[list[int], list[Tensor], Tensor]:
    """Sizes of the buckets in the order in which they are sent to a second rank that has the same; what both sum to."""
    sent = []

    def doubled(bucket: Tensor, *_: object) -> Tensor:
        sent.append(bucket.numel())
        return 2 * bucket

    monkeypatch.setattr("torch.distributed._functional_collectives.all_reduce", doubled)
    summed, total = sum_gradients(gradients, loss, bucket_bytes=100)
    return sent, summed, total


@pytest.mark.usefixtures("ranks")
def test_gradients_in_several_buckets_come_back_to_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other sizes, the last first, and the loss with the bucket that is sent last."""
    shapes = [(3, 4), (5,), (30,), (2, 2), (7, 3)]
    gradients = [torch.full(shape, 1.0 + index).add_(torch.rand(shape)) for index, shape in enumerate(shapes)]
    sent, summed, total = gathered(monkeypatch, gradients, torch.tensor(0.75))
    assert sent == [25, 30, 18], "of 4-byte numbers: (2, 2) and (7, 3); (30,); (3, 4), (5,) and the loss"
    assert total == 1.5
    assert all(torch.equal(ours, 2 * theirs) for ours, theirs in zip(summed, gradients, strict=True))
    assert [gradient.shape for gradient in summed] == [gradient.shape for gradient in gradients]


def tiny_step(*, processes: int) -> Callable[[], Any]:
    config = replace(CONFIGS["ft"], optim=OptimConfig(lr=1e-3), epochs=1)
    student, teacher = (model.to(torch.float32) for model in pair())
    state, data = TrainState.create(student, config, steps_per_epoch=5, compiled=True), batch(8)
    draws = sample_step_randomness(build_strategy(config), data, TINY.patches, state.generator)
    step = build_train_step(state, teacher, config, processes=processes)
    return lambda: step([(data, draws)])


@pytest.mark.slow
@pytest.mark.usefixtures("ranks")
def test_the_step_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "sum_gradients", partial(sum_gradients, bucket_bytes=20_000))
    found = overlap(generated_code(tiny_step(processes=2)))
    assert found.all_reduces >= 3
    assert found.products_after_first_all_reduce >= found.products // 10
    assert found.waits_before_last_product == 0


def test_counts_of_generated_code() -> None:
    code = """
    extern_kernels.mm(a, b, out=c)
    torch.ops._c10d_functional.all_reduce_.default(c, 'sum', '0')
    extern_kernels.addmm(a, b, c)
    torch.ops._c10d_functional.wait_tensor.default(c)
    triton_tem_fused_mm_3.run(a, b)
    torch.ops._c10d_functional.wait_tensor.default(c)
    """
    assert overlap(code) == (3, 1, 2, 1)
    assert overlap("") == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="nothing was compiled"):
        generated_code(lambda: None)

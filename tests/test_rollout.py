"""What a step hands to the relevance of each layer, and what becomes of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cammask_fast.cam import maps as maps_module
from cammask_fast.cam import relevance_of
from cammask_fast.kernels.cls_relevance import averaged, cls_relevance
from cammask_fast.step import build_step
from tests.test_step import CONFIGS, FD, IN_BF16, TINY, batch, classifier, draws_for, pair, single_pair


class Relevances(TorchDispatchMode):
    """Keeps (q, k, lse) of every layer of a relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.cammask.cls_relevance.default:
            _, _, q, k, _, _, lse = args
            self.found.append((q, k, lse))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["masked-object", "masked-topk", "context-no-fill", "late-layers", "bf16", "frozen teacher"])
def test_every_relevance_is_given_the_statistics_of_its_attention(name: str) -> None:
    """Those that attention has kept for its backward pass: nothing sums exponentials a second time, and nobody would see it in
    the maps if something did."""
    config = IN_BF16["masked-object"] if name == "bf16" else CONFIGS.get(name, FD)
    (student, teacher), data = single_pair() if name == "bf16" else pair(), batch()
    with Relevances() as watch:
        if name == "frozen teacher":
            relevance_of(teacher, data.images, data.labels, "mm-cam", dtype=torch.float64)
        else:
            build_step(student, teacher, config)(data, draws_for(config, data))
    assert [q.shape[2] for q, _, _ in watch.found] == [1, *[TINY.patches + 1] * (TINY.layers - 1 - config.cam_start_layer)]
    tolerance = 1e-4 if name == "bf16" else 1e-13
    for q, k, lse in watch.found:
        assert lse is not None
        expected = torch.logsumexp(q.double() @ k.double().mT * q.shape[-1] ** -0.5, -1)
        torch.testing.assert_close(lse.double(), expected, rtol=0, atol=tolerance)


def test_the_rollout_hands_on_what_each_head_has_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernels return a layer: r as it came down, and every head's share apart."""

    def head_by_head(
        relevance: Tensor, added: Tensor | None, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, *, lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        row, shares = averaged(relevance, added), []
        for head in range(k.shape[1]):
            of_head = (x[:, head : head + 1] for x in (q, k, v, gradient))
            shares.append(cls_relevance(row, *of_head, lse=None if lse is None else lse[:, head : head + 1]) - row)
        return row, torch.stack(shares, 1)

    data, student = batch(), classifier()
    expected = relevance_of(student, data.images, data.labels, "mm-cam", dtype=torch.float64)
    monkeypatch.setattr(maps_module, "cls_relevance_layer", head_by_head)
    found = relevance_of(student, data.images, data.labels, "mm-cam", dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (expected > 0).any()

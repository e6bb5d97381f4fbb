"""A step touches no tensor of another device than its batch's: run on shapes alone (the `meta` device, which every machine
has), a tensor on the CPU is a copy between host and device that a GPU would wait for, or an error there."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.masking import MaskRandomness
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.optim import FlatAdamW
from cammask_fast.state import TrainState
from cammask_fast.step import Losses, build_step, build_train_step
from tests.test_step import CONFIGS, TINY, batch, draws_for

META = torch.device("meta")
PRECISIONS = {**CONFIGS, "bf16": replace(CONFIGS["masked-object"], precision="bf16")}


class Elsewhere(TorchDispatchMode):
    """The operators that read or write a tensor outside the meta device, each with the line that called it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        if any(isinstance(leaf, Tensor) and leaf.device != META for leaf in tree_leaves((args, kwargs, out))):
            ours = [frame for frame in traceback.extract_stack() if "cammask_fast" in frame.filename]
            self.found.append(f"{func} at {ours[-1].filename}:{ours[-1].lineno}" if ours else str(func))
        return out


def on_meta(values: Sequence[Any]) -> Iterator[Any]:
    return (value.to(META) if isinstance(value, Tensor) else value for value in values)


def shapes(config: TrainConfig) -> tuple[Classifier, Classifier, Batch, MaskRandomness | None]:
    with META:
        student = Classifier(VisionTransformer(TINY), torch.zeros(3, TINY.output_dim))
    data = batch(8)
    draws = draws_for(config, data)
    return student, student.frozen_copy(), Batch(*on_meta(data[:3])), None if draws is None else MaskRandomness(*on_meta(draws))


@pytest.mark.parametrize("name", PRECISIONS)
def test_an_eager_step(name: str) -> None:
    student, teacher, data, draws = shapes(PRECISIONS[name])
    step = build_step(student.requires_grad_(True), teacher, PRECISIONS[name])
    with Elsewhere() as watch:
        losses = step(data, draws)
    assert losses.total.device == META
    assert watch.operators > 100
    assert watch.found == []


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_compiled_form_with_its_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(PRECISIONS[name], epochs=1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    student, teacher, data, draws = shapes(config)
    trained = dict(student.requires_grad_(True).named_parameters())
    tally, sums = (torch.zeros(n, dtype=torch.float64, device=META) for n in (4, 5))
    state = TrainState(student, FlatAdamW(trained, config.optim, total_steps=5), None, torch.Generator(), tally, sums)
    step, losses = build_train_step(state, teacher, config), list[Losses]()
    with Elsewhere() as watch:
        losses.append(step([(data, draws)]))
        losses.append(step([(data, draws), (data, draws)]))
    assert all(part.device == META for loss in losses for part in loss)
    assert watch.operators > 300
    assert watch.found == []


def test_a_tensor_elsewhere_is_found() -> None:
    with Elsewhere() as watch:
        torch.zeros(3, device=META) + torch.tensor(1.0)
    assert any("aten.add.Tensor" in found for found in watch.found)

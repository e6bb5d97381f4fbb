"""What a run logs of itself: loss parts, gradient norm, mask share, entropy of the maps, accuracies per epoch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

from cammask_fast.config import TrainConfig
from cammask_fast.masking import entropy, mask_share, masked_input, parse_strategy, sample_mask_randomness
from cammask_fast.masking.counterfactual import counterfactual
from cammask_fast.model.classifier import Classifier
from cammask_fast.state import METRICS, TrainState
from cammask_fast.step import build_step, build_strategy, build_train_step, sample_step_randomness
from cammask_fast.train import Run, fine_tune
from tests.test_step import CONFIGS, SHORT, batch, classifier, dataset, pair

STRATEGIES = [
    "ObjMaskSingleFill(0.3)", "CtxMaskMultiFill(0.5)", "RandMaskSingleFill(0.4)", "ObjMaskNoFill(0.3)",
    "CtxMaskNoFill(top=50%)", "RandMaskNoFill(0.75)",
]  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_mask_share_is_that_of_the_masks(name: str) -> None:
    strategy, generator = parse_strategy(name), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    relevance = torch.rand(5, 16, generator=generator)
    draws = sample_mask_randomness(strategy, count=5, patches=16, generator=generator)
    given = relevance if strategy.needs_cam else None
    mask = counterfactual(images, given, strategy, draws, grid=4).mask
    assert mask_share(given, strategy, draws, patches=16).item() == pytest.approx(mask.float().mean().item())
    assert masked_input(images, given, strategy, draws, grid=4) is not None


def test_entropy_is_one_for_an_even_map_and_zero_for_one_patch() -> None:
    one = torch.zeros(1, 9)
    one[0, 4] = 7.0
    assert entropy(torch.full((2, 9), 0.3)).item() == pytest.approx(1)
    assert entropy(one).item() == pytest.approx(0, abs=1e-6)
    assert entropy(torch.zeros(1, 9)).item() == 0
    two = torch.zeros(1, 9)
    two[0, :2] = 1.0
    assert entropy(torch.cat([one, two])).item() == pytest.approx(math.log(2) / math.log(9) / 2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_means_over_the_steps_are_those_of_the_steps(compiled: bool) -> None:
    config = CONFIGS["masked-object"]
    student, teacher = pair()
    state = TrainState.create(student, config, steps_per_epoch=5, compiled=compiled)
    step = build_train_step(state, teacher, config, backend="eager")
    reference, strategy, generator = classifier(), build_strategy(config), torch.Generator().manual_seed(4)
    found, norms = [], []
    for _ in range(3):
        draws = sample_step_randomness(strategy, batch(), student.visual.config.patches, generator)
        reference.load_state_dict(student.state_dict())
        reference.zero_grad()
        found.append(build_step(reference.requires_grad_(True), teacher, config)(batch(), draws))
        norms.append(get_total_norm([p.grad for p in reference.parameters() if p.grad is not None]).item())
        step([(batch(), draws)])
    stats = state.read_and_reset()
    for name in ("task", "distill", "mask_share", "cam_entropy"):
        expected = sum(float(getattr(one, name)) for one in found) / 3
        assert stats.metrics[name] == pytest.approx(expected, rel=1e-6), name
    assert stats.metrics["gradient_norm"] == pytest.approx(sum(norms) / 3, rel=1e-6)
    assert 0 < stats.metrics["mask_share"] < 1
    assert all(math.isnan(value) for value in state.read_and_reset().metrics.values()), "a new mean begins"


def test_micro_batches_are_averaged() -> None:
    config = CONFIGS["masked-object"]
    student, teacher = pair()
    state = TrainState.create(student, config, steps_per_epoch=5)
    generator, strategy = torch.Generator().manual_seed(0), build_strategy(config)
    patches = student.visual.config.patches
    parts = [(batch(), sample_step_randomness(strategy, batch(), patches, generator)) for _ in range(2)]
    single = [build_step(student.frozen_copy().requires_grad_(True), teacher, config)(*part) for part in parts]
    losses = build_train_step(state, teacher, config)(parts)
    for name in ("mask_share", "cam_entropy"):
        assert float(getattr(losses, name)) == pytest.approx(sum(float(getattr(one, name)) for one in single) / 2)


def test_a_run_logs_steps_and_epochs() -> None:
    lines: list[Any] = []
    seen: list[Classifier] = []

    def evaluations(model: Classifier) -> dict[str, float]:
        seen.append(model)
        return {"shifted": 12.5}

    config: TrainConfig = replace(SHORT, epochs=2)
    fine_tune(
        classifier(dtype=torch.float32), dataset(), dataset(), config, log_every=1,
        run=Run(log=lines.append, evaluate=evaluations),
    )  # fmt: skip
    steps = [line for line in lines if "accuracy" not in line]
    epochs = [line for line in lines if "accuracy" in line]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert all(line["accuracy"]["shifted"] == 12.5 for line in epochs)
    assert all(0 <= line["accuracy"]["validation"] <= 100 for line in epochs)
    assert len(seen) == 2
    assert all(
        {"loss", "lr", "images_per_second", "data_wait", "memory_bytes", "skipped", *METRICS} <= line.keys() for line in steps
    )
    assert all(line["images_per_second"] > 0 for line in steps)


def test_a_state_without_sums_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As version 0.1.0 has left it."""
    state = TrainState.create(classifier(), CONFIGS["ft"], steps_per_epoch=5)
    saved = state.state_dict()
    old = {name: value.clone() for name, value in saved.tensors.items() if name != "sums"}
    state.sums.fill_(7)
    state.load_state_dict(saved._replace(tensors=old))
    assert not state.sums.any()

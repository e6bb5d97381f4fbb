"""The recipe's optimiser and schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cammask_fast.config import METHODS, OptimConfig, TrainConfig, load_recipe, recipe_names
from cammask_fast.optim import FlatAdamW, build_optimizer, build_schedule, clipped_step, schedule_table


def test_one_cycle_moves_learning_rate_and_beta1_as_in_the_paper() -> None:
    config = OptimConfig()
    optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], config)
    schedule = build_schedule(optimizer, config, total_steps=100)
    rates, betas = [], []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if len(rates) < 100:
            schedule.step()
    assert rates[0] == pytest.approx(3e-5 / 25)
    assert max(rates) == rates[1] == pytest.approx(3e-5)
    assert rates[-1] == pytest.approx(3e-5 / 25 / 1e4)
    assert (betas[0], min(betas), betas[-1]) == pytest.approx((0.95, 0.85, 0.95))
    middle = 3e-5 / 25e4 + (3e-5 - 3e-5 / 25e4) * (1 + math.cos(math.pi * 49 / 98)) / 2
    assert rates[50] == pytest.approx(middle)


@pytest.mark.parametrize("pct_start", [0.02, 0.1, 0.3, 0.5])
def test_a_run_of_any_length_has_a_schedule(pct_start: float) -> None:
    """Of 50 steps at the default share too, one of which rises."""
    config = OptimConfig(pct_start=pct_start)
    for steps in range(1, 120):
        rates = schedule_table(config, total_steps=steps)[:, 0]
        assert rates.shape == (steps,)
        assert rates.isfinite().all()
        assert rates[-1] == pytest.approx(3e-5 / 25e4)
    exactly_one = schedule_table(OptimConfig(), total_steps=50)[:, 0]
    assert exactly_one[0] == pytest.approx(3e-5 / 25)
    assert exactly_one.argmax() == 1
    assert exactly_one[1] == pytest.approx(3e-5, rel=2e-3)


def test_adamw_decays_every_trained_parameter_and_no_other() -> None:
    trained, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = build_optimizer([trained, frozen], OptimConfig(lr=0.1, weight_decay=0.5))
    trained.grad = torch.zeros(2)
    optimizer.step()
    assert torch.allclose(trained.detach(), torch.full((2,), 1 - 0.1 * 0.5))
    assert torch.equal(frozen, torch.ones(2))


@pytest.mark.slow
def test_ten_thousand_float32_updates_are_torchs() -> None:
    """Corrections in float32 against torch's in float64; a rounded decay, lost once, would be 1e-5 off at the end."""
    steps, config = 10_000, OptimConfig(weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, generator=generator)
    gradients = 0.01 * torch.randn(steps, 64, generator=generator) + 0.003
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    flat, optimizer, loss = (
        FlatAdamW({"weight": ours}, config, total_steps=steps),
        build_optimizer([theirs], config),
        torch.ones(()),
    )
    schedule = build_schedule(optimizer, config, total_steps=steps)
    with torch.no_grad():
        for step in range(steps):
            flat.update(gradients[step], loss)
            theirs.grad = gradients[step].clone()
            clipped_step(optimizer, [theirs], loss, clip_norm=config.clip_norm)
            if step + 1 < steps:
                schedule.step()
    assert (theirs - start).abs().max() > 0.05, "the weights must have moved"
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999999])
def test_bias_corrections_are_right_at_every_step(beta2: float) -> None:
    """The first update alone and after long runs: one parameter with a constant gradient moves by lr at every step, whatever
    the corrections, if they are right."""
    config = OptimConfig(lr=1e-3, weight_decay=0.0, beta2=beta2, pct_start=0.5)
    weight = nn.Parameter(torch.zeros(1))
    flat = FlatAdamW({"weight": weight}, config, total_steps=20)
    for already in (0, 1, 100, 9_999):
        flat.step.fill_(already)
        flat.position.zero_()
        beta1 = flat.schedule[0, 1].item()
        for moment, beta in ((flat.exp_avg, beta1), (flat.exp_avg_sq, beta2)):
            moment.fill_(1 - beta**already)  # what `already` gradients of 1 leave
        before = weight.item()
        with torch.no_grad():
            flat.update(torch.ones(1), torch.zeros(()))
        assert before - weight.item() == pytest.approx(flat.schedule[0, 0].item(), rel=1e-3)


def test_the_optimisers_arithmetic_is_that_of_the_weights() -> None:
    """No float64 result anywhere in an update of float32 weights."""
    flat = FlatAdamW({"weight": nn.Parameter(torch.zeros(4))}, OptimConfig(), total_steps=3)
    wide: list[str] = []

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            wide.extend(str(func) for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype == torch.float64)
            return out

    with torch.no_grad(), Types():
        flat.update(torch.ones(4), torch.zeros(()))
    assert wide == []


def test_defaults_are_the_papers_recipe() -> None:
    config = TrainConfig()
    assert (config.epochs, config.batch_size, config.w_task, config.w_distill, config.kd_temperature) == (10, 512, 1, 30, 10)
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.clip_norm, optim.beta2, optim.pct_start) == (3e-5, 0.1, 1.0, 0.999, 0.02)


def test_config_round_trips_and_refuses_unknown_keys() -> None:
    config = TrainConfig(method="ft-fd", masking="CtxMaskMultiFill(0.3)", optim=OptimConfig(lr=1e-3))
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.resolved.masking == "CtxMaskMultiFill(0.3)"
    with pytest.raises(ValueError, match="unknown settings: learning_rate"):
        TrainConfig.from_dict({"optim": {"learning_rate": 1.0}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; known: zeroshot, lp, ft"),
        ({"cam": "x"}, "known: mm-cam, grad-cam, legrad"),
        ({"epochs": 0}, "epochs: expected a positive"),
        ({"batch_size": 10, "accumulate": 3}, "does not divide"),
        ({"alpha": 1.5}, "alpha"),
        ({"w_distill": float("nan")}, "w_distill"),
        ({"cam_start_layer": -1}, "cam_start_layer"),
        ({"optim": {"lr": 0.0}}, "lr: expected a positive"),
        ({"optim": {"weight_decay": -1.0}}, "weight_decay"),
        ({"optim": {"pct_start": 1.0}}, "pct_start"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(settings)


def test_masking_a_method_without_distillation_is_refused() -> None:
    with pytest.raises(ValueError, match="distils nothing"):
        _ = TrainConfig(method="ft", masking="ObjMaskSingleFill(0.3)").resolved


def test_every_recipe_loads() -> None:
    names = recipe_names()
    assert {"tiny/ft", "tiny/masked-object", "vit-b32/object-single"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        config = TrainConfig.from_dict(recipe["train"])
        assert config.resolved.trained in ("all", "head")
        assert recipe["arch"]
    assert {name.removeprefix("tiny/") for name in names if name.startswith("tiny/")} >= set(METHODS) - {"zeroshot"}
    with pytest.raises(ValueError, match="unknown recipe"):
        load_recipe("tiny/none")


def test_tiny_recipes_share_everything_but_method_and_weight() -> None:
    tiny = [TrainConfig.from_dict(load_recipe(n)["train"]) for n in recipe_names() if n.startswith("tiny/")]
    assert len({(c.epochs, c.batch_size, c.optim) for c in tiny}) == 1

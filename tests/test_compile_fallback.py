"""A step that cannot be compiled: eager with one warning where nobody asked for a mode, one line where somebody did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from cammask_fast import step as step_module
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.optim import FlatAdamW
from cammask_fast.state import TrainState
from cammask_fast.step import (
    TrainStep,
    build_strategy,
    compiled_or_eager_step,
    compiler_fault,
    compiler_reason,
    sample_step_randomness,
)
from tests.test_step import CONFIGS, TINY, batch, pair

CONFIG = replace(CONFIGS["ft-fd"], optim=OptimConfig(lr=1e-3), epochs=1)


class Broken:
    """A compiler that fails at its `n`-th graph."""

    def __init__(self, n: int = 1):
        self.left, self.calls = n, 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: object) -> Any:
        self.calls += 1
        self.left -= 1
        if self.left <= 0:
            raise RuntimeError("the kernel needs\nmore than there is")
        return graph


def run(step: TrainStep, state: TrainState, config: TrainConfig, steps: int = 3) -> list[float]:
    """Losses, of two micro-batches a step."""
    strategy, losses = build_strategy(config), []
    for _ in range(steps):
        pieces = [batch(), Batch(255 - batch().images, batch().labels, batch().sample_ids)]
        parts = [(one, sample_step_randomness(strategy, one, TINY.patches, state.generator)) for one in pieces]
        losses.append(float(step(parts).total))
        state.step += 1
    return losses


def built(compiled: bool, config: TrainConfig, **options: Any) -> tuple[TrainState, TrainStep]:
    student, teacher = pair()
    state = TrainState.create(student, config, steps_per_epoch=3, compiled=compiled)
    return state, compiled_or_eager_step(state, teacher, config, steps_per_epoch=3, **options)


@pytest.mark.slow
def test_auto_goes_on_eagerly(capsys: pytest.CaptureFixture[str]) -> None:
    """With the losses, weights and schedule of an eager run from the first step on, though one of two graphs was compiled."""
    expected, eager = built(False, CONFIG)
    losses = run(eager, expected, CONFIG)
    broken = Broken(2)
    state, step = built(True, replace(CONFIG, compile="auto"), backend=broken)
    assert run(step, state, CONFIG) == losses
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cammask: warning: the step cannot be compiled and runs eagerly")
    assert "(RuntimeError: the kernel needs)" in lines[0]
    assert broken.calls == 2, "tried once"
    assert not isinstance(state.optimizer, FlatAdamW)
    assert state.learning_rate() == expected.learning_rate()
    for ours, theirs in zip(state.student.parameters(), expected.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert state.read_and_reset().metrics == pytest.approx(expected.read_and_reset().metrics, rel=0, abs=0, nan_ok=True)


@pytest.mark.slow
def test_a_mode_that_was_asked_for_ends_with_one_line() -> None:
    state, step = built(True, replace(CONFIG, compile="max-autotune"), backend=Broken())
    with pytest.raises(ValueError, match=r"cannot be compiled \(RuntimeError: the kernel needs\): use --compile off") as caught:
        run(step, state, CONFIG, 1)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_module, "build_train_step", lambda *_a, **_o: full)
    _, step = built(True, replace(CONFIG, compile="auto"))
    with pytest.raises(torch.OutOfMemoryError):
        step([])


def test_an_eager_run_asks_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "compiler_fault", lambda *_a: pytest.fail("asked"))
    state, _ = built(False, CONFIG, processes=2)
    assert not isinstance(state.optimizer, FlatAdamW)


def test_several_processes_decide_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without a compiler takes all with it."""
    for faults in ([None, None], [None, "no compiler here"]):
        monkeypatch.setattr(step_module, "compiler_fault", lambda *_a: "own")
        monkeypatch.setattr(
            "cammask_fast.distributed.all_gather_object",
            lambda own, answers=faults: answers if own == "own" else [],
        )
        state, _ = built(True, replace(CONFIG, compile="auto"), processes=2, backend=Broken())
        assert isinstance(state.optimizer, FlatAdamW) == (faults[1] is None)
        assert ("(no compiler here)" in capsys.readouterr().err) == (faults[1] is not None)


def test_what_is_wrong_with_a_compiler() -> None:
    cpu = torch.device("cpu")
    assert compiler_fault(cpu, "eager") is None
    assert compiler_fault(cpu, Broken()) == "RuntimeError: the kernel needs"
    assert compiler_reason(KeyError()) == "KeyError"


@pytest.mark.slow
def test_no_cpp_compiler_is_named() -> None:
    """By Inductor itself, which looks for one before it compiles anything for the CPU."""
    with inductor.patch({"cpp.cxx": ("/nonexistent/g++",), "force_disable_caches": True}):
        assert compiler_fault(torch.device("cpu")) == "no working C++ compiler; Debian: apt-get install g++"

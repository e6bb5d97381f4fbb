"""`--profile`: a trace and a table of a few steps, of a training that computes what it computes without."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main as bench
from cammask_fast.cli import main
from cammask_fast.profiling import ROWS, SKIPPED, TRACED, WARM_UP, StepProfiler, operator_table, profile_steps
from tests.helpers.processes import assert_same_run
from tests.test_folder import make_folder

NEEDED = SKIPPED + WARM_UP + TRACED


def operators(folder: Path) -> list[str]:
    """The names in the table, in its order."""
    return [line.split()[-1] for line in (folder / "operators.txt").read_text().splitlines()[1:]]


def traced_steps(folder: Path, name: str) -> int:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return sum(event["name"] == name for event in events)


def test_the_trace_holds_a_few_steps_after_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls, weight = [], torch.randn(64, 64)

    def step() -> None:
        calls.append(1)
        with torch.profiler.record_function(f"step {len(calls)}"):
            torch.mm(weight, weight)
            for _ in range(40):
                weight.sin()

    profile_steps(step, tmp_path / "deep" / "folder")
    assert len(calls) == NEEDED
    folder = tmp_path / "deep" / "folder"
    traced = [number for number in range(1, NEEDED + 1) if traced_steps(folder, f"step {number}")]
    assert traced == list(range(NEEDED - TRACED + 1, NEEDED + 1))
    assert traced_steps(folder, "aten::mm") == TRACED
    assert {"aten::mm", "aten::sin"} <= set(operators(folder))
    said = capsys.readouterr().err
    assert (folder / "operators.txt").read_text().strip() in said
    assert f"the trace is in {folder / 'trace.json'}" in said


@pytest.mark.parametrize(("clock", "first"), [("cpu", "aten::mm"), ("device", "aten::add")])
def test_the_table_has_the_time_of_each_operator_alone(clock: str, first: str) -> None:
    """Per step, most first; kernels and the profiler's own marks are no operators."""

    def event(key: str, cpu: float, device: float, kind: str = "CPU") -> SimpleNamespace:
        times = {"self_cpu_time_total": 1e3 * cpu, "self_device_time_total": 1e3 * device}
        return SimpleNamespace(key=key, count=2 * steps, device_type=SimpleNamespace(name=kind), **times)

    steps = 5
    events = [event(f"aten::small{i}", 0.0, 0.0) for i in range(ROWS)]
    events += [event("aten::mm", 9 * steps, 1 * steps), event("aten::add", 1 * steps, 4 * steps)]
    events += [event("ProfilerStep*", 500, 500), event("gemm_kernel", 0, 500, "CUDA")]
    title, *rows = operator_table(events, clock, steps=steps).splitlines()
    assert title.split() == [clock, "ms", "per", "step", "share", "calls", "operator"]
    assert len(rows) == ROWS
    milliseconds, share = {"cpu": ("9.000", "90.0%"), "device": ("4.000", "80.0%")}[clock]
    assert rows[0].split() == [milliseconds, share, "2.0", first]


@pytest.mark.slow
def test_train_with_and_without_a_profile_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_folder(tmp_path / "photos", {"dog": 12, "fox": 12})
    words = ["train", "--data", photos, "--epochs", 2, "--batch-size", 4, "--loader", "torch", "--workers", 0,
             "--device", "cpu", "--log-every", 1]  # fmt: skip
    traced = ["--out", tmp_path / "traced", "--profile", tmp_path / "profile"]
    for more in (["--out", tmp_path / "plain"], traced):
        assert main([str(word) for word in [*words, *more]]) == 0
    assert_same_run(tmp_path / "traced", tmp_path / "plain")
    assert "nothing traced" not in capsys.readouterr().err
    assert len(operators(tmp_path / "profile")) == ROWS
    assert "aten::addmm" in operators(tmp_path / "profile")[:5]


@pytest.mark.parametrize(("steps", "traced"), [(5, []), (6, [6]), (7, [6, 7]), (10, [6, 7, 8])])
def test_a_trace_has_no_more_steps_than_the_run_and_no_more_than_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, traced: list[int]
) -> None:
    with StepProfiler(tmp_path) as profiler:
        for number in range(1, steps + 1):
            with torch.profiler.record_function(f"step {number}"):
                torch.ones(2).add(torch.ones(2))
            profiler()
    warned = "--profile: fewer than 6 steps, nothing traced" in capsys.readouterr().err
    assert warned == (not traced)
    assert bool(list(tmp_path.iterdir())) == bool(traced)
    if traced:
        assert [number for number in range(1, steps + 1) if traced_steps(tmp_path, f"step {number}")] == traced
        (row,) = [line for line in (tmp_path / "operators.txt").read_text().splitlines() if line.endswith("aten::add")]
        assert row.split()[2] == "1.0", "calls per step"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--profile: cannot make .*: choose another folder"):
        profile_steps(list, tmp_path / "file" / "profile")


@pytest.mark.slow
def test_bench_step_traces_every_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["step", "--arch", "tiny", "--batch", "2", "--device", "cpu", "--providers", "authors", "ours-eager"]
    assert bench([*argv, "--profile", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "", "no record: a traced step is no timed step"
    for provider in ("authors", "ours-eager"):
        assert len(operators(tmp_path / provider)) == ROWS
    assert traced_steps(tmp_path / "authors", "aten::_softmax") > traced_steps(tmp_path / "ours-eager", "aten::_softmax")

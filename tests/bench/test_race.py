"""The race of the step at a tiny size: records, refusal of providers that disagree, counted memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.step import cam_options, race, time_to_accuracy
from bench.step.ablations import ABLATIONS
from bench.step.authors import Step, build_authors_step
from bench.step.memory import LiveStorages
from bench.step.stages import STAGES
from bench.step.time_to_accuracy import measure, seconds_until
from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.masking import MaskRandomness
from cammask_fast.model.classifier import Classifier
from cammask_fast.state import TrainState
from cammask_fast.step import Losses


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    race.add_arguments(parser)
    return parser.parse_args(given)


def test_live_storages_counts_what_operators_allocate_and_free() -> None:
    known = torch.randn(1000)
    with LiveStorages([known]) as memory:
        doubled = known * 2
        view = doubled.view(10, 100)
        assert memory.live == memory.peak == 4000, "a view is no new storage"
        del doubled, view
        assert memory.live == 0
        known.add_(1)
        kept = known + 1
    assert memory.peak == 4000
    assert kept.numel() == 1000


@pytest.mark.slow
def test_records_of_a_tiny_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments("--arch", "tiny", "--batch", "2", "--repeats", "5", "--json", "--out", str(tmp_path / "step.jsonl"),
                        "--providers", *race.EAGER)  # fmt: skip
    assert race.main(options) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records == [json.loads(line) for line in options.out.read_text().splitlines()]
    *steps, split = records
    assert [(r["op"], r["provider"]) for r in steps] == [("step", provider) for provider in race.EAGER]
    assert split["op"] == "stages"
    assert set(split["seconds"]) == {*STAGES, "optimiser"}
    assert all(seconds > 0 for seconds in split["seconds"].values())
    assert race.main(arguments("--arch", "tiny", "--batch", "2", "--repeats", "5", "--json", "--ablations")) == 0
    again, *ablations = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["op"], r["provider"]) for r in ablations] == [("ablation", name) for name in ABLATIONS]
    authors, _, ours = steps
    assert again["forward_units"] == ours["forward_units"]
    for record in ablations:
        switched_off = record["provider"].removeprefix("without-")
        costs_work = switched_off in ("shared-forward", "cls-last-block", "cls-row")
        assert (record["forward_units"] > 1.01 * ours["forward_units"]) == costs_work, record["provider"]
    for record in (*steps, *ablations):
        share = record["flops"] / record["seconds_p50"] / (1e12 * record["matmul_teraflops"])
        assert record["share_of_matmul"] == pytest.approx(share)
        assert 0 < share < 1.5, "a product of large matrices is timed, and its operations are counted"
    assert ours["peak_mb"] > ours["activation_mb"]
    assert 0 < authors["seconds_p20"] <= authors["seconds_p50"] <= authors["seconds_p80"]
    assert ours["forward_units"] < authors["forward_units"]
    assert ours["activation_mb"] < 0.6 * authors["activation_mb"]
    assert race.table(records).count("\n") == 2 + len(steps) + 1


@pytest.mark.parametrize(
    ("loss", "gradient", "message"),
    [
        (1.01, 1.0, r"authors's loss by 1\.0e-02"),
        (1.001, 1.0, r"authors's loss by 1\.0e-03"),
        (1.0, 1.01, r"its gradient of visual\.\S+ by [1-9]\.\de-03 of the global norm"),
        (1.0, 0.99, r"its gradient of visual\.\S+ by [1-9]\.\de-03"),
    ],
)
def test_providers_that_disagree_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, loss: float, gradient: float, message: str
) -> None:
    """Neither in their losses nor, at equal losses, in their gradients."""
    build = build_authors_step

    def wrong(student: Classifier, *arguments: object) -> Step:
        step = build(student, *arguments)  # type: ignore[arg-type]

        def scaled(batch: Batch, draws: MaskRandomness | None) -> Losses:
            losses = step(batch, draws)
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(gradient)
            return Losses(*(loss * part for part in losses))

        return scaled

    one = race.Race(arch="tiny", config=TrainConfig(method="ft-fd"), batch=2)
    race.compare(one, ("ours-eager", "authors"))
    monkeypatch.setattr(race, "build_authors_step", wrong)
    with pytest.raises(ValueError, match=f"the providers disagree: .*{message}"):
        race.compare(one, ("ours-eager", "authors"))


@pytest.mark.parametrize("provider", race.EAGER)
def test_a_timed_call_is_one_optimiser_step(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """One draw, one gradient and one update, on either side."""
    calls: list[str] = []

    def counting(name: str) -> None:
        function = getattr(race, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(race, name, counted)

    def watched(optimizer: torch.optim.Optimizer, *_: object) -> None:
        calls.append("update")

    counting("sample_step_randomness")
    counting("clip_grad_norm_")
    build = build_authors_step

    def built(*arguments: Any) -> Step:
        step = build(*arguments)
        return lambda batch, draws: calls.append("gradient") or step(batch, draws)  # type: ignore[func-returns-value]

    monkeypatch.setattr(race, "build_authors_step", built)
    monkeypatch.setattr(TrainState, "update", lambda *_: calls.append("noted"))
    run = race.optimiser_step(race.Race(arch="tiny", config=TrainConfig(method="masked-object"), batch=2), provider)
    hook = register_optimizer_step_post_hook(watched)
    try:
        for _ in range(2):
            run()
    finally:
        hook.remove()
    ours, theirs = (
        ["sample_step_randomness", "update", "noted"],
        ["sample_step_randomness", "gradient", "clip_grad_norm_", "update"],
    )
    assert calls == 2 * (ours if provider.startswith("ours") else theirs)


@pytest.mark.parametrize(("batch", "repeats"), [(1, 7), (2, 4)])
def test_too_small_races_are_refused(batch: int, repeats: int) -> None:
    options = arguments("--arch", "tiny", "--mode", "ft", "--batch", str(batch), "--repeats", str(repeats))
    with pytest.raises(ValueError, match="--batch: at least 2 images"):
        race.main(options)


def test_ablations_in_another_type_than_the_weights_are_refused() -> None:
    one = race.Race(arch="tiny", config=TrainConfig(method="masked-object", precision="bf16"), batch=2)
    with pytest.raises(ValueError, match="use --precision fp32 or tf32"):
        race.optimiser_step(one, "without-cls-row")
    assert one.precision_of("ours-eager") == "bf16"
    assert one.precision_of("authors") == "fp32"


@pytest.mark.slow
def test_bf16_runs_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = race.Race(arch="tiny", config=TrainConfig(method="masked-object"), batch=2), []
    providers = ("authors", "authors-bf16", "ours-eager", "ours-eager-bf16")
    assert [one.precision_of(provider) for provider in providers] == ["fp32", "bf16", "fp32", "bf16"]
    authors, cast, _, ours = (race.counted(one, provider) for provider in providers)
    assert cast["activation_mb"] < 0.9 * authors["activation_mb"]
    weights = race.trained_bytes(one.vit) / 1e6
    assert 0.4 * weights < ours["activation_mb"] < 0.6 * cast["activation_mb"], "the student's weights in bf16 are among them"
    held = ours["peak_mb"] - ours["activation_mb"]
    assert 4.4 * weights < held < 4.6 * weights, "weights, gradients and two moments in float32; the teacher in bf16"
    build = build_authors_step

    def watched(*arguments: object) -> Step:
        step = build(*arguments)  # type: ignore[arg-type]

        def run(batch: Batch, draws: MaskRandomness | None) -> Losses:
            seen.append(torch.is_autocast_enabled("cpu"))
            return step(batch, draws)

        return run

    monkeypatch.setattr(race, "build_authors_step", watched)
    for provider in ("authors-fused-adamw", "authors-bf16"):
        race.optimiser_step(one, provider)()
    assert seen == [False, True]


def test_every_ablation_gives_our_losses_and_gradients() -> None:
    for masking in ("", "ObjMaskMultiFill(top=50%)", "CtxMaskNoFill(top=50%)"):
        config = TrainConfig(method="masked-object", masking=masking)
        race.compare(race.Race(arch="tiny", config=config, batch=4), ("ours-eager", *ABLATIONS))


@pytest.mark.parametrize("config", [TrainConfig(method="ft-fd"), TrainConfig(masking="ObjMaskNoFill(0.3)")])
def test_ablations_of_other_methods_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"^ablations: "):
        race.compare(race.Race(arch="tiny", config=config, batch=2), ("ours-eager", "without-cls-row"))


def test_seconds_until_the_accuracy_is_reached() -> None:
    curve = [(1.0, 50.0), (2.0, 79.1), (3.0, 79.2), (4.0, 80.0)]
    assert seconds_until(curve) == 3.0
    with pytest.raises(ValueError, match="at least 5 seeds"):
        measure("masked-object", seeds=4)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        cam_options.measure("masked-object", seeds=1)


def test_tables_of_the_studies_have_a_row_per_variant() -> None:
    record = {"seconds": 1.0, "seconds_in_total": 2.0, "final_accuracy": 80.0, "id": 80.0, "ood": 75.0}
    both = [record | {"provider": name} for name in ("authors", "ours-eager") for _ in range(2)]
    assert "| ours-eager | 1.0 ± 0.0" in time_to_accuracy.table(both)
    options = [record | {"option": name} for name in cam_options.OPTIONS for _ in range(2)]
    assert "| Grad-CAM " in cam_options.table(options)
    assert cam_options.table(options).count("80.0 ± 0.0") == 3

"""The race of the step at a tiny size: records, refusal of providers that disagree, counted memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench.step import race
from bench.step.authors import build_authors_step
from bench.step.memory import LiveStorages
from cammask_fast.config import TrainConfig
from cammask_fast.data.batch import Batch
from cammask_fast.masking import Draws
from cammask_fast.step import Losses


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


def test_records_of_a_tiny_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(
        arch="tiny", mode="masked-object", masking="", batch=2, repeats=5, json=True, out=tmp_path / "step.jsonl"
    )
    assert race.main(options) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["provider"] for r in records] == list(race.PROVIDERS)
    assert records == [json.loads(line) for line in options.out.read_text().splitlines()]
    authors, _, ours = records
    assert 0 < authors["seconds_p20"] <= authors["seconds_p50"] <= authors["seconds_p80"]
    assert ours["forward_units"] < authors["forward_units"]
    assert ours["activation_mb"] < 0.6 * authors["activation_mb"]
    assert race.table(records).count("\n") == 4


def test_providers_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_authors_step

    def wrong(*arguments: object) -> race.Step:
        step = build(*arguments)  # type: ignore[arg-type]

        def scaled(batch: Batch, draws: Draws | None) -> Losses:
            return Losses(*(1.01 * part for part in step(batch, draws)))

        return scaled

    monkeypatch.setattr(race, "build_authors_step", wrong)
    with pytest.raises(ValueError, match=r"the providers disagree: loss by 9\.9e-03"):
        race.compare(race.ARCHS["tiny"], TrainConfig(method="ft-fd"), 2)


@pytest.mark.parametrize(("batch", "repeats"), [(1, 7), (2, 4)])
def test_too_small_races_are_refused(batch: int, repeats: int) -> None:
    options = argparse.Namespace(arch="tiny", mode="ft", masking="", batch=batch, repeats=repeats, json=False, out=None)
    with pytest.raises(ValueError, match="--batch: at least 2 images"):
        race.main(options)

"""The short soak: a run of two ranks under faults of every kind."""

from __future__ import annotations

import argparse
import json
import random
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import soak


@pytest.mark.alone
@pytest.mark.slow
def test_two_minutes_of_faults(capsys: pytest.CaptureFixture[str]) -> None:
    code = soak.main(argparse.Namespace(minutes=2, seed=1, json=True, keep=None, out=None))
    record = json.loads(capsys.readouterr().out)
    assert code == 0, record
    assert record["weights_equal"]
    assert record["survived"] == record["faults"] >= 5
    assert set(record["kinds"]) == {*soak.FAULTS, "damaged sample"}


def test_the_first_faults_are_one_of_every_kind_and_leave_time_to_recover() -> None:
    for seed in range(50):
        plan = soak.plan(13, 252, random.Random(seed))
        steps, kinds = [step for step, _ in plan], [kind for _, kind in plan]
        assert set(kinds[:5]) == set(kinds[5:10]) == set(soak.FAULTS)
        assert len(kinds) == 13
        assert steps[0] >= 5
        assert all(later - earlier > 9 for earlier, later in pairwise(steps))
        assert steps[-1] <= 252 - 14


@pytest.mark.parametrize(("minutes", "seconds_per_look", "made"), [(4, 1, 12), (4, 1000, 5), (1, 1, 5)])
def test_only_the_first_of_every_kind_are_made_late(
    minutes: int, seconds_per_look: int, made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of its own and a run that nothing disturbs."""
    for kind in soak.FAULTS:
        monkeypatch.setitem(soak.FAULTS, kind, lambda run: None)
    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=count(0, seconds_per_look).__next__))
    monkeypatch.setattr(soak, "write_images", lambda folder, generator: folder)
    monkeypatch.setattr(soak, "run", lambda *args, **options: SimpleNamespace(returncode=0))
    monkeypatch.setattr(soak, "last_step", lambda out: 252)
    monkeypatch.setattr(soak, "Disturbed", lambda *args: SimpleNamespace(reaches=lambda step: True, ends=lambda: False))
    kinds = soak.soak(tmp_path, minutes=minutes, seed=0)["kinds"]
    assert isinstance(kinds, dict)
    done = {kind: n for kind, (n, survived) in kinds.items() if kind != "damaged sample" and survived == n}
    assert done.keys() == soak.FAULTS.keys()
    assert sum(done.values()) == made


def test_too_short_a_soak_is_refused() -> None:
    with pytest.raises(ValueError, match="--minutes: expected 1 or more"):
        soak.main(argparse.Namespace(minutes=0.1, seed=0, json=True, keep=None, out=None))

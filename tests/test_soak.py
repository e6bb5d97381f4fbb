"""The short soak: a run of two ranks under faults of every kind."""

from __future__ import annotations

import argparse
import json
import random
from itertools import pairwise

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


def test_too_short_a_soak_is_refused() -> None:
    with pytest.raises(ValueError, match="--minutes: expected 1 or more"):
        soak.main(argparse.Namespace(minutes=0.1, seed=0, json=True, keep=None, out=None))

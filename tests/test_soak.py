"""The short soak: a run of two ranks under faults of every kind."""

from __future__ import annotations

import argparse
import json

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
    assert record["seconds"] < 240


def test_too_short_a_soak_is_refused() -> None:
    with pytest.raises(ValueError, match="--minutes: expected 1 or more"):
        soak.main(argparse.Namespace(minutes=0.1, seed=0, json=True, keep=None, out=None))

"""The defaults for small data sets against the recorded sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import defaults
from bench.defaults import IMAGES, RECORDS, held, section
from bench.records import read


def test_the_defaults_are_within_a_point_of_the_best_of_the_sweep() -> None:
    found = held(read(RECORDS))
    assert [one.images for one in found] == list(IMAGES)
    for one in found:
        assert one.settings >= 3, one
        assert one.both >= one.best_both - 1, one


def run(images: int, lr: float, both: float, seed: int = 100) -> dict[str, float | str]:
    _, _, epochs, batch = defaults.chosen(images)
    where = {"cpu": "a CPU", "torch": "2.0"}
    return {"images": images, "lr": lr, "epochs": epochs, "batch_size": batch, "seed": seed, "both": both, **where}


def test_settings_are_compared_on_the_seeds_of_both() -> None:
    default, other = defaults.chosen(64)[1], 0.5
    records = [run(64, default, 70.0), run(64, default, 60.0, seed=101), run(64, other, 71.0), run(64, 0.25, 99.0, seed=7)]
    (one,) = held(records)
    assert (one.both, one.best_both, one.settings, one.seeds) == (70.0, 71.0, 2, 1)
    assert one.best[1] == other
    text = section(records)
    assert "| 64 " in text
    assert "lr 0.5, batch 64, 66 steps" in text
    (one,) = held([*records, run(64, other, 40.0, seed=101)])
    assert (one.best, one.best_both, one.seeds) == (one.default, 65.0, 2)
    (one,) = held([*records, run(64, other, 99.0, seed=102)])
    assert (one.best_both, one.seeds) == (71.0, 1), "without the seed that the defaults lack"
    assert "the same" in section([*records, run(64, other, 40.0, seed=101)])
    with pytest.raises(ValueError, match="no run of 64 images with the defaults, lr, epochs and batch size"):
        held([run(64, other, 71.0)])


def test_every_record_says_what_was_run_and_where() -> None:
    needed = {"images", "lr", "epochs", "batch_size", "seed", "id", "ood", "both", "seconds", "cpu", "torch", "commit"}
    for line in Path(RECORDS).read_text().splitlines():
        assert needed <= json.loads(line).keys()

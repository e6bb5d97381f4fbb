"""Whether a run keeps its size: what is read, and what counts as growth."""

from __future__ import annotations

import argparse
import mmap
import os
from pathlib import Path

import pytest
from PIL import Image

from bench import growth
from bench.growth import Reading
from bench.report import runs_section


def readings(mb: dict[int, float], *, every: int = 100, last: int = 5000) -> list[Reading]:
    """A reading every so many steps; mb: what is resident from a step on; half of it is allocated."""
    found = []
    for step in range(0, last + 1, every):
        now = mb[max(begin for begin in mb if begin <= step)]
        found.append(Reading(step, now, now / 2))
    return found


def test_a_run_that_keeps_its_size() -> None:
    found = growth.growth(readings({0: 500.0, 1500: 1000.0}))
    assert found == {"settled_mb": 1000.0, "resident_mb": [1000.0] * 3, "allocated_mb": [500.0] * 3, "growth": 0.0}


def test_growth_is_the_worst_window_of_the_worse_figure() -> None:
    assert growth.growth(readings({0: 1000.0, 3000: 1050.0, 4000: 1000.0}))["growth"] == 0.05
    more = [reading._replace(allocated=500 + reading.step / 100) for reading in readings({0: 1000.0})]
    assert growth.growth(more)["growth"] == pytest.approx((544.5 - 524.5) / 524.5, abs=1e-4)


def test_a_single_high_reading_and_the_report_at_the_end_do_not_count() -> None:
    found = [one._replace(resident=5000.0) if one.step == 2500 else one for one in readings({0: 1000.0})]
    found += [Reading(5050, 5000.0, 5000.0)] * 30
    assert growth.growth(found)["growth"] == 0.0


def test_the_page_shows_the_last_record_of_each_loader() -> None:
    record = {
        "op": "growth", "loader": "dali", "method": "ft", "workers": 1, "batch": 2, "steps": 20000, "settled_mb": 900.0,
        "resident_mb": [900.0, 901.0], "allocated_mb": [500.0, 600.0, 550.0], "growth": 0.2,
        "cpu": "a CPU", "cores": 2, "commit": "abc",
    }  # fmt: skip
    other = record | {"loader": "torch", "resident_mb": [900.0]}
    shown = runs_section([record | {"steps": 99}, record, other])
    assert shown.count("| dali ") == shown.count("| torch ") == 1
    assert shown.count("| +0.1% ") == 1
    assert shown.count("| +0.0% ") == 1
    assert shown.count("| +20.0% ") == 2
    assert "| 99 " not in shown
    assert "`cammask bench growth --method ft`, a CPU, 2 cores, commit abc" in shown


def test_windows_without_a_reading_are_refused() -> None:
    sparse = [reading for reading in readings({0: 1000.0}) if not 3000 <= reading.step < 4000]
    with pytest.raises(ValueError, match="no reading between steps 3000 and 4000"):
        growth.growth(sparse)
    with pytest.raises(ValueError, match="no reading after 2000 steps: the run ended at 1500"):
        growth.growth(readings({0: 1000.0}, last=1500))


def test_memory_of_a_process() -> None:
    resident, allocated = growth.megabytes(os.getpid())
    assert resident > allocated > 10
    with mmap.mmap(-1, 64 << 20) as ballast:  # what malloc gives may have been resident already
        ballast.write(os.urandom(1 << 20) * 64)
        assert 55 < growth.megabytes(os.getpid())[1] - allocated < 80
    assert growth.megabytes(2**22 + 1) == (0.0, 0.0)


def test_photographs_of_many_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "IMAGES", 40)
    growth.write_photographs(tmp_path)
    sizes = [Image.open(path).size for path in sorted(tmp_path.rglob("*.jpg"))]
    assert len(set(sizes)) == len(sizes) == 40
    assert min(map(min, sizes)) >= growth.SIDES[0]
    assert max(map(max, sizes)) > 600


@pytest.mark.parametrize(
    ("steps", "batch", "message"), [(2500, 2, "--steps: expected 3000"), (20_000, 1, "--batch: expected 2")]
)
def test_too_little_is_refused(steps: int, batch: int, message: str) -> None:
    options = argparse.Namespace(
        steps=steps, batch=batch, loader=["torch"], method="ft", workers=1, minutes=1, json=True, out=None
    )
    with pytest.raises(ValueError, match=message):
        growth.main(options)


@pytest.mark.slow
def test_a_short_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IMAGES", 40), ("SETTLED", 20), ("WINDOW", 20), ("EVERY", 0.02), ("SIDES", (40, 60))):
        monkeypatch.setattr(growth, name, value)
    data = growth.write_photographs(tmp_path / "data")
    record = growth.measure(data, tmp_path / "run", loader="torch", method="ft", workers=0, batch=2, steps=100, minutes=5)
    assert record["steps"] == 108
    assert record["epochs"] == 6
    assert record["settled_mb"] > 100
    assert f"| torch  | ft     | 0       | 2               | 108   | {record['settled_mb']:.0f}" in growth.table([record])

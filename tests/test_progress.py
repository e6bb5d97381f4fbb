"""The share of time that a step waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from cammask_fast.progress import DataWait


@pytest.mark.parametrize(("load", "step", "expected"), [(0.02, 0.0, 1.0), (0.0, 0.02, 0.0), (0.02, 0.02, 0.5)])
def test_waiting_is_the_loaders_time_and_not_the_steps(load: float, step: float, expected: float) -> None:
    def batches() -> Iterator[int]:
        for number in range(8):
            time.sleep(load)
            yield number

    wait, seen = DataWait(torch.device("cpu")), []
    for batch in wait.over(batches()):
        seen.append(batch)
        time.sleep(step)
    assert seen == list(range(8))
    assert wait.share == pytest.approx(expected, abs=0.2)

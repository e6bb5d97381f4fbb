"""What a run shows of itself, and the share of time that a step waits for data."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from cammask_fast.progress import DataWait, TrainingProgress, duration, memory_bytes

STEPS, EPOCHS = 8, 2


def lines(*, validation: bool = True, masks: bool = True) -> list[dict[str, Any]]:
    """The log of a run of two epochs of four steps, a line per two steps."""
    found: list[dict[str, Any]] = []
    for step in (2, 4, 6, 8):
        more = {"distill": 0.02, "mask_share": 0.25} if masks else {"distill": None, "mask_share": 0.0}
        found.append(
            {
                "step": step, "epoch": (step - 1) // 4, "loss": float(step), "task": step / 2, "lr": 1e-4, "data_wait": 0.05,
                "images_per_second": 100.0 if step % 4 else 300.0, "memory_bytes": 5_200_000_000, "skipped": 0, **more,
            }
        )  # fmt: skip
        if step % 4 == 0 and validation:
            found.append({"step": step, "epoch": step // 4, "accuracy": {"validation": 80.0 + step, "other": 7.0}})
    return found


def shown(
    log: list[dict[str, Any]], *, terminal: bool, width: int = 200, live: bool = False, **options: Any
) -> tuple[list[str], str]:
    """Lines that stay on a console, and all that was written to it."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, height=30, _environ={"TERM": "xterm"})
    progress = TrainingProgress(epochs=EPOCHS, steps=STEPS, console=console, **options)
    if not live:
        progress.live = None  # rows alone
    with progress:
        for line in log:
            progress.write(line)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return text.splitlines(), text


def test_a_row_per_epoch_stays_on_a_terminal() -> None:
    (header, first, second), _ = shown(lines(), terminal=True)
    assert header.split() == [
        "epoch",
        "loss",
        "task",
        "distill",
        "valid.",
        "other",
        "masked",
        "img/s",
        "wait",
        "memory",
        "time",
    ]
    means = "1/2 3.0000 1.5000 0.0200 84.00 % 7.00 % 25.0 % 150 5 % 5.2 GB 0:00"
    assert " ".join(first.split()) == means, "over the epoch"
    assert second.split()[:2] == ["2/2", "7.0000"]
    assert len({len(line) for line in (header, first, second)}) == 1, "columns line up"


def test_plain_lines_have_the_same_numbers() -> None:
    (early, first, late, second), text = shown(lines(), terminal=False)
    assert "\x1b" not in text
    assert re.match(r"step 2/8  loss 2\.0000  task 1\.0000 .*  0:0\d left$", early), "a tenth of the run, inside an epoch"
    assert first.startswith("epoch 1/2  loss 3.0000  task 1.5000  distill 0.0200  validation 84.00 %  other 7.00 %")
    assert first.endswith("masked 25.0 %  150 img/s  data wait 5 %  memory 5.2 GB  0:00")
    assert late.startswith("step 6/8")
    assert second.startswith("epoch 2/2  loss 7.0000")


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_loses_columns_and_no_line_wraps(width: int) -> None:
    rows, _ = shown(lines(), terminal=True, width=width)
    assert len(rows) == 3
    assert max(map(len, rows)) <= width
    assert {"epoch", "loss", "valid."} <= set(rows[0].split())
    assert "memory" not in rows[0]
    bar, _ = shown(lines(), terminal=True, width=width, live=True)
    assert max(map(len, bar)) <= width


def test_the_bar_has_the_newest_numbers() -> None:
    _, text = shown(lines(), terminal=True, width=80, live=True)
    assert re.search(r"epoch 2/2  [━╸╺ ]+ +step 8/8  0:00 left", text)
    assert "loss 8.0000" in text
    assert "last validation 88.00 %" in text


def test_numbers_that_a_run_does_not_have_are_left_out() -> None:
    rows, _ = shown(lines(validation=False, masks=False), terminal=True)
    assert len(rows) == 3, "an epoch without accuracies ends where the next begins, or with the run"
    assert rows[0].split() == ["epoch", "loss", "task", "img/s", "wait", "memory", "time"]
    broken = [{**line, "loss": None, "task": None} for line in lines(validation=False)]
    assert "loss" not in shown(broken, terminal=True)[0][0]


def test_processes_that_do_not_report_are_silent() -> None:
    assert shown(lines(), terminal=True, live=True, silent=True)[1] == ""
    assert shown(lines(), terminal=False, silent=True)[1] == ""


def test_a_run_that_resumes_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = TrainingProgress(epochs=EPOCHS, steps=STEPS, console=Console(file=io.StringIO()))
    now[0] = 5.0
    progress.begin(4)
    assert progress.seconds_left() == float("inf")
    now[0] = 15.0
    progress.write(lines()[3])
    assert progress.step == 6
    assert progress.seconds_left() == 10.0, "as long as the two steps since it resumed"
    assert progress.waited == 0.05


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3599.6, 36000, float("inf"))] == ["0:00", "1:01", "1:00:00", "10:00:00", "?"]


def test_memory_is_that_of_this_process() -> None:
    assert 50e6 < memory_bytes(torch.device("cpu")) < 1e12


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

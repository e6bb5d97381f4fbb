"""TensorBoard and W&B get the numbers of the log, each through its own library; what is missing is named in one line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cammask_fast.cli import main
from cammask_fast.commands import trackers
from cammask_fast.commands.trackers import Trackers, scalars
from cammask_fast.runtime.run_dir import TENSORBOARD, WANDB_ID, clear

LOG: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0, "loss": 2.0, "distill": None, "lr": 1e-4},
    {"step": 2, "epoch": 0, "loss": 1.5, "distill": None, "lr": 1e-5},
    {"step": 2, "epoch": 1, "accuracy": {"validation": 75.0}},
]


def test_numbers_of_a_line() -> None:
    assert scalars(LOG[0]) == {"train/loss": 2.0, "train/lr": 1e-4}
    assert scalars(LOG[2]) == {"accuracy/validation": 75.0}


@pytest.mark.parametrize("option", ["--tensorboard", "--wandb"])
def test_a_missing_package_is_named_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert main(["train", "--data", str(tmp_path), option, "--out", str(tmp_path / "run")]) == 2
    name = option.removeprefix("--")
    assert capsys.readouterr().err == f"cammask: error: {option}: needs the package {name}: pip install {name}\n"


@pytest.mark.slow
def test_tensorboard_has_the_numbers_once(tmp_path: Path) -> None:
    """A run that resumes takes back what came after its checkpoint."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "wandb": None}
    with Trackers(options, tmp_path, {}) as first:
        first.begin(0)
        for line in (*LOG, {"step": 3, "epoch": 1, "loss": 9.0}):
            first.write(line)
    with Trackers(options, tmp_path, {}) as second:
        second.begin(2)
        second.write({"step": 3, "epoch": 1, "loss": 1.25})
    found = EventAccumulator(str(tmp_path / TENSORBOARD))
    found.Reload()
    assert {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in ("train/loss", "accuracy/validation")} == {
        "train/loss": [(1, 2.0), (2, 1.5), (3, 1.25)], "accuracy/validation": [(2, 75.0)],
    }  # fmt: skip
    clear(tmp_path)
    assert not (tmp_path / TENSORBOARD).exists()


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Trackers({"wandb": "mine"}, tmp_path, {"lr": 1e-4}) as found:
        found.begin(0)
        for line in LOG:
            found.write(line)
    import wandb

    wandb.teardown()  # as at the end of the process: until everything is on the disk
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert (tmp_path / WANDB_ID).read_text() in file.name
    for text in (b"train/loss", b"accuracy/validation", b"75", b"mine"):
        assert text in data


def test_one_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no connection")

    found = Trackers({}, tmp_path, {})
    seen: list[Any] = []
    found.begin(0)
    found.writers |= {"wandb": fail, "tensorboard": seen.append}
    found.closers["wandb"] = fail
    with found:
        for line in LOG:
            found.write(line)
    assert seen == LOG
    said = capsys.readouterr().err
    assert said.count("--wandb has failed and is left out from step 1 on (RuntimeError: no connection)") == 1
    assert said.count("has failed") == 1, "said once, and not asked again"
    assert "--wandb was not closed" in said


def test_one_that_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: object, _step: int) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(Trackers, "_wandb", fail)
    with pytest.raises(ValueError, match=r"^--wandb: api_key not configured \(no-tty\); WANDB_MODE=offline keeps"):
        Trackers({"wandb": "mine"}, tmp_path, {}).begin(0)

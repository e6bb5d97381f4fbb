"""A run folder of an earlier version goes on and is read: its keys stay what they are, or are mapped on reading."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cammask_fast.cli import main
from tests.helpers.golden_run import RECORDED, STEPS, STOPPED_AT, command, make_inputs
from tests.helpers.processes import logged

WHOLE = RECORDED / "whole"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the recorded run was begun, with its inputs and what it left when it was stopped."""
    make_inputs(tmp_path)
    shutil.copytree(RECORDED / "stopped", tmp_path / "stopped")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_run_folder_goes_on(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of the uninterrupted run but for rounding: between instruction sets (SSE4, AVX2, AVX-512) they differ by
    2e-6 at most. The best weights are those in the checkpoint, bit for bit."""
    monkeypatch.setattr("cammask_fast.commands.training.__version__", "0.1.0")  # another version refuses to go on
    assert main(command("stopped")) == 0
    said = capsys.readouterr().err
    assert re.search(rf"resuming from step {STOPPED_AT} of {STEPS}, .*step-0*{STOPPED_AT}$", said, re.MULTILINE)
    assert "warning" not in said
    recorded, found = logged(WHOLE), logged(folder / "stopped")
    assert [line["step"] for line in recorded] == list(range(1, STEPS + 1))
    assert found[:STOPPED_AT] == recorded[:STOPPED_AT], "what was logged before the stop is kept"
    for ours, theirs in zip(found, recorded, strict=True):
        known = {name: ours[name] for name in theirs}  # today's lines hold more
        assert known == {**theirs, "loss": pytest.approx(theirs["loss"], rel=1e-5), "lr": pytest.approx(theirs["lr"])}
    ours, theirs = load_file(folder / "stopped" / "best.safetensors"), load_file(WHOLE / "best.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not (ours[name] == theirs[name]).all()] == []
    run, before = (json.loads((path / "run.json").read_text()) for path in (folder / "stopped", WHOLE))
    assert run["validation_accuracy"] == before["validation_accuracy"] == pytest.approx(100 * 20 / 24)
    assert before.keys() <= run.keys()
    assert before["config"].items() <= run["config"].items()


def test_an_old_run_refuses_other_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stored setting is compared with today's under its name: only the one that changed is named."""
    assert main([*command("stopped"), "--lr", "2e-2"]) == 2
    (named,) = re.findall(r"started with other settings: (.*)\. Resume", capsys.readouterr().err)
    different = [part for part in named.split(", ") if not part.startswith("cammask_fast ")]
    assert different == ["lr 0.02 instead of 0.01"]


def test_an_old_classifier_is_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "--checkpoint", str(WHOLE / "best.safetensors"), "--data", str(folder / "photos" / "val"), "--json"]
    assert main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    assert (row["images"], row["accuracy"]) == (24, pytest.approx(100 * 20 / 24))

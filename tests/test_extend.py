"""`train --extend` over a finished run, and which versions may resume one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cammask_fast.cli import main
from cammask_fast.commands.extension import parts, set_aside, tell_better
from cammask_fast.runtime.run_dir import refuse_changes
from tests.test_folder import make_folder

QUICK = ["--method", "ft-fd", "--batch-size", "4", "--lr", "1e-3", "--loader", "torch", "--workers", "0", "--log-every", "1"]


@pytest.mark.slow
def test_a_finished_run_goes_on_under_a_fresh_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = make_folder(tmp_path / "data", {"dog": 5, "fox": 5}), tmp_path / "run"
    train = ["train", "--data", str(data), "--out", str(out), *QUICK]

    def fails(*options: str) -> str:
        capsys.readouterr()
        assert main([*train, *options]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "no finished run in" in fails("--extend", "--epochs", "2")
    assert main([*train, "--epochs", "1"]) == 0
    end = load_file(out / "last.safetensors")
    assert "holds a run of 1 epochs: add --extend to go on from its end to 3 epochs" in fails("--epochs", "3")
    assert "--extend" not in fails("--epochs", "1")
    assert "has 1 epochs: give the number in all" in fails("--extend", "--epochs", "1")
    assert "has 1 epochs: give the number in all" in fails("--extend")
    assert "--extend and --overwrite" in fails("--extend", "--overwrite", "--epochs", "2")
    assert "--teacher init" in fails("--extend", "--teacher", "init", "--epochs", "2")
    assert (out / "run.json").exists(), "nothing was moved"
    assert main([*train, "--epochs", "3", "--extend"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert (record["config"]["epochs"], record["epochs_before"]) == (2, 1)
    assert record["init"] == str(out / "epochs-1" / "last.safetensors")
    assert record["teacher"] == "pretrained"
    moved = load_file(out / "epochs-1" / "last.safetensors")
    assert all(torch.equal(moved[name], value) for name, value in end.items())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert len(rates) == 4
    assert min(rates) < 1e-7 < 1e-4 < max(rates), "a whole cycle"
    assert lines[0]["distill"] > 0, "the teacher is the pre-trained model, not the end of the first part"
    assert "has 3 epochs" in fails("--extend", "--epochs", "3")
    (out / "run.json").unlink()  # as after an interruption
    assert main([*train, "--epochs", "3", "--extend"]) == 0
    assert "resuming from step 4 of 4" in capsys.readouterr().err
    assert parts(out) == [1]


def finished(folder: Path, epochs: int, accuracy: float, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": {"epochs": epochs}, "accuracy": {"validation": accuracy}, **more}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "last.safetensors").write_bytes(b"")


def test_a_second_extension_keeps_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "epochs-2", 2, 70.0)
    finished(tmp_path, 3, 60.0, epochs_before=2)
    (tmp_path / "lock").touch()
    tell_better(tmp_path, 2)
    assert "(70.00 % against 60.00 %)" in capsys.readouterr().err
    set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs-2", "epochs-5", "lock"]
    assert sorted(path.name for path in (tmp_path / "epochs-5").iterdir()) == ["last.safetensors", "run.json"]
    assert parts(tmp_path) == [2, 5]
    finished(tmp_path, 1, 60.0, epochs_before=5)
    tell_better(tmp_path, 5)
    assert not capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json cannot be read"):
        set_aside(tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [("0.1.0", "0.1.0", False), ("0.1.3", "0.1.10", False), ("0.1.0", "0.2.0", True), ("0.1.0", "1.1.0", True)],
)
def test_patch_releases_resume(before: str, now: str, refused: bool) -> None:
    then, today = [{"lr": 1.0, "cammask_fast": version} for version in (before, now)]
    if refused:
        with pytest.raises(ValueError, match=f"cammask_fast {now} instead of {before}"):
            refuse_changes(then, today, Path("run"))
    else:
        refuse_changes(then, today, Path("run"))
        with pytest.raises(ValueError, match=r"lr 2\.0 instead of 1\.0"):
            refuse_changes(then, {**today, "lr": 2.0}, Path("run"))

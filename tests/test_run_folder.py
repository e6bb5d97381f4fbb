"""What a run leaves in its folder: the recipe that repeats it, metrics.csv, and a final state without moments."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cammask_fast.checkpoint.training import MOMENTS, Checkpoints, read_checkpoint
from cammask_fast.cli import main, parse
from cammask_fast.commands.run_record import command_line, git_commit
from cammask_fast.commands.settings import train_config
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.recipes.run_recipe import open_recipe, option_words, write_recipe
from cammask_fast.runtime import metrics_csv
from cammask_fast.runtime.metrics_csv import read_lines
from cammask_fast.runtime.run_dir import RunLog
from cammask_fast.state import Snapshot
from tests.test_folder import make_folder

UNUSUAL = (
    "--masking", "ObjMaskMultiFill(0.6)", "--w-distill", "3", "--lr", "1e-3", "--seed", "4", "--epochs", "2",
    "--batch-size", "4", "--augment", "flip", "--val-share", "0.25", "--loader", "torch", "--workers", "0", "--log-every", "1",
    "--save-every", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "photos", {"red_fox": 8, "dog": 8})


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    """A finished run, begun with a relative path to its data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(photos.parent)
        assert main(["train", "--data", "photos", "--out", "runs/one", *UNUSUAL]) == 0
    return photos.parent / "runs" / "one"


@pytest.mark.slow
def test_a_run_repeats_from_its_recipe(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, by its file and by its folder, bit for bit."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", str(run / "recipe.toml"), "--out", "again"]) == 0
    for name in ("best.safetensors", "last.safetensors"):
        ours, theirs = load_file(tmp_path / "again" / name), load_file(run / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    lines, before = read_lines(tmp_path / "again" / "log.jsonl"), read_lines(run / "log.jsonl")
    clocked = {"images_per_second", "data_wait", "memory_bytes"}
    assert [{k: v for k, v in line.items() if k not in clocked} for line in lines] == [
        {k: v for k, v in line.items() if k not in clocked} for line in before
    ]
    first, second = (open_recipe(str(folder)) for folder in (run, tmp_path / "again"))
    assert first == second, "and its recipe is the same"


def test_options_override_a_runs_recipe(run: Path) -> None:
    args = parse(["train", "--recipe", str(run), "--lr", "0.5", "--augment", "color-jitter=0.4", "--val-share", "0.1"])
    config = train_config(args, open_recipe(str(run))["train"])
    assert (config.optim.lr, config.seed, config.w_distill) == (0.5, 4, 3.0)
    assert (args["augment"], args["val_share"], args["workers"]) == (["color-jitter=0.4"], 0.1, 0)
    assert args["data"] == str(run.parent.parent / "photos")
    assert args["words"][:3] == ["train", "--recipe", str(run)], "the words that were typed"


def test_the_record_says_how_the_run_came_to_be(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["command"].startswith("cammask train --data photos --out runs/one --masking 'ObjMaskMultiFill(0.6)'")
    assert record["environment"]["device"] == "cpu"
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["data_summary"]["train"] == {"dog": 6, "red_fox": 6}
    assert record["data_summary"]["validation"] == {"dog": 2, "red_fox": 2}
    assert record["git"] is None, "the folder of the test is in no repository"
    assert record["recipe"] is None


def test_the_commit_of_the_working_folder(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, env=os.environ | who)

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    found = git_commit(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == {**found, "changed": True}
    assert git_commit(tmp_path / "nowhere") is None


def test_the_command_is_that_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_line(["train", "--data", "my photos"]) == "cammask train --data 'my photos'"
    monkeypatch.setattr("cammask_fast.commands.run_record.launched", lambda: True)
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")[0].decode()
    assert parent in command_line(["train"]), "of the process that started this one, as torchrun has"


def test_a_recipe_holds_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(seed=3, epochs=2, optim=OptimConfig(lr=2e-5, pct_start=0.25))
    names = 'a"b\\c\x7f\u00e9\n'
    (tmp_path / "torch").mkdir()
    (tmp_path / "other set").mkdir()
    options: dict[str, Any] = {
        "data": "{a,b}-*.tar", "class_names": Path("names.txt"), "classes": names, "workers": 0, "strict": True,
        "loader": "torch", "val_share": None, "shots": 5, "augment": ["flip"], "eval": ["other=other set"], "json": False,
        "out": Path("x"), "lr": 9.0,
    }  # fmt: skip
    write_recipe(tmp_path, config, options, arch="tiny", pretrained="tiny", resolved={"device": "cpu"}, remarks=["a\nb\udcff"])
    text = (tmp_path / "recipe.toml").read_text()
    assert text.startswith("# a\\nb\\udcff\n")
    found = open_recipe("recipe.toml")
    assert TrainConfig.from_dict(found["train"]) == config
    assert found["options"] == {
        "data": f"{tmp_path}/{{a,b}}-*.tar", "class_names": f"{tmp_path}/names.txt", "classes": names, "workers": 0,
        "strict": True, "loader": "torch", "shots": 5, "augment": ["flip"], "eval": [f"other={tmp_path}/other set"],
        "device": "cpu",
    }  # fmt: skip
    words = option_words("recipe.toml")
    assert words[0] == f"--data={tmp_path}/{{a,b}}-*.tar"
    assert "--strict" in words
    assert words[words.index("--augment") + 1] == "flip"
    write_recipe(tmp_path, config, {"data": "caf\udce9"}, arch="tiny", pretrained="", resolved={}, remarks=[])
    assert "is not UTF-8: give it as --data" in (tmp_path / "recipe.toml").read_text()
    assert "data" not in open_recipe("recipe.toml")["options"]
    (tmp_path / "by-hand.toml").write_text("[options]\nstrict = false\naugment = []\nworkers = 0\n")
    assert option_words("by-hand.toml") == ["--workers=0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("arch = ", "is not a TOML file"),
        ("[model]\n", "has model; a recipe has arch, options, pretrained, train"),
        ("train = 3\n", "train in"),
        ("arch = 3\n", "arch in"),
        ("[options]\ndata = 'd'\nspeed = 3\n", "unrecognized arguments: --speed=3"),
        ("[options]\ndata = 'd'\nworkers = 'many'\n", "invalid int value: 'many'"),
        ("[options]\ndata = '.'\n[train]\nspeed = 3\n", "unknown settings: speed"),
        ("", "required: --data"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str) -> None:
    path = tmp_path / "x.toml"
    if text is not None:
        path.write_text(text)
    assert main(["train", "--recipe", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def as_rows(folder: Path) -> list[dict[str, Any]]:
    """The log as the table should have it: empty cells left out."""
    rows = []
    for line in read_lines(folder / "log.jsonl"):
        accuracies = {f"accuracy/{name}": value for name, value in line.pop("accuracy", {}).items()}
        rows.append({name: value for name, value in {**line, **accuracies}.items() if value is not None})
    return rows


def read_back(folder: Path) -> list[dict[str, Any]]:
    return [{name: json.loads(cell) for name, cell in row.items() if cell} for row in table(folder)]


def test_the_table_of_a_run_holds_its_log(run: Path) -> None:
    rows = read_back(run)
    assert rows == as_rows(run)
    assert len(rows) == 8, "six steps and two epochs"
    assert {"step", "epoch", "loss", "task", "distill", "lr", "mask_share", "accuracy/validation"} <= table(run)[0].keys()


def test_the_table_follows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a resume, a new column, and writes that fail."""
    warnings: list[str] = []
    log = RunLog(tmp_path, warn=warnings.append)
    for step in range(1, 4):
        log.write({"step": step, "epoch": 0, "loss": 1 / step, "distill": None, "mask_share": 1e-7})
    log.write({"step": 3, "epoch": 1, "accuracy": {"validation": 50.0}})
    log.write({"step": 4, "epoch": 1, "loss": 0.1})
    log.write({"step": 4, "epoch": 2, "accuracy": {"validation": 51.0, 'a "b", c': 2.0}})
    assert read_back(tmp_path) == as_rows(tmp_path)
    assert [row["loss"] for row in table(tmp_path)[:3]] == ["1.0", "0.5", "0.3333333333333333"], "digit for digit"
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,1,0.")  # a kill
    again = RunLog(tmp_path, warn=warnings.append)
    again.truncate_after(3, 1)
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3", "3"]
    assert read_back(tmp_path) == as_rows(tmp_path)
    full = OSError(28, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(metrics_csv, "_csv", fail)
        again.write({"step": 4, "epoch": 1, "loss": 0.5})
    assert "metrics.csv" in warnings[0]
    again.write({"step": 5, "epoch": 1, "loss": 0.25})
    assert read_back(tmp_path) == as_rows(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(again, "path", tmp_path / "nowhere" / "log.jsonl")
        again.write({"step": 6, "epoch": 1, "loss": 0.125})
    again.write({"step": 7, "epoch": 1, "loss": 0.0625})
    assert read_back(tmp_path) == as_rows(tmp_path), "the line that waited, too"
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3", "3", "4", "5", "6", "7"]


def test_a_finished_run_keeps_no_moments(run: Path) -> None:
    (path,) = (run / "checkpoints").iterdir()
    found = read_checkpoint(path)
    assert found.saved.metadata["step"] == 6
    assert found.saved.metadata["epoch"] == 2
    assert not any(name.startswith(MOMENTS) for name in found.saved.tensors)
    assert {"generators", "tally", "sums", "updates"} <= found.saved.tensors.keys(), "what a new schedule begins with"
    last = load_file(run / "last.safetensors")
    assert all(torch.equal(found.saved.tensors[f"student.{name}"], value) for name, value in last.items())
    assert (path / "tensors.safetensors").stat().st_size < 0.1 * (run / "last.safetensors").stat().st_size, "no third copy"


@pytest.mark.slow
def test_keep_optimizer_keeps_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "--data", str(photos), "--out", str(out), *UNUSUAL, "--keep-optimizer"]) == 0
    paths = sorted((out / "checkpoints").iterdir())
    assert len(paths) >= 2
    assert any(name.startswith(MOMENTS) for name in read_checkpoint(paths[-1]).saved.tensors)
    last = load_file(out / "last.safetensors")
    (out / "run.json").unlink()
    warnings: list[str] = []
    checkpoints = Checkpoints(out / "checkpoints", {}, warn=warnings.append)
    (out / "last.safetensors").rename(out / "gone.safetensors")
    checkpoints.drop_moments({"student": out / "last.safetensors"})
    found = checkpoints.newest()
    assert found is not None, "without the file beside it, the checkpoint keeps the weights"
    assert all(torch.equal(found.saved.tensors[f"student.{name}"], value) for name, value in last.items())
    assert main(["train", "--data", str(photos), "--out", str(out), *UNUSUAL]) == 0, "its record was lost: it ends again"
    again = load_file(out / "last.safetensors")
    assert all(torch.equal(again[name], value) for name, value in last.items())


def test_the_weights_beside_a_final_state_are_checked(tmp_path: Path) -> None:
    weights = {"head.weight": torch.arange(6.0).view(2, 3)}
    state = {
        "student.head.weight": weights["head.weight"],
        "exp_avg.head.weight": torch.ones(2, 3),
        "generators": torch.zeros(3),
    }
    metadata = {"step": 4, "best_step": 4, "epoch": 1}
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"lr": 1.0}, keep=3, warn=warnings.append)
    for step in (2, 4):
        checkpoints.save(Snapshot(state, {**metadata, "step": step}))
        checkpoints.wait()
    save_file(weights, tmp_path / "last.safetensors")
    save_file({"head.weight": weights["head.weight"] + 1}, tmp_path / "best.safetensors")
    checkpoints.drop_moments({"student": tmp_path / "last.safetensors", "best": tmp_path / "best.safetensors"})
    (path,) = checkpoints.folders()
    found = read_checkpoint(path)
    assert found.settings == {"lr": 1.0}
    assert found.saved.metadata == {**metadata, "moments": False}
    assert found.saved.tensors.keys() == {"student.head.weight", "generators"}
    save_file(weights, tmp_path / "last.safetensors", {"seconds": "2"})
    assert read_checkpoint(path).saved.tensors.keys() == found.saved.tensors.keys(), "another header is no other weights"
    assert torch.equal(found.saved.tensors["student.head.weight"], weights["head.weight"])
    save_file({"head.weight": weights["head.weight"] + 1}, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match=r"last\.safetensors was changed"):
        read_checkpoint(path)
    (tmp_path / "last.safetensors").unlink()
    assert checkpoints.newest() is None
    assert "is damaged" in warnings[-1]
    assert warnings[:-1] == []

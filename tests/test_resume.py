"""A run that is killed and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cammask_fast.checkpoint.training import read_checkpoint
from cammask_fast.cli import main
from cammask_fast.runtime import run_dir
from tests.helpers.processes import assert_same_run, kill, last_step, logged, photo_folder, run, start, trainers, wait_for

STEPS = 42
OPTIONS = (
    "--epochs", 7, "--batch-size", 8, "--lr", "1e-3", "--workers", 1, "--save-every", 4, "--log-every", 1,
    "--masking", "ObjMaskMultiFill(0.6)", "--augment", "flip", "--max-bad", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


def train(photos: Path, out: Path, *options: object) -> list[object]:
    return ["train", "--data", photos, "--out", out, *OPTIONS, *options]


def writing(out: Path) -> bool:
    folder = out / "checkpoints"
    return folder.is_dir() and any(path.name.endswith(".part") for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_five_times_and_the_same(photos: Path, runs: Runs, tmp_path: Path, ranks: int, loader: str) -> None:
    """kill -9 of a random rank at random steps, and twice while a checkpoint is being written."""
    whole, out, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log.txt"
    if ranks == 1:
        whole = runs.whole(loader)
    else:
        done = run(train(photos, whole, "--loader", loader), ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert last_step(whole) == STEPS
    assert (whole / "report.html").exists(), "the processes share the validation images, and the first writes"
    generator = random.Random(f"{ranks}{loader}")
    targets = sorted(generator.sample(range(1, STEPS - 4), 5))
    kinds = generator.sample(["step"] * 3 + ["write"] * 2, 5)
    process = None
    for target, kind in zip(targets, kinds, strict=True):
        if process is None or process.poll() is not None:
            process = start(train(photos, out, "--loader", loader), ranks=ranks, restarts=5, log=log)
        reached = wait_for(lambda: last_step(out) >= target and (kind == "step" or writing(out)), process)  # noqa: B023
        running = process
        assert reached, log.read_text(errors="replace")
        assert wait_for(lambda: len(trainers(running, ranks)) == ranks, running)  # noqa: B023
        pids = trainers(running, ranks)
        before = last_step(out)
        kill(generator.choice(pids), signal.SIGKILL)
        if ranks == 1:
            process.wait()
        else:
            wait_for(lambda: not set(pids) & set(trainers(running, ranks)), running)  # noqa: B023
        assert before < STEPS, "killed after the end"
    if ranks == 1:
        process = start(train(photos, out, "--loader", loader), log=log)
    assert process is not None
    assert process.wait() == 0, log.read_text(errors="replace")
    assert log.read_text(errors="replace").count("resuming from step") >= 3
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_stop_in_the_middle_saves_and_goes_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM after every tenth step, in one process after another; the exit code says that there is more to do, and the mean
    losses of the log reach over the stops."""
    sparse = ("--log-every", 7)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert main([str(word) for word in train(photos, whole, *sparse)]) == 0
    for _ in range(STEPS // 10):
        with stopping(monkeypatch, every=10):
            assert main([str(word) for word in train(photos, out, *sparse)]) == 75
        assert re.search(r"stopped at step \d+ of 42, saved; run the same command again", capsys.readouterr().err)
    assert main([str(word) for word in train(photos, out, *sparse)]) == 0
    assert "resuming from step 40 of 42" in capsys.readouterr().err
    assert_same_run(out, whole)
    assert main([str(word) for word in train(photos, out, *sparse)]) == 2
    assert "already holds a run" in capsys.readouterr().err


class stopping:  # noqa: N801  (a context manager)
    """Sends this process a SIGTERM at every n-th step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, every: int):
        self.monkeypatch, self.every = monkeypatch, every

    def __enter__(self) -> None:
        from cammask_fast.state import TrainState

        note: Callable[..., None] = TrainState.update

        def noted(state: TrainState, loss: torch.Tensor, finite: torch.Tensor) -> None:
            note(state, loss, finite)
            if (state.step + 1) % self.every == 0:
                signal.raise_signal(signal.SIGTERM)

        self.monkeypatch.setattr(TrainState, "update", noted)

    def __exit__(self, *error: object) -> None:
        self.monkeypatch.undo()


def interrupted(photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    with stopping(monkeypatch, every=18):
        assert main([str(word) for word in train(photos, out, *options)]) == 75


class Runs:
    """The same runs for all tests of a process: of each loader one that was not disturbed, and one stopped at step 18."""

    def __init__(self, photos: Path, folder: Path):
        self.photos, self.folder = photos, folder

    def whole(self, loader: str = "auto") -> Path:
        """To be read only."""
        out = self.folder / f"whole-{loader}"
        if not out.exists():
            assert main([str(word) for word in train(self.photos, out, "--loader", loader)]) == 0
        return out

    def stopped(self, out: Path, loader: str = "auto") -> None:
        """A copy of its own for each test."""
        begun = self.folder / f"stopped-{loader}"
        if not begun.exists():
            with pytest.MonkeyPatch.context() as patch:
                interrupted(self.photos, begun, patch, "--loader", loader)
        shutil.copytree(begun, out)


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(photos, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1e-4"], "lr 0.0001 instead of 0.001"),
        (["--seed", "1"], "seed 1 instead of 0"),
        (["--masking", "RandMaskSingleFill(0.5)"], "masking RandMaskSingleFill(0.5) instead of ObjMaskMultiFill(0.6)"),
        (["--batch-size", "16", "--epochs", "2"], "batch_size 16 instead of 8, epochs 2 instead of 7"),
        (["--augment", "random-crop=0.5"], "augment ['random-crop=0.5'] instead of ['flip']"),
        (["--shots", "9"], "train_labels"),
        (["--loader", "torch"], "loader TorchLoader instead of DaliLoader"),
    ],
)
def test_other_settings_are_refused(
    photos: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    pytest.importorskip("nvidia.dali")
    runs.stopped(tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    assert main([str(word) for word in train(photos, tmp_path / "run", *options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "was started with other settings" in error
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.slow
def test_overwrite_replaces_the_old_run_once(
    photos: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun repeats the whole command after a fault: what an earlier attempt has saved must outlive `--overwrite`."""
    whole, out = runs.whole(), tmp_path / "run"
    assert main([str(word) for word in train(photos, out, "--lr", "1e-5", "--epochs", 1)]) == 0
    monkeypatch.setattr(run_dir, "launched", lambda: True)  # from here on this process is one that torchrun has started
    interrupted(photos, out, monkeypatch, "--overwrite")
    assert not (out / "run.json").exists()
    monkeypatch.setattr(run_dir, "launched", lambda: True)  # `interrupted` has undone it
    capsys.readouterr()
    assert main([str(word) for word in train(photos, out, "--overwrite")]) == 0
    assert "resuming from step 18 of 42" in capsys.readouterr().err
    assert_same_run(out, whole)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for options in ([], ["--overwrite"]):
        assert main([str(word) for word in train(photos, out, *options)]) == 0, "a fault after the end leaves nothing to do"
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    monkeypatch.setattr(run_dir, "_born", lambda pid: "another torchrun with the same process number")
    assert main([str(word) for word in train(photos, out)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([str(word) for word in train(photos, out, "--overwrite", "--epochs", 1)]) == 0
    assert last_step(out) == STEPS // 7


@pytest.mark.slow
def test_harmless_settings_may_change(photos: Path, runs: Runs, tmp_path: Path) -> None:
    whole, out = runs.whole(), tmp_path / "run"
    runs.stopped(out)
    moved = tmp_path / "moved"
    moved.symlink_to(photos)
    options = ["--workers", "2", "--save-every", "100", "--keep", "5", "--max-skipped", "3", "--timeout", "99", "--data", moved]
    assert main([str(word) for word in train(photos, out, *options)]) == 0
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flip", "flip-state", "missing", "pickle"])
def test_a_damaged_checkpoint_is_passed_over(
    photos: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    whole, out = runs.whole("torch"), tmp_path / "run"
    runs.stopped(out, "torch")
    paths = sorted((out / "checkpoints").iterdir())
    assert [path.name for path in paths[-2:]] == ["step-00000016", "step-00000018"]
    damaged(paths[-1], damage, tmp_path)
    capsys.readouterr()
    assert main([str(word) for word in train(photos, out, "--loader", "torch")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"warning: .*step-00000018 is damaged \(.*\): going back to the checkpoint before it", said)
    assert "resuming from step 16 of 42" in said
    assert not (tmp_path / "ran").exists()
    assert_same_run(out, whole)


def damaged(path: Path, damage: str, folder: Path) -> None:
    tensors, state = path / "tensors.safetensors", path / "state.json"
    data = bytearray(tensors.read_bytes())
    if damage == "cut":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) * 2 // 3] ^= 4
        tensors.write_bytes(data)
    elif damage == "flip-state":
        state.write_text(state.read_text().replace('"step": 18', '"step": 19'))
    elif damage == "missing":
        state.unlink()
    else:
        import os
        import pickle

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(folder / "ran"),)

        tensors.write_bytes(pickle.dumps(Evil()))
        torch.save(Evil(), path / "weights.pt")


def test_no_pickle_is_ever_loaded(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil"
    path.mkdir()
    (path / "state.json").write_text("{}")
    (path / "tensors.safetensors").touch()
    damaged(path, "pickle", tmp_path)
    pickled = path / "weights.pt"
    for argv in (
        ["evaluate", "--checkpoint", pickled, "--data", photos],
        ["evaluate", "--checkpoint", path / "tensors.safetensors", "--data", photos],
        ["train", "--data", photos, "--pretrained", pickled, "--out", tmp_path / "out"],
        ["zeroshot", "--data", photos, "--pretrained", path / "tensors.safetensors"],
    ):
        assert main([str(word) for word in argv]) == 2
        assert capsys.readouterr().err.startswith("cammask: error: ")
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_newest_and_the_best_checkpoint_stay(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([str(word) for word in train(photos, out, "--keep", "2", "--keep-optimizer")]) == 0
    paths = sorted((out / "checkpoints").iterdir())
    best = json.loads((paths[-1] / "state.json").read_text())["state"]["best_step"]
    names = {f"step-{step:08d}" for step in {best, 40, 42}}
    assert {path.name for path in paths} == names
    found = read_checkpoint(paths[-1])
    assert found.saved.metadata["step"] == STEPS == last_step(out)
    assert len(logged(out)) == STEPS

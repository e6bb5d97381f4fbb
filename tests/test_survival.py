"""What a run survives and what it says: full disks, NaN, memory, locks, signals, dead loader processes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cammask_fast import train as train_module
from cammask_fast.checkpoint import Checkpoints, training
from cammask_fast.cli import main
from cammask_fast.commands.training import out_of_memory
from cammask_fast.config import TrainConfig
from cammask_fast.distributed import World
from cammask_fast.runtime import run_dir
from cammask_fast.runtime.run_dir import RunLock
from cammask_fast.state import Snapshot, TrainState
from tests.helpers.processes import command, kill, last_step, logged, photo_folder, start, wait_for

OPTIONS = ("--epochs", 2, "--batch-size", 8, "--loader", "torch", "--workers", 0, "--log-every", 1, "--save-every", 3)
STEPS = 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


def train(photos: Path, out: Path, *options: object) -> list[str]:
    return [str(word) for word in ["train", "--data", photos, "--out", out, *OPTIONS, *options]]


# Disks


def test_a_full_disk_does_not_end_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failing = training.write_checkpoint, {6, 9}

    def full(folder: Path, tensors: Any, rest: Any, settings: Any) -> None:
        if rest["step"] in failing:
            (folder / "tensors.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, tensors, rest, settings)

    monkeypatch.setattr(training, "write_checkpoint", full)
    out = tmp_path / "run"
    assert main(train(photos, out, "--keep", 9, "--keep-optimizer")) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 3, "step 6 is tried at its interval and at the end of its epoch"
    assert all("No space left on device); training continues, the newest on the disk is step-00000003" in w for w in warnings)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000003", "step-00000012"]


@pytest.mark.slow
def test_a_file_size_limit_in_a_real_process(photos: Path, tmp_path: Path) -> None:
    """The limit lets neither a checkpoint nor the final weights be written; what was saved before is still there, and without
    the limit the same command ends the run."""
    out = tmp_path / "run"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    words = command(train(photos, out))
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False, preexec_fn=limited)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "training continues, there is none on the disk yet" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cammask: error: cannot write ")
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.part"))
    assert len(logged(out)) == STEPS
    assert main(train(photos, out)) == 0


def test_a_log_that_cannot_be_written_is_said_once_and_caught_up(tmp_path: Path) -> None:
    said: list[str] = []
    log = run_dir.RunLog(tmp_path, warn=said.append)
    log.path.mkdir()
    for step in (1, 2):
        log.write({"step": step})
    assert len(said) == 1
    assert "log.jsonl (Is a directory); training continues" in said[0]
    log.path.rmdir()
    for step in (3, 4):
        log.write({"step": step})
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # a kill
    log.truncate_after(2)
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_half_lines_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = run_dir.RunLog(tmp_path, warn=said.append)
    log.write({"step": 1})
    opened = Path.open

    @contextmanager
    def almost_full(path: Path, *options: Any, **more: Any) -> Iterator[SimpleNamespace]:
        with opened(path, *options, **more) as file:
            yield SimpleNamespace(tell=file.tell, write=lambda data: file.write(data[:5]))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", almost_full)
        log.write({"step": 2})
    assert "No space left on device" in said[0]
    assert log.path.read_text() == '{"step": 1}\n'
    log.write({"step": 3})
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(train(photos, tmp_path / "file" / "run")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_saving_copies_and_waits_for_the_one_before(tmp_path: Path) -> None:
    keeper = Checkpoints(tmp_path, {}, keep=3, warn=print)
    weights = torch.zeros(3)
    for step in range(4):
        keeper.save(Snapshot({"w": weights}, {"step": step, "best_step": 0}))
        weights += 1
    keeper.wait()
    assert [training.read_checkpoint(path).saved.tensors["w"].tolist() for path in keeper.folders()] == [
        [float(step)] * 3 for step in (0, 1, 2, 3)
    ], "the best, 0, stays beside the newest three"
    assert len(keeper.stalls) == 4


# Losses that are not finite


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(compiled: bool) -> None:
    from tests.test_step import SHORT, classifier, dataset

    config = replace(SHORT, compile="default" if compiled else "off", method="ft-fd", masking="", max_skipped=3)  # in a row
    seen: list[list[float]] = []
    look = TrainState.read_and_reset

    def spoiled() -> Any:
        loader = dataset()
        original = train_module.split_microbatches

        def parts(batch: Any, config: TrainConfig, state: TrainState, world: World) -> Any:
            if state.step in (0, 2, 3):
                batch = batch._replace(images=torch.full(batch.images.shape, torch.nan).permute(0, 3, 1, 2))
            return original(batch, config, state, world)

        return loader, parts

    loader, parts = spoiled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "split_microbatches", parts)
        patch.setattr(TrainState, "read_and_reset", lambda state: seen.append(state.tally.tolist()) or look(state))  # type: ignore[func-returns-value]
        result = train_module.fine_tune(classifier(dtype=torch.float32), loader, None, config, log_every=1)
    assert result.skipped == 3
    assert [tally[2:] for tally in seen[:6]] == [[1, 1], [0, 1], [1, 2], [2, 3], [0, 3], [0, 3]]
    assert all(p.isfinite().all() for p in result.last.parameters())


def test_a_run_that_diverges_stops_with_a_bundle(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(train(photos, out, "--lr", "1e30", "--max-skipped", 3, "--donors", "global", "--accumulate", 2)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 3 steps in a row" in error
    assert "try a lower learning rate (--lr)" in error
    assert str(out / "debug") in error
    report = json.loads((out / "debug" / "debug.json").read_text())
    assert report["bad_in_a_row"] == 3
    assert len(report["sample_ids"]) == len(set(report["sample_ids"])) == 8
    assert report["samples_without_finite_logits"] == report["sample_ids"]
    assert any(norm in ("nan", "inf") for norm in report["gradient_norms"].values())
    with safe_open(out / "debug" / "masks.safetensors", "pt") as file:
        assert file.get_tensor("masks").shape == (8, 36)
        assert file.get_tensor("sample_ids").tolist() == report["sample_ids"]
    assert logged(out)[-1]["skipped"] >= 3


# Memory


@pytest.mark.parametrize(
    ("batch", "accumulate", "ranks", "advice"),
    [
        (512, 1, 8, "try --accumulate 2, which keeps the global batch of 512 (32 images at a time), or --batch-size 256"),
        (512, 2, 1, "try --accumulate 4, which keeps the global batch of 512 (128 images at a time), or --batch-size 256"),
        (6, 2, 1, "try --accumulate 3, which keeps the global batch of 6 (2 images at a time), or --batch-size 4"),
        (8, 4, 2, "one image is too many"),
    ],
)
def test_out_of_memory_says_what_to_try(batch: int, accumulate: int, ranks: int, advice: str) -> None:
    config = TrainConfig(batch_size=batch, accumulate=accumulate)
    assert advice in out_of_memory(config, World(0, ranks), torch.OutOfMemoryError("CUDA out of memory. Tried"))


def test_out_of_memory_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train_module, "split_microbatches", full)
    assert main(train(photos, tmp_path / "run")) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "try --accumulate 2, which keeps the global batch of 8" in error


# Locks


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, log = tmp_path / "run", tmp_path / "log.txt"
    first = start(train(photos, out, "--epochs", 500), log=log)
    try:
        assert wait_for(lambda: last_step(out) >= 1, first), log.read_text()
        assert main(train(photos, out, "--epochs", 500)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{out} belongs to a run that is under way (process {first.pid} on {socket.gethostname()})" in error
        assert main(train(photos, out, "--epochs", 500, "--overwrite")) == 2
    finally:
        kill(first.pid, signal.SIGKILL)
        first.wait()
    with RunLock(out):  # the kernel has freed it
        pass


def test_locks_of_the_dead_and_of_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "STALE", 0.3)
    lock = tmp_path / "lock"
    (tmp_path / "other").touch()
    for stale in (
        {"host": socket.gethostname(), "pid": 2**22 + 1, "born": "1"},  # no such process
        {"host": socket.gethostname(), "pid": os.getppid(), "born": "1"},  # its number was given to another
        {"host": "elsewhere", "pid": 1, "born": "1"},  # no heartbeat
        "garbage",
    ):
        lock.write_text(json.dumps(stale))
        with RunLock(tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        lock.write_text("")
    alive = {"host": socket.gethostname(), "pid": os.getppid(), "born": run_dir._born(os.getppid())}
    lock.write_text(json.dumps(alive))
    with pytest.raises(ValueError, match=f"process {os.getppid()} on "), RunLock(tmp_path):
        pass
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "born": "1"}))
    monkeypatch.setattr(time, "sleep", lambda seconds: os.utime(lock, (time.time() + 1, time.time() + 1)))
    with pytest.raises(ValueError, match="process 7 on elsewhere"), RunLock(tmp_path):
        pass


def test_the_kernel_keeps_out_whom_the_file_does_not_name(tmp_path: Path) -> None:
    """Two runs that start together: the first has the lock, and has not yet written who it is."""
    code = "import fcntl, sys; it = open(sys.argv[1], 'a'); fcntl.lockf(it, fcntl.LOCK_EX); print('held', flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="belongs to a run that is under way"), RunLock(tmp_path):
            pass
        holder.kill()


def test_a_lock_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "HEARTBEAT", 0.05)
    (tmp_path / "other").touch()
    with RunLock(tmp_path):
        os.utime(tmp_path / "lock", (1, 1))
        assert wait_for(lambda: (tmp_path / "lock").stat().st_mtime > 1)
    assert (tmp_path / "lock").read_text() == ""


# Signals and processes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_signal_to_the_whole_group_saves_first(photos: Path, tmp_path: Path, number: int, loader: str) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the loader's processes too."""
    out = tmp_path / "run"
    words = command(train(photos, out, "--epochs", 500, "--workers", 2, "--loader", loader, "--save-every", 10_000))
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert wait_for(lambda: last_step(out) >= 2, process)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert re.search(r"stopped at step \d+ of 3000, saved; run the same command again to resume$", said.strip())
    assert "Traceback" not in said
    (path,) = (out / "checkpoints").iterdir()
    assert training.read_checkpoint(path).saved.metadata["step"] == last_step(out)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    code = (
        "import time; from cammask_fast.runtime.signals import GracefulShutdown\n"
        "with GracefulShutdown() as stop:\n    print('ready', flush=True)\n    time.sleep(60)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "once more to stop at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stderr.readline() == "cammask: stopped at once by a second signal\n"


@pytest.mark.slow
def test_a_dead_loader_process_ends_the_run_with_the_cause(photos: Path, tmp_path: Path) -> None:
    from tests.helpers.processes import children

    out, log = tmp_path / "run", tmp_path / "log.txt"
    process = start(train(photos, out, "--epochs", 500, "--workers", 2), log=log)
    saved = out / "checkpoints" / "step-00000003"
    assert wait_for(saved.exists, process), log.read_text()
    workers = [pid for pid in children(process.pid) if b"cammask_fast" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    kill(workers[0], signal.SIGKILL)
    assert process.wait() == 2
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("cammask: error: a process that reads images was killed")
    assert list((out / "checkpoints").iterdir()), "and the run can go on"

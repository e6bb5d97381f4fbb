"""Several processes train as one: the same losses, one voice, and an end in seconds when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cammask_fast import distributed
from cammask_fast.cli import main
from cammask_fast.distributed import in_buckets, watchdog
from tests.helpers.processes import (
    assert_same_run,
    kill,
    last_step,
    logged,
    photo_folder,
    run,
    start,
    trainers,
    wait_for,
)

OPTIONS = ("--epochs", 1, "--batch-size", 16, "--lr", "1e-4", "--log-every", 1, "--loader", "torch", "--workers", 0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


def train(photos: Path, out: Path, *options: object) -> list[object]:
    return ["train", "--data", photos, "--out", out, *OPTIONS, *options]


def run_patched(patch: str, argv: list[object], *, folder: Path) -> subprocess.CompletedProcess[str]:
    """`cammask ARGV` in two ranks that run the lines of `patch` first."""
    script = folder / "script.py"
    script.write_text(f"import os, sys\n{patch}\nfrom cammask_fast.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run([*torchrun, *map(str, argv)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("--masking", "ObjMaskSingleFill(0.3)")),
        (4, ("--masking", "RandMaskMultiFill(0.5)", "--accumulate", 2)),
        (2, ("--masking", "RandMaskNoFill(0.5)", "--compile", "default")),
    ],
)
def test_any_number_of_ranks_gives_the_same_losses(
    photos: Path, tmp_path: Path, ranks: int, options: tuple[object, ...]
) -> None:
    """With donors by position in the global batch; three steps, so that differences of rounding cannot grow."""
    one, many = tmp_path / "one", tmp_path / "many"
    shared = ("--donors", "global", "--masking", options[1])
    assert main([str(word) for word in train(photos, one, *shared)]) == 0
    done = run(train(photos, many, "--donors", "global", *options), ranks=ranks, limit=400)  # the compiler may take minutes
    assert done.returncode == 0, done.stderr
    ours, theirs = logged(many), logged(one)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=2e-4)
    assert len(ours) == 3
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (one, many))
    assert second["processes"] == ranks
    assert second["validation_accuracy"] == pytest.approx(first["validation_accuracy"], abs=100 / 9 + 1e-6)
    assert done.stdout.count("written to") == 1, "only rank 0 speaks"
    assert not list(many.glob("*rank*")), "and writes"


@pytest.mark.slow
def test_donors_of_the_own_batch_differ_between_ranks(photos: Path, tmp_path: Path) -> None:
    """The default, as in the paper's code: the ranks draw for themselves, and the run is another one, but as reproducible."""
    outs = [tmp_path / name for name in ("one", "first", "second")]
    options = ("--masking", "RandMaskMultiFill(0.5)", "--lr", "1e-2")
    assert main([str(word) for word in train(photos, outs[0], *options)]) == 0
    for out in outs[1:]:
        assert run(train(photos, out, *options), ranks=2).returncode == 0
    assert logged(outs[1]) == logged(outs[2])
    assert logged(outs[0])[-1]["loss"] != pytest.approx(logged(outs[1])[-1]["loss"], rel=1e-3)


@pytest.mark.alone
@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_its_message(photos: Path, tmp_path: Path) -> None:
    """Rank 1 alone cannot read its data."""
    patch = """
from cammask_fast.data.loaders import torch_loader
def broken(loader, decoded):
    raise ValueError("the disk of this machine is gone")
if os.environ["RANK"] == "1":
    torch_loader.replace_or_drop_unreadable = broken
"""
    started = time.monotonic()
    done = run_patched(patch, train(photos, tmp_path / "out", "--workers", 0), folder=tmp_path)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("cammask: error")]
    assert ours == ["cammask: error: rank 1: the disk of this machine is gone"]
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_different_settings_are_refused_at_the_start(photos: Path, tmp_path: Path) -> None:
    patch = "if os.environ['RANK'] == '1': sys.argv += ['--lr', '1e-5']"
    done = run_patched(patch, train(photos, tmp_path / "out"), folder=tmp_path)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("cammask: error")]
    assert len(ours) == 1
    assert "rank 1 was started with other settings than rank 0: lr 1e-05 instead of 0.0001" in ours[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.alone
@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_and_is_named(photos: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log.txt"
    process = start(train(photos, out, "--epochs", 200, "--timeout", 4), ranks=2, log=log)
    assert wait_for(lambda: last_step(out) >= 3, process), log.read_text(errors="replace")
    stopped = trainers(process, 2)[1]
    kill(stopped, signal.SIGSTOP)
    try:
        wait_for(lambda: "no progress for 4 s" in log.read_text(errors="replace"), process)
    finally:
        kill(stopped, signal.SIGKILL)
    assert process.wait() != 0
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("cammask: error")]
    assert len(said) == 1
    assert f"(pid {stopped} on " in said[0]
    assert "does not answer; run the same command again to resume" in said[0]


def test_a_rank_that_stops_before_its_watch_has_looked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TICK", 0.01)
    store = HashStore()
    first, _ = (distributed.Watchdog(store, rank, 2, 4.0) for rank in (0, 1))
    assert f"rank 1 (pid {os.getpid()} on {socket.gethostname()}) does not answer" in first._describe(*first._silent())


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Pair:
    """Two ranks, of which the first looks; the second, while it `answers`, tells where it stands whenever the first waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, store = Clock(), HashStore()
        self.ranks = [distributed.Watchdog(store, rank, 2, 10.0, clock=self.clock) for rank in (0, 1)]
        self.answers = True
        monkeypatch.setattr(time, "sleep", lambda seconds: self.tell())
        for rank in self.ranks:
            rank.beat("in step 1")

    def tell(self) -> None:
        if self.answers:
            self.ranks[1].tick()

    def after(self, seconds: float) -> str | None:
        """What the first rank finds so much later."""
        self.clock.now += seconds
        self.ranks[0].tick()
        self.tell()
        return self.ranks[0].find_stalled_rank()


@pytest.mark.parametrize("compiler", [0, 1], ids=["itself", "the other"])
def test_a_rank_that_compiles_has_more_time_and_so_has_who_waits_for_it(monkeypatch: pytest.MonkeyPatch, compiler: int) -> None:
    pair = Pair(monkeypatch)
    pair.ranks[compiler].compiling = True
    assert [pair.after(11) for _ in range(watchdog.COMPILE_TIMEOUTS - 1)] == [None] * (watchdog.COMPILE_TIMEOUTS - 1)
    said = pair.after(11)
    assert said is not None
    assert said.startswith(f"no progress for 60 s (6 times --timeout): rank {compiler} (pid ")
    assert "is stalled in compiling; run the same command again" in said


def test_the_end_of_a_compilation_starts_the_time_anew_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    pair.ranks[1].compiling = True
    assert pair.after(11) is None
    pair.ranks[1].compiling = False
    assert pair.after(9) is None
    said = pair.after(2)
    assert said is not None
    assert said.startswith("no progress for 10 s (--timeout): rank 0 (pid ")
    assert "is stalled in in step 1;" in said


def test_a_rank_that_stops_while_it_compiles_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    pair.ranks[1].compiling = True
    pair.tell()
    pair.answers = False
    said = pair.after(11)
    assert said is not None
    assert said.startswith("no progress for 10 s (--timeout): rank 1 (pid ")
    assert "does not answer" in said


def test_a_rank_that_looks_for_a_stalled_one_answers_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several may look at the same time, for as long as a compiler may keep them waiting."""
    pair = Pair(monkeypatch)
    pair.ranks[1].compiling = True
    pair.tell()
    pair.answers = False
    ticks: list[int] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: ticks.append(pair.ranks[1]._statuses()[0]["ticks"]))
    assert pair.after(11) is not None
    assert ticks == list(range(1, 1 + 4 * watchdog.SILENT_LOOKS))


def test_without_a_compilation_the_time_is_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    assert pair.after(10) is None
    pair.ranks[0].beat("in step 2")
    assert pair.after(10) is None
    said = pair.after(1)
    assert said is not None
    assert "rank 1 (pid" in said, "it came least far"


def test_the_watch_knows_when_the_compiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, seen = distributed.Watchdog(HashStore(), 0, 1, 10.0, clock=Clock()), []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(watch.compiling)
        return graph.forward

    monkeypatch.setattr(watchdog, "_current", watch)
    for name in ("start_callbacks", "end_callbacks"):
        monkeypatch.setattr(f"torch._dynamo.callback.callback_handler.{name}", [])
    distributed.watch_compiler()
    double = torch.compile(lambda x: 2 * x, backend=compiler)
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert seen == [True]
    assert (watch.compiling, watch.beats) == (False, 1), "the end of a compilation is progress"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(photos: Path, tmp_path: Path) -> None:
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log.txt"
    options = ("--epochs", 24, "--save-every", 1000)
    assert run(train(photos, whole, *options), ranks=2).returncode == 0
    process = start(train(photos, out, *options), ranks=2, log=log)
    assert wait_for(lambda: last_step(out) >= 5, process), log.read_text(errors="replace")
    kill(trainers(process, 2)[1], signal.SIGTERM)
    assert process.wait() != 0
    text = log.read_text(errors="replace")
    assert "SIGTERM: finishing the step and saving" in text
    assert "exitcode  : 75" in text
    done = run(train(photos, out, *options), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert logged(out) == logged(whole)


@pytest.mark.parametrize("most", [1, 100, 250, 10_000])
def test_buckets_keep_the_order_and_the_size(most: int) -> None:
    gradients = [torch.zeros(n) for n in (10, 20, 30, 1, 50)]
    buckets = in_buckets(gradients, most=most)
    assert all(a is b for a, b in zip((g for bucket in buckets for g in bucket), gradients, strict=True))
    assert all(len(bucket) == 1 or sum(g.nbytes for g in bucket) <= most for bucket in buckets)
    assert all(bucket for bucket in buckets)


def test_processes_meet_in_a_store_that_the_dead_have_written_to() -> None:
    """Two attempts of three processes; before the second, rank 1 looks into the store long before rank 0 is there."""
    store = HashStore()
    for part in ("1", "2"):
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(distributed.rendezvous_prefix, store, rank, 3, timeout=20) for rank in (1, 2)]
            time.sleep(0.2)
            assert not any(other.done() for other in others), "they take what the dead have left for an answer"
            first = pool.submit(distributed.rendezvous_prefix, store, 0, 3, timeout=20)
            assert [future.result() for future in (first, *others)] == [part] * 3


def test_a_machine_that_does_not_come_is_named() -> None:
    with pytest.raises(ValueError, match=r"rank 0 did not meet rank 1, 2 within 0.1 s \(--timeout\): is torchrun up"):
        distributed.rendezvous_prefix(HashStore(), 0, 3, timeout=0.1)
    with pytest.raises(ValueError, match="rank 2 did not meet rank 0"):
        distributed.rendezvous_prefix(HashStore(), 2, 3, timeout=0.1)


@pytest.mark.slow
def test_a_machine_that_is_lost_and_comes_back(photos: Path, tmp_path: Path) -> None:
    """Two torchruns, as if on two machines; one dies with its process and is started again. From then on they do not agree on
    how often the processes were started."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = ("--epochs", 16, "--save-every", 3, "--overwrite")
    assert run(train(photos, whole, *options), ranks=2).returncode == 0
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two"]
    command = ["-m", "cammask_fast", *map(str, train(photos, out, *options))]
    # one thread, as torchrun does where a machine has several processes; with its shared store, it does not tell a machine that
    # joins later where to meet
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = tmp_path / "log.txt"

    def machine(*, keeps_the_meeting: bool) -> subprocess.Popen[bytes]:
        words = [*torchrun, *meeting, "--rdzv-conf", f"is_host={int(keeps_the_meeting)}", *command]
        with log.open("ab") as file:
            return subprocess.Popen(words, stdout=file, stderr=file, env=environment)

    stays, lost = machine(keeps_the_meeting=True), machine(keeps_the_meeting=False)
    assert wait_for(lambda: last_step(out) >= 8, stays), log.read_text(errors="replace")
    for pid in (lost.pid, *trainers(lost, 2)):
        kill(pid, signal.SIGKILL)
    lost.wait()
    again = machine(keeps_the_meeting=False)
    assert (stays.wait(), again.wait()) == (0, 0), log.read_text(errors="replace")
    assert "resuming from step" in log.read_text(errors="replace")
    assert_same_run(out, whole)


def test_one_process_alone_votes_at_once() -> None:
    vote = distributed.AsyncAnyFlag()
    assert [vote(flag) for flag in (False, True, False)] == [False, True, False]


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_all(photos: Path, tmp_path: Path) -> None:
    """The gradients of rank 1 spoil the sum: no rank may apply it, or they would drift apart and then disagree."""
    patch = """
import torch
from cammask_fast import train
parts = train.split_microbatches
def spoiled(batch, config, state, world):
    found = parts(batch, config, state, world)
    if world.rank == 1 and state.step == 3:
        images = torch.full(batch.images.shape, torch.nan).permute(0, 3, 1, 2)
        found = [(piece._replace(images=images), draws) for piece, draws in found]
    return found
train.split_microbatches = spoiled
"""
    out = tmp_path / "out"
    argv = train(photos, out, "--epochs", 3, "--masking", "RandMaskNoFill(0.5)")
    done = run_patched(patch, argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = logged(out)
    assert [line["skipped"] for line in lines] == [0] * 3 + [1] * 6
    assert [line["loss"] is None for line in lines] == [False] * 3 + [True] + [False] * 5
    assert json.loads((out / "run.json").read_text())["skipped_steps"] == 1


@pytest.mark.slow
def test_another_number_of_processes_only_with_global_donors(photos: Path, tmp_path: Path) -> None:
    for donors in ("batch", "global"):
        out, log = tmp_path / donors, tmp_path / f"{donors}.txt"
        options = ("--epochs", 30, "--donors", donors, "--save-every", 2)
        process = start(train(photos, out, *options), log=log)
        assert wait_for((out / "checkpoints" / "step-00000002").exists, process), log.read_text()
        kill(process.pid, signal.SIGKILL)
        process.wait()
        done = run(train(photos, out, *options), ranks=2)
        if donors == "batch":
            assert done.returncode != 0
            assert "started with other settings: processes 2 instead of 1" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert "resuming from step" in done.stderr

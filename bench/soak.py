"""A run under faults: processes killed, checkpoints and samples damaged, signals, a full disk. Does it end as if nothing were?

Two ranks under torchrun fine-tune the tiny CLIP on a part of the embedded benchmark, written as image files of which some are
damaged. First undisturbed, then with a fault at every few steps; in the end the weights must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from bench.processes import kill, last_step, logged, run, start, trainers, wait_for
from bench.records import cpu_environment, show
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import training_splits

RANKS = 2
BATCH = 16
IMAGES = 20 * BATCH
DAMAGED_SAMPLES = 5
STEPS_PER_FAULT = 20
FAULTS_PER_MINUTE = 3
SMALL_FILE = 1_000_000
"""Bytes: more than the log, less than a checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="after these only the first of every kind are made (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--json", action="store_true", help="print the record as a JSON line")
    parser.add_argument("--out", type=Path, help="write the record as a JSON line")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs there (default: a temporary folder)")


def main(options: argparse.Namespace) -> int:
    """Returns 0 when every fault was survived and the weights are equal, else 1."""
    if options.minutes < 1:
        raise ValueError(f"--minutes: expected 1 or more, got {options.minutes}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        record = soak(folder, minutes=options.minutes, seed=options.seed)
    show([record], table(record), as_json=options.json, out=options.out)
    return 0 if record["weights_equal"] and record["survived"] == record["faults"] else 1


def table(record: dict[str, object]) -> str:
    kinds = record["kinds"]
    assert isinstance(kinds, dict)
    lines = [f"{kind:28}{done:3} of {count} survived" for kind, (count, done) in kinds.items()]
    same = "equal" if record["weights_equal"] else "DIFFER FROM"
    lines.append(f"{record['steps']} steps in {record['seconds']} s; the weights {same} those of the undisturbed run")
    return "\n".join(lines)


def soak(folder: Path, *, minutes: float, seed: int) -> dict[str, object]:
    """Train, disturb a second run of the same training, and compare the two.

    Args:
        folder: for images and runs.
        minutes: that the disturbed run should last.
        seed: of images and faults.

    Returns:
        The record.

    Raises:
        ValueError: the undisturbed run fails or takes more than all the minutes.
    """
    begun = time.monotonic()
    generator = random.Random(seed)
    data = write_images(folder / "images", generator)
    faults = max(len(FAULTS), int(minutes * FAULTS_PER_MINUTE))
    epochs = -(-faults * STEPS_PER_FAULT // (IMAGES // BATCH)) + 1
    whole, out = folder / "undisturbed", folder / "disturbed"

    def argv(to: Path) -> list[object]:
        options = ["--epochs", epochs, "--batch-size", BATCH, "--lr", "1e-5", "--save-every", 5, "--log-every", 1]
        more = ["--val-share", 0.1, "--max-bad", 0.1, "--workers", 1, "--timeout", 60, "--loader", "torch"]
        return ["train", "--data", data, "--out", to, *options, *more]

    try:
        done = run(argv(whole), ranks=RANKS, limit=60 * minutes)
    except subprocess.TimeoutExpired:
        raise ValueError(f"--minutes: the undisturbed run alone takes more than {minutes:g} on this machine") from None
    if done.returncode:
        raise ValueError(f"the undisturbed run failed: {done.stderr[-500:]}")
    steps = last_step(whole)
    disturbed = Disturbed(argv(out), out, folder / "log.txt", generator)
    injected, survived = Counter[str](), Counter[str]()
    for index, (target, kind) in enumerate(plan(faults, steps, generator)):
        late = time.monotonic() - begun > 60 * minutes * 0.9
        if late and index >= len(FAULTS):
            break
        if not disturbed.reaches(target):
            break
        injected[kind] += 1
        FAULTS[kind](disturbed)
        survived[kind] += disturbed.reaches(last_step(out) + 2)
    finished = disturbed.ends()
    samples = (out / "bad_samples.tsv").read_text(encoding="utf-8").splitlines() if finished else []
    injected["damaged sample"] = DAMAGED_SAMPLES
    survived["damaged sample"] = len({line.split("\t")[0] for line in samples})
    return {
        "op": "soak",
        "faults": injected.total(),
        "survived": survived.total(),
        "kinds": {kind: [count, survived[kind]] for kind, count in sorted(injected.items())},
        "weights_equal": finished and equal(out, whole),
        "steps": steps,
        "ranks": RANKS,
        "minutes": minutes,
        "seconds": round(time.monotonic() - begun, 1),
        **cpu_environment(),
    }


def plan(faults: int, steps: int, generator: random.Random) -> list[tuple[int, str]]:
    """Choose the faults: each kind once before any comes again, and steps to recover in after each.

    On a slow machine, too, the first of every kind are made: a soak that ends early still says something about all of them.

    Args:
        faults: their number.
        steps: of the run.
        generator: of the random choices.

    Returns:
        Step and kind of every fault.
    """
    apart = (steps - 10) // faults
    kinds: list[str] = []
    while len(kinds) < faults:
        kinds += generator.sample(list(FAULTS), len(FAULTS))
    return [(5 + index * apart + generator.randrange(apart // 2), kinds[index]) for index in range(faults)]


def write_images(folder: Path, generator: random.Random) -> Path:
    """The first images of the benchmark's training split as PNG files, some of them cut off."""
    train, _ = training_splits(0, batch_size=BATCH)
    files = []
    for index, (image, label) in enumerate(zip(train.images[:IMAGES], train.labels[:IMAGES].tolist(), strict=True)):
        path = folder / CLASS_NAMES[label] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
        files.append(path)
    for path in generator.sample(files, DAMAGED_SAMPLES):
        path.write_bytes(path.read_bytes()[:200])
    return folder


def equal(out: Path, whole: Path) -> bool:
    """Losses of every step and the weights, bit for bit."""
    ours, theirs = (load_file(folder / "last.safetensors") for folder in (out, whole))
    return logged(out) == logged(whole) and all((ours[name] == theirs[name]).all() for name in theirs)


@dataclass
class Disturbed:
    """A run that is started again whenever it ends too early, with the same command."""

    argv: list[object]
    out: Path
    log: Path
    generator: random.Random
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.again()

    def again(self) -> None:
        self.process = start(self.argv, ranks=RANKS, restarts=10_000, log=self.log)

    def reaches(self, step: int) -> bool:
        """Wait for a step. False when the run has come to its end, or has died for good."""
        for _ in range(2):
            if wait_for(lambda: last_step(self.out) >= step, self.process):
                return True
            if (self.out / "run.json").exists():
                return last_step(self.out) >= step
            self.again()
        return False

    def ends(self) -> bool:
        for _ in range(2):
            if self.process.wait() == 0:
                return True
            self.again()
        return self.process.wait() == 0

    def ranks(self) -> list[int]:
        wait_for(lambda: len(trainers(self.process, RANKS)) == RANKS, self.process)
        return trainers(self.process, RANKS)

    def gone(self, pids: list[int]) -> None:
        """Wait until torchrun has replaced the ranks."""
        wait_for(lambda: not set(pids) & set(trainers(self.process, RANKS)), self.process)


def kill_a_rank(run: Disturbed) -> None:
    pids = run.ranks()
    kill(run.generator.choice(pids), signal.SIGKILL)
    run.gone(pids)


def stop_a_rank(run: Disturbed) -> None:
    pids = run.ranks()
    kill(run.generator.choice(pids), signal.SIGTERM)
    run.gone(pids)


def stop_all(run: Disturbed) -> None:
    run.process.send_signal(signal.SIGTERM)
    run.process.wait()
    run.again()


def damage_a_checkpoint(run: Disturbed) -> None:
    """Flip a bit of the newest checkpoint or cut it off, and kill a rank, so that it is read."""
    folder = run.out / "checkpoints"
    wait_for(lambda: any(not path.name.endswith(".part") for path in folder.iterdir()), run.process)
    pids = run.ranks()
    for pid in pids:
        kill(pid, signal.SIGKILL)
    newest = max(path for path in folder.iterdir() if not path.name.endswith(".part"))
    file = newest / run.generator.choice(["tensors.safetensors", "state.json"])
    data = bytearray(file.read_bytes())
    if run.generator.random() < 0.5:
        data = data[: len(data) // 2]
    else:
        data[run.generator.randrange(len(data))] ^= 1
    file.write_bytes(data)
    run.gone(pids)


def fill_the_disk(run: Disturbed) -> None:
    """No file of any size for a while: the limit of a process stands for the disk."""
    before = last_step(run.out)
    pids = run.ranks()
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, limits[pid][1]))
    run.reaches(before + 6)  # one checkpoint at least
    for pid in pids:
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits[pid])
        except ProcessLookupError:
            continue


FAULTS: dict[str, Callable[[Disturbed], None]] = {
    "killed rank": kill_a_rank,
    "damaged newest checkpoint": damage_a_checkpoint,
    "full disk": fill_the_disk,
    "SIGTERM to a rank": stop_a_rank,
    "SIGTERM to torchrun": stop_all,
}

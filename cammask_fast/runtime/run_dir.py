"""The folder of a run: one run at a time, its log, and the settings with which it may be resumed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cammask_fast.runtime.env import launched
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.metrics_csv import METRICS, MetricsTable
from cammask_fast.runtime.notices import notice

TENSORBOARD, WANDB_ID = "tensorboard", "wandb.id"
LOCK, LOG, CHECKPOINTS, LAUNCH, RECIPE = "lock", "log.jsonl", "checkpoints", "launch.json", "recipe.toml"
HEARTBEAT = 15.0
STALE = 60.0
"""Seconds without a heartbeat after which a lock of another machine is stale."""
LONG_AGO = 3600.0
"""Seconds since the last heartbeat that even clocks which disagree cannot explain."""
RESUME_MUTABLE = ("data", "compile", "device", "max_skipped")
"""Settings that may change when a run is resumed: they do not change what it computes, but for rounding."""
VERSION = "cammask_fast"
"""The setting with the version; another patch release may resume a run, another minor one may not."""
FORMER_VALUES = {"PlainLoader": "TorchLoader"}
"""Values in the settings of runs that version 0.1.0 began, and what they are called now."""
SINCE_0_1_0 = ("train_images",)
"""Settings that runs of version 0.1.0 do not hold; there is nothing to compare them with."""
DEFAULTS_BEFORE = {"cam_source": "student", "cam_every": 1, "teacher_outputs": "computed", "cam_contrast": "none"}
"""Settings that earlier runs do not hold, and what they did."""
NOTED = ("images",)
"""Settings whose change is a notice: with other images of the same classes a run can be resumed, but it is not the same run."""
RESUME_MUTABLE_WITH_GLOBAL_DONORS = ("processes", "accumulate")


class RunLock:
    """One run per folder. The kernel frees a lock when its owner dies; where a file system does not share locks between
    machines, a heartbeat in the lock file stands for them.

    Entering raises ValueError with the owner's machine and process when another run has the folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._over = threading.Event()

    def __enter__(self) -> RunLock:
        while not (free := self._taken()) and free is None:
            self._file.close()
        if not free or self._owner_lives():
            owner = self._owner()
            self._file.close()
            raise ValueError(
                f"{self.path.parent} belongs to a run that is under way (process {owner.get('pid', '?')} on "
                f"{owner.get('host', '?')}): choose another --out or stop that run"
            )
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}, self._file)
        self._file.flush()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            if {path.name for path in self.path.parent.iterdir()} <= {LOCK, LAUNCH, RECIPE}:  # nothing came of the run
                for name in (LAUNCH, RECIPE, LOCK):
                    (self.path.parent / name).unlink(missing_ok=True)
                self.path.parent.rmdir()
        self._file.close()

    def _taken(self) -> bool | None:
        """Whether the kernel gave us the lock, None where the file was removed meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a loader's processes would inherit
            there = self.path.stat().st_ino
        except (BlockingIOError, PermissionError):
            return False
        except FileNotFoundError:
            return None
        except OSError:  # this file system has no locks
            return True
        return True if there == os.fstat(self._file.fileno()).st_ino else None

    def _owner(self) -> dict[str, Any]:
        try:
            self._file.seek(0)  # another file object for it would free the lock when it is closed
            owner = json.loads(self._file.read())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _owner_lives(self) -> bool:
        """Whether the file names a process that is still there, or another machine whose heart beats: watched for `STALE`
        seconds, as clocks of two machines may differ."""
        owner = self._owner()
        if not owner:
            return False
        if owner.get("host") != socket.gethostname():
            last = self.path.stat().st_mtime
            until = time.monotonic() + (STALE if time.time() - last < LONG_AGO else 0)
            while time.monotonic() < until:
                time.sleep(min(1.0, STALE))
                if self.path.stat().st_mtime != last:
                    return True
            return False
        return owner.get("pid") != os.getpid() and owner.get("born") == _born(owner.get("pid")) is not None

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _born(pid: Any) -> str | None:
    """When a process of this machine started, None without one; tells a process from a later one with its number."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


class RunLog:
    """A JSON line per look at the steps (means since the last: loss and its parts, gradient norm, mask share, entropy of the
    maps, images per second; learning rate, skipped steps so far) and one per epoch (accuracies in percent, by set). The same
    numbers stand in `metrics.csv`."""

    def __init__(self, folder: Path, *, warn: Callable[[str], None]):
        self.path, self.warn, self.failed = folder / LOG, warn, False
        self.pending: list[str] = []
        self.table = MetricsTable(self.path)

    def truncate_after(self, step: int, epoch: int | None = None) -> None:
        """Drop what came after `step` and the epoch of that number, from where the run resumes. Raises OSError when the file
        cannot be written."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
                repeated = "accuracy" in found and epoch is not None and found["epoch"] > epoch
                if found["step"] <= step and not repeated:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # a line that a kill has cut off
                continue
        write_text(self.path, "".join(kept))
        self.table.rebuild()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, and those that could not be written before."""
        self.pending.append(json.dumps(line) + "\n")
        size = None
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                file.write("".join(self.pending).encode())
            if self.path.stat().st_size != size + sum(map(len, self.pending)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.pending.clear()
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # no half lines
            self.table.columns = ()
            self._failed(self.path, error)
            return
        try:
            self.table.add(line)
        except OSError as error:
            self._failed(self.table.path, error)

    def _failed(self, path: Path, error: OSError) -> None:
        if not self.failed:
            self.warn(f"cannot write {path} ({error.strerror or error}); training continues")
        self.failed = True


def torchrun_id() -> str | None:
    """The torchrun that started this process, which stays when it starts its processes again; None without one."""
    return f"{socket.gethostname()} {os.getppid()} {_born(os.getppid())}" if launched() else None


def record_launch(folder: Path, launchers: Sequence[str | None]) -> None:
    """Record which torchrun launches work on the run; best effort."""
    with contextlib.suppress(OSError):  # a full disk: only a later attempt of the same launch would read it
        write_text(folder / LAUNCH, json.dumps(launchers))


def was_launched_by(folder: Path, launchers: Sequence[str | None]) -> bool:
    """Whether one of these launches has worked on the run before, so that its files are not those of an earlier launch."""
    try:
        before = json.loads((folder / LAUNCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(before, list) and any(one is not None and one in before for one in launchers)


def clear(folder: Path) -> None:
    """Remove an earlier run from its folder."""
    for name in (
        "run.json",
        "best.safetensors",
        "last.safetensors",
        LOG,
        METRICS,
        LAUNCH,
        "bad_samples.tsv",
        "report.html",
        "audit.json",
        WANDB_ID,
    ):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


def _release(settings: Mapping[str, Any]) -> list[str]:
    """Major and minor number of the version that wrote the settings."""
    return str(settings.get(VERSION)).split(".")[:2]


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a run with settings that would change it.

    Args:
        before: settings of the checkpoint.
        now: settings of this run.
        path: folder of the run, for the message.

    Raises:
        ValueError: naming the settings that differ.
    """
    free = set(RESUME_MUTABLE)
    before = {name: FORMER_VALUES.get(value, value) if isinstance(value, str) else value for name, value in before.items()}
    if _release(before) == _release(now):  # patch releases train alike
        free.add(VERSION)
    before = {name: value for name, value in DEFAULTS_BEFORE.items() if name in now} | before
    if before.get("donors") == now.get("donors") == "global":
        free |= set(RESUME_MUTABLE_WITH_GLOBAL_DONORS)
    different = [
        f"{name} {now.get(name)} instead of {before.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in (*free, *NOTED) and before.get(name) != now.get(name) and (name in before or name not in SINCE_0_1_0)
    ]
    if different:
        raise ValueError(
            f"the run in {path} was started with other settings: {', '.join(different)}. Resume with those settings, choose "
            "another --out, or start over with --overwrite"
        )
    if any(name in before and before[name] != now.get(name) for name in NOTED):
        notice(
            f"the images have changed since the run in {path} was started (other files, names or sizes): it resumes with "
            "those that are there now"
        )

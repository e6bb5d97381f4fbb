"""Checkpoints of a run that is under way, written beside the training and believed only when their checksums agree.

A checkpoint is a folder `step-00000500` of `tensors.safetensors` and `state.json`. It is written under another name, forced to
the disk and renamed, so that under its own name it is complete; `state.json` holds the SHA-256 of the tensors and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cammask_fast.model.files import read_safetensors
from cammask_fast.state import Snapshot

FORMAT = "cammask-run-1"
MOMENTS = ("exp_avg.", "exp_avg_sq.")
"""Prefixes of the optimiser's tensors."""
TENSORS, STATE = "tensors.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class StoredCheckpoint(NamedTuple):
    """A checkpoint that was read. path: its folder. settings: of the run that wrote it."""

    path: Path
    settings: dict[str, Any]
    saved: Snapshot


class Checkpoints:
    """The checkpoints of one run; the newest `keep` and the one with the best validation accuracy stay.

    warn: gets a line when a checkpoint cannot be written or read; a run never ends because of one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, keep: int = 2, warn: Callable[[str], None]):
        if keep < 1:
            raise ValueError(f"--keep: expected 1 or more, got {keep}")
        self.folder, self.settings, self.keep, self.warn = folder, dict(settings), keep, warn
        self.stalls: list[float] = []
        """Seconds for which each save kept the training waiting."""
        self._writer: threading.Thread | None = None

    def save(self, saved: Snapshot) -> None:
        """Copy a state and write it in a thread; waits while the one before is still being written."""
        started = time.perf_counter()
        self.wait()
        copied, ready = _snapshot(saved.tensors)
        self._writer = threading.Thread(target=self._write, args=(copied, ready, dict(saved.metadata)))
        self._writer.start()
        self.stalls.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def newest(self) -> StoredCheckpoint | None:
        """The newest checkpoint that is whole, or None. Damaged ones are reported and passed over."""
        for path in reversed(self.folders()):
            try:
                return read_checkpoint(path)
            except ValueError as error:
                self.warn(f"{error}: going back to the checkpoint before it")
        return None

    def drop_moments(self, weights: Mapping[str, Path]) -> None:
        """Leave of a finished run its last state alone, without the optimiser's moments, and with the weights in the files of
        the run. What is left is read as any checkpoint. It holds what a longer training with a new schedule needs (weights,
        generators, epoch, position in the data); that begins with an optimiser that has seen nothing.

        Args:
            weights: classifier files by prefix of the state's tensors (`student`, `best`). One with the same values, in the
                folder of the run, takes the place of the copy in the checkpoint.
        """
        folders = self.folders()
        if not folders:
            return
        try:
            _, settings, saved = read_checkpoint(folders[-1])
            tensors = {name: value for name, value in saved.tensors.items() if not name.startswith(MOMENTS)}
            part = folders[-1].with_name(f"{folders[-1].name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            elsewhere = {prefix: path for prefix, path in weights.items() if _holds(path, prefix, tensors)}
            own = {name: value for name, value in tensors.items() if name.split(".")[0] not in elsewhere}
            write_checkpoint(part, own, {**saved.metadata, "moments": False}, settings, elsewhere=elsewhere)
            _remove(folders[-1])
            part.rename(folders[-1])
            for path in folders[:-1]:
                _remove(path)
            _sync(self.folder)
        except (OSError, ValueError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self.warn(f"the optimiser's state stays in {self.folder} ({reason})")

    def folders(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_step_of)

    def _write(self, tensors: dict[str, Tensor], ready: Any, metadata: dict[str, Any]) -> None:
        step = metadata["step"]
        part = self.folder / f"step-{step:08d}.part"
        try:
            if ready is not None:
                tensors = _on_host(tensors, ready)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_checkpoint(part, tensors, metadata, self.settings)
            path = part.with_suffix("")
            if path.exists():  # of an earlier attempt at this run
                _remove(path)
            part.rename(path)
            _sync(self.folder)
            self._tidy(metadata["best_step"])
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            whole = [path.name for path in self.folders()]
            kept = f"the newest on the disk is {whole[-1]}" if whole else "there is none on the disk yet"
            self.warn(f"cannot write the checkpoint of step {step} to {self.folder} ({reason}); training continues, {kept}")
            shutil.rmtree(part, ignore_errors=True)

    def _tidy(self, best_step: int) -> None:
        folders = self.folders()
        for path in folders[: -self.keep]:
            if _step_of(path) != best_step:
                _remove(path)
        for left in self.folder.glob("*.part"):
            shutil.rmtree(left, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    elsewhere: Mapping[str, Path] | None = None,
) -> None:
    """Write a checkpoint into an empty folder and sync it to disk.

    Args:
        folder: exists and is empty.
        tensors: by name.
        metadata: of the state, JSON values.
        settings: of the run, JSON values; a resumed run must have the same.
        elsewhere: files two folders above that hold the tensors of a prefix.

    Raises:
        OSError: the folder cannot be written.
        SafetensorError: the tensors cannot be written.
    """
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    with (folder / TENSORS).open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    state = {"format": FORMAT, "settings": dict(settings), "state": dict(metadata), "tensors": digest}
    if elsewhere:
        own = {prefix: [path.name, _digest_of_tensors(read_safetensors(path)[0])] for prefix, path in elsewhere.items()}
        state["elsewhere"] = own
    with (folder / STATE).open("w", encoding="utf-8") as text:
        json.dump({**state, "sha256": _digest(state)}, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    _sync(folder)


def read_checkpoint(folder: Path) -> StoredCheckpoint:
    """Read a checkpoint. Raises ValueError, naming the folder, when anything in it is not what was written."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        claimed = state.pop("sha256")
        if state["format"] != FORMAT or claimed != _digest(state):
            raise ValueError("state.json was changed")
        if _digest_of(folder / TENSORS) != state["tensors"]:
            raise ValueError("tensors.safetensors was changed or cut off")
        tensors, _ = read_safetensors(folder / TENSORS)
        for prefix, (name, expected) in state.get("elsewhere", {}).items():
            weights, _ = read_safetensors(folder.parent.parent / Path(name).name)
            if _digest_of_tensors(weights) != expected:
                raise ValueError(f"{name} was changed")
            tensors |= {f"{prefix}.{key}": value for key, value in weights.items()}
        return StoredCheckpoint(folder, state["settings"], Snapshot(tensors, state["state"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{folder} is damaged ({' '.join(reason.split())})") from None


def _snapshot(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Copies on the device, and the event after which they are complete (None on a CPU)."""
    copied = {name: value.detach().clone() for name, value in tensors.items()}
    on_gpu = any(value.is_cuda for value in copied.values())
    return copied, torch.cuda.current_stream().record_event() if on_gpu else None


def _on_host(tensors: Mapping[str, Tensor], ready: Any) -> dict[str, Tensor]:
    """Copy to pinned memory on a stream of its own, beside the training."""
    device = next(value.device for value in tensors.values() if value.is_cuda)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        side.wait_event(ready)
        found = {
            name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            for name, value in tensors.items()
        }
    side.synchronize()
    return found


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, types and values; a file's header may change."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _holds(path: Path, prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds exactly the tensors of that prefix, bit for bit."""
    ours = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
    if not ours or not path.exists():
        return False
    theirs, _ = read_safetensors(path)
    return theirs.keys() == ours.keys() and all(
        theirs[name].dtype == value.dtype and torch.equal(theirs[name], value) for name, value in ours.items()
    )


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def _remove(path: Path) -> None:
    """Never half there under its own name."""
    gone = path.with_name(path.name + ".old.part")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

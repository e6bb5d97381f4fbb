"""What a run folder says about how it came to be: recipe, command, environment, git commit, data."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cammask_fast import __version__
from cammask_fast.commands.shared import Options
from cammask_fast.config import TrainConfig
from cammask_fast.data.factory import AnyLoader, TrainingData
from cammask_fast.distributed import World
from cammask_fast.model.pretrained import default_pretrained
from cammask_fast.recipes.run_recipe import write_recipe
from cammask_fast.runtime.env import launched
from cammask_fast.runtime.machine import cpu_name
from cammask_fast.runtime.notices import warn
from cammask_fast.runtime.run_dir import RECIPE

PACKAGES = ("triton", "torchvision", "open_clip_torch", "timm", "numpy", "safetensors", "pillow")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
LOADERS = {"TorchLoader": "torch", "DaliLoader": "dali"}
GIT_SECONDS = 10.0


def command_line(words: Sequence[str]) -> str:
    """The command that was typed, as a shell would read it; under torchrun with torchrun's own.

    words: the command line behind `cammask`.
    """
    if launched():
        try:
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
            return shlex.join(os.fsdecode(word) for word in parent.rstrip(b"\0").split(b"\0"))
        except OSError:
            return shlex.join(["torchrun", "-m", "cammask_fast", *words])
    return shlex.join(["cammask", *words])


def environment(device: str, processes: int) -> dict[str, Any]:
    """Machine, device and versions, as JSON can hold them."""
    found = {"cammask_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in (*PACKAGES, *DALI):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        "platform": platform.platform(), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "device": device,
        "processes": processes,
    }  # fmt: skip
    if device == "cuda":
        name, cuda = torch.cuda.get_device_name(), torch.version.cuda
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        machine |= {"gpu": name, "gpu_memory_bytes": memory, "cuda": cuda}
    return {**machine, "versions": found}


def git_commit(folder: Path) -> dict[str, Any] | None:
    """`{"commit": …, "changed": …}` of the repository around a folder, None outside one or without git. changed: whether
    tracked files differ from the commit, None where git does not answer in time."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def data_summary(data: TrainingData) -> dict[str, Any]:
    """Where the images lie and how many of each class train and validate."""
    return {
        "path": data.path, "fingerprint": data.fingerprint, "train": _counts(data.train, data.class_folders),
        "validation": None if data.validation is None else _counts(data.validation, data.class_folders),
    }  # fmt: skip


def _counts(loader: AnyLoader, folders: Sequence[str]) -> dict[str, int]:
    return dict(zip(folders, torch.bincount(loader.labels, minlength=len(folders)).tolist(), strict=True))


def begin_record(
    out: Path,
    args: Options,
    config: TrainConfig,
    data: TrainingData,
    *,
    start: Mapping[str, Any],
    device: str,
    world: World,
) -> dict[str, Any]:
    """Write `recipe.toml` into the run's folder.

    Args:
        out: folder of the run.
        args: options of the command line by name, with what was typed as `words`.
        config: the run's settings, all resolved.
        data: the run's images.
        start: what it starts from: `arch`, `pretrained`, and perhaps options such as `init`.
        device: cpu or cuda.
        world: the processes that share the run.

    Returns:
        What run.json says of the command, the machine and the data.
    """
    words = list(args.get("words") or ())
    command, git = command_line(words), git_commit(Path.cwd())
    several = "" if world.size == 1 else f" in {world.size} processes (torchrun --nproc-per-node {world.size})"
    remarks = [
        f"Repeats the run in {out}: cammask train --recipe {shlex.quote(str(out / RECIPE))} --out NEW{several}",
        f"Written by cammask-fast {__version__} with torch {torch.__version__}{_at(git)}; its command: {command}",
        "Any option overrides its line here.",
    ]
    arch, started = start["arch"], {name: value for name, value in start.items() if name not in ("arch", "pretrained")}
    try:
        write_recipe(
            out, config, args, arch=arch, pretrained=start["pretrained"] or default_pretrained(arch), remarks=remarks,
            resolved={**started, "device": device, "loader": LOADERS.get(type(data.train).__name__)},
        )  # fmt: skip
    except OSError as error:  # a full disk does not end a run that resumes
        warn(f"cannot write {out / RECIPE} ({error.strerror or error}); the run continues")
    return {
        "command": command, "recipe": args.get("recipe"), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "environment": environment(device, world.size), "git": git, "data_summary": data_summary(data),
    }  # fmt: skip


def _at(git: Mapping[str, Any] | None) -> str:
    return "" if git is None else f" at commit {git['commit'][:12]}{' with changes' if git['changed'] else ''}"

"""`--tensorboard` and `--wandb`: the lines of a run's log for those who watch runs there, each through its own library."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from cammask_fast.commands.shared import Options
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.notices import warn
from cammask_fast.runtime.run_dir import TENSORBOARD, WANDB_ID

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What each option needs."""


def refuse_missing_packages(args: Options) -> None:
    """Raise ValueError, naming the package, for a tracker that is not installed."""
    for name, package in PACKAGES.items():
        if args.get(name) and find_spec(package) is None:
            raise ValueError(f"--{name}: needs the package {package}: pip install {package}")


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log, under `train/` or `accuracy/`, without step and epoch."""
    if "accuracy" in line:
        return {f"accuracy/{name}": value for name, value in line["accuracy"].items()}
    return {f"train/{name}": v for name, v in line.items() if name not in ("step", "epoch") and v is not None}


class Trackers:
    """Those that were asked for, opened where the run begins or resumes.

    One that fails later is left out with a warning: the log in the run's folder has every number.
    """

    def __init__(self, args: Options, out: Path, settings: Mapping[str, Any]):
        """Open nothing yet.

        Args:
            args: options of the command line, of which `tensorboard` and `wandb` count.
            out: folder of the run.
            settings: of the run, which W&B shows.
        """
        self.args, self.out, self.settings = args, out, settings
        self.writers: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        self.closers: dict[str, Callable[[int], None]] = {}

    def begin(self, step: int) -> None:
        """Open them for a run that goes on from a step. Raises ValueError where one cannot be opened."""
        for name, open_one in (("tensorboard", self._tensorboard), ("wandb", self._wandb)):
            if self.args.get(name):
                try:
                    open_one(step)
                except Exception as error:  # of libraries that raise what they like
                    advice = "; WANDB_MODE=offline keeps the run on this machine" if name == "wandb" else ""
                    raise ValueError(f"--{name}: {' '.join(str(error).split()) or type(error).__name__}{advice}") from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Pass a line of the log on."""
        for name, writer in list(self.writers.items()):
            try:
                writer(line)
            except Exception as error:
                warn(f"--{name} has failed and is left out from step {line['step']} on ({type(error).__name__}: {error})")
                del self.writers[name]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, close in self.closers.items():
            try:
                close(0 if error is None else 1)
            except Exception as problem:
                warn(f"--{name} was not closed ({type(problem).__name__}: {problem})")

    def _tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.out / TENSORBOARD), purge_step=step + 1 if step else None)

        def write(line: Mapping[str, Any]) -> None:
            for name, value in scalars(line).items():
                writer.add_scalar(name, value, global_step=line["step"])
            if "accuracy" in line:
                writer.flush()

        self.writers["tensorboard"], self.closers["tensorboard"] = write, lambda _: writer.close()

    def _wandb(self, step: int) -> None:
        import wandb

        file = self.out / WANDB_ID
        if not file.exists():
            write_text(file, secrets.token_hex(4))
        run = wandb.init(
            project=self.args["wandb"], dir=str(self.out), name=self.out.name, id=file.read_text(encoding="utf-8").strip(),
            config=dict(self.settings), settings=wandb.Settings(console="off"), resume="allow" if step else None,
        )  # fmt: skip
        run.define_metric("*", step_metric="step")  # steps that a resumed run repeats are not refused
        self.writers["wandb"] = lambda line: run.log({"step": line["step"], "epoch": line["epoch"], **scalars(line)})
        self.closers["wandb"] = lambda code: run.finish(exit_code=code)

"""`train --extend`: more epochs over a finished run, from its end, under a fresh schedule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cammask_fast.commands.settings import Chosen
from cammask_fast.commands.shared import Options
from cammask_fast.runtime.notices import remark
from cammask_fast.runtime.run_dir import LOCK

LAST, RECORD = "last.safetensors", "run.json"
_PART = re.compile(r"epochs-(\d+)")


def finished_epochs(out: Path) -> int:
    """The epochs that the finished run in a folder has behind it, those before extensions included.

    Raises ValueError where its record cannot be read.
    """
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return int(record["config"]["epochs"]) + int(record.get("epochs_before", 0))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out / RECORD} cannot be read: choose another --out or pass --overwrite") from None


def parts(out: Path) -> list[int]:
    """The numbers of epochs after which the run in a folder was extended, ascending."""
    found = [_PART.fullmatch(path.name) for path in out.iterdir()] if out.is_dir() else []
    return sorted(int(one[1]) for one in found if one is not None and (out / one[0] / LAST).is_file())


def refuse_finished(out: Path, wanted: int) -> None:
    """Raise the ValueError that says what can be done about a folder with a finished run. wanted: `--epochs`."""
    done = finished_epochs(out)
    more = f"add --extend to go on from its end to {wanted} epochs, " if wanted > done else ""
    raise ValueError(f"{out} already holds a run of {done} epochs: {more}choose another --out or pass --overwrite")


def set_aside(out: Path) -> None:
    """Move a finished run into `out/epochs-N`, from whose last checkpoint the extension starts. Called on rank 0.

    The record, by which a run counts as finished, goes last: a move that is interrupted is finished by the next start.

    Raises ValueError where the folder cannot be written.
    """
    part = out / f"epochs-{finished_epochs(out)}"
    try:
        part.mkdir(exist_ok=True)
        for path in sorted(out.iterdir(), key=lambda path: path.name == RECORD):
            if path.name != LOCK and _PART.fullmatch(path.name) is None:
                path.rename(part / path.name)
    except OSError as error:
        raise ValueError(f"cannot move the finished run in {out} to {part} ({error.strerror or error})") from None


def extension_of(args: Options, chosen: Chosen, out: Path) -> tuple[Options, Chosen]:
    """Options and settings of the run that extends the one set aside last.

    `--epochs` counts all epochs. What the run began with (its teacher, its classes) stays; other settings may differ, as with
    `--init`.

    Args:
        args: options of the command line.
        chosen: settings that were given.
        out: folder of the run.

    Returns:
        Options and settings of the extension.

    Raises:
        ValueError: nothing can be extended, or no epochs are left.
    """
    before, wanted = parts(out), int(chosen.given.get("epochs", 0))
    if not before:
        begun = " yet: run its command without --extend to finish it" if (out / "checkpoints").is_dir() else ""
        raise ValueError(f"--extend: no finished run in {out}{begun}")
    refuse_too_few(out, before[-1], wanted)
    options = {**args, "init": str(out / f"epochs-{before[-1]}" / LAST), "pretrained": "", "epochs_before": before[-1]}
    return options, Chosen({**chosen.given, "epochs": wanted - before[-1]})


def refuse_too_few(out: Path, done: int, wanted: int) -> None:
    """Refuse an extension without epochs.

    Args:
        out: folder of the run, for the message.
        done: epochs of the finished run.
        wanted: `--epochs`, 0 where it was not given.

    Raises:
        ValueError: there is nothing left to train.
    """
    if wanted <= done:
        raise ValueError(f"--extend: the run in {out} has {done} epochs: give the number in all, above that, as --epochs")


def prepare(args: Options, out: Path, chosen: Chosen, *, complete: bool, is_main_process: bool) -> None:
    """Refuse what cannot be extended, and set a finished run aside, which rank 0 does.

    Args:
        args: options of the command line.
        out: folder of the run.
        chosen: settings that were given.
        complete: whether the run has finished.
        is_main_process: whether this is rank 0.

    Raises:
        ValueError: options that do not go together, or a run that cannot be set aside.
    """
    if args["overwrite"]:
        raise ValueError("--extend and --overwrite: give one of them")
    if args["teacher"] == "init":
        raise ValueError("--extend: with --teacher init nobody could tell whose weights teach: start a run with --init instead")
    if complete and is_main_process:
        refuse_too_few(out, finished_epochs(out), int(chosen.given.get("epochs", 0)))
        set_aside(out)


def tell_better(out: Path, before: int) -> None:
    """Say where the best checkpoint of the extension is worse than that of the run before it."""
    scores = [_validation(out / f"epochs-{before}" / RECORD), _validation(out / RECORD)]
    if None not in scores and scores[0] > scores[1]:  # type: ignore[operator]
        remark(
            f"the best checkpoint before the extension is better on the validation images ({scores[0]:.2f} % against "
            f"{scores[1]:.2f} %): {out / f'epochs-{before}' / 'best.safetensors'}"
        )


def _validation(record: Path) -> float | None:
    found = json.loads(record.read_text(encoding="utf-8")).get("accuracy", {}).get("validation")
    return None if found is None else float(found)

"""What a command line names as a model: a run folder, a checkpoint of `cammask train`, or a pre-trained CLIP."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from cammask_fast.model.layouts import architectures_with, shape_of
from cammask_fast.model.names import OPENAI_ARCHITECTURES
from cammask_fast.model.pretrained import is_supported
from cammask_fast.model.weights import FILES_OF_A_FOLDER, is_classifier, read_weights
from cammask_fast.runtime.notices import notice

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model is: a checkpoint with its classes, or else both towers of a pre-trained CLIP."""

    checkpoint: Path | None = None
    """A file that `cammask train` wrote; None for a pre-trained CLIP."""
    arch: str = ""
    """Of the pre-trained CLIP; of a checkpoint what the caller expects, empty for any."""
    pretrained: str = ""
    """As `--pretrained`; empty: the architecture's own."""


def _open_clips_models() -> list[str]:
    import open_clip  # takes seconds

    return open_clip.list_models()


def find_model(given: str | Path, *, arch: str = "", pretrained: str = "") -> ModelSource:
    """Find out what a command line names: a run folder, a checkpoint or a pre-trained CLIP.

    Args:
        given: a run folder (its best checkpoint), a checkpoint, a file or folder with a CLIP's weights, or an architecture.
        arch: of weights from elsewhere, which do not name theirs; of a checkpoint the one that is expected.
        pretrained: weights of an architecture (default: its own).

    Returns:
        Where the model is.

    Raises:
        ValueError: one line with what was found instead and what to do.
    """
    path = Path(given)
    if path.is_dir():
        if not _has_weights(path) or (path / BEST).is_file():
            return ModelSource(checkpoint=_of_run(path), arch=arch)
    elif path.is_file():
        if path.name == "run.json":
            return ModelSource(checkpoint=_of_run(path.parent), arch=arch)
        if is_classifier(path):
            return ModelSource(checkpoint=path, arch=arch)
    else:
        name = str(given)
        if not (name == "tiny" or name in OPENAI_ARCHITECTURES or name in _open_clips_models()):
            raise ValueError(f"no checkpoint at {given}, and no architecture of that name{_meant(path)}")
        if arch and arch != name:
            raise ValueError(f"{name} is an architecture, and --arch names another, {arch}: give one of them")
        return ModelSource(arch=name, pretrained=pretrained)
    if not arch:
        fitting = [name for name in architectures_with(shape_of(read_weights(path).tensors)) if is_supported(name)]
        advice = f"; their shapes fit --arch {' or '.join(fitting)}" if fitting else ""
        raise ValueError(f"{given} is not a classifier saved by cammask train, but weights of a CLIP: add --arch NAME{advice}")
    return ModelSource(arch=arch, pretrained=str(given))


def find_checkpoint(given: str | Path, option: str) -> Path:
    """As `find_model`, where only a run folder or a checkpoint will do. option: its name, for the error."""
    path = Path(given)
    if path.is_file() and path.name != "run.json" and not is_classifier(path):
        read_weights(path)
        raise ValueError(
            f"{option} {given}: not a classifier saved by cammask train, but weights of a CLIP: --pretrained takes it"
        )
    if path.is_dir() and _has_weights(path) and not (path / BEST).is_file():
        raise ValueError(f"{option} {given}: not a run folder, but weights of a CLIP: --pretrained takes it")
    checkpoint = find_model(given).checkpoint
    if checkpoint is None:
        raise ValueError(f"{option} {given}: expected a run folder or a checkpoint, and this is an architecture")
    return checkpoint


def is_own(given: str | Path) -> bool:
    """Whether this is a run folder with weights, or a checkpoint of `cammask train`."""
    path = Path(given)
    return is_classifier(path) or any(is_classifier(path / name) for name in (BEST, LAST))


def _of_run(folder: Path) -> Path:
    """The checkpoint of a run folder that a command takes."""
    if (folder / BEST).is_file():
        return folder / BEST
    if (folder / LAST).is_file():
        notice(f"{folder} has no {BEST}: {LAST} is used")
        return folder / LAST
    if (folder / "state.json").is_file() and (folder / "tensors.safetensors").is_file():
        raise ValueError(f"{folder} is the state of a run that is under way: give the folder of the finished run")
    if (folder / "checkpoints").is_dir() or (folder / "launch.json").is_file():
        raise ValueError(f"the run in {folder} is not finished: run its command again to finish it")
    runs = sorted(path.parent for path in folder.glob(f"*/{BEST}"))
    several = f": give one of the runs in it, {', '.join(map(str, runs[:3]))}{' …' if len(runs) > 3 else ''}" if runs else ""
    raise ValueError(f"no checkpoint at {folder}: a folder without {BEST}{several}")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES_OF_A_FOLDER)


def _meant(path: Path) -> str:
    """A close name beside a path, or of an architecture."""
    try:
        beside = {str(one): one for one in path.parent.iterdir() if one.is_dir() or one.suffix == ".safetensors"}
    except OSError:
        beside = {}
    close = difflib.get_close_matches(str(path), [*beside, "tiny", *OPENAI_ARCHITECTURES, *_open_clips_models()], n=1)
    return f"; did you mean {close[0]}?" if close else ""

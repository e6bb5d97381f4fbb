"""`recipe.toml` of a run: what reproduces it with `cammask train --recipe runs/x/recipe.toml`.

A shipped recipe holds a model and a table `[train]` of settings. That of a run also has a table `[options]`: the other options
of `cammask train` by name, `data` first, with absolute paths. Options of the command line override both.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cammask_fast.config import TrainConfig, load_recipe, options_of, recipe_names
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.run_dir import RECIPE

TABLES = {"arch", "pretrained", "train", "options"}
NOT_OF_THE_RUN = {"command", "words", "recipe", "arch", "pretrained", "out", "overwrite", "profile", "tensorboard", "wandb"}
"""Options that a recipe does not hold: they say where a run is written and who watches it."""
FOLDERS = {"pretrained", "init", "eval"}
"""Options whose text may be a folder's name, beside those that are paths."""
BENCHMARK = "texture-digits"


def is_recipe_file(name: str) -> bool:
    """Whether `--recipe NAME` names a file, or the folder of a run, instead of a shipped recipe."""
    return name not in recipe_names() and (name.endswith(".toml") or Path(name).exists())


def open_recipe(name: str) -> dict[str, Any]:
    """The tables of a shipped recipe, of a file or of the run in a folder: `{"arch": …, "pretrained": …, "train": {…},
    "options": {…}}`. Raises ValueError for one that is not there or cannot be read."""
    if not is_recipe_file(name):
        return load_recipe(name)
    path = Path(name, RECIPE) if Path(name).is_dir() else Path(name)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--recipe {name}: cannot read {path} ({error.strerror or error})") from None
    except ValueError as error:  # TOML, UTF-8
        raise ValueError(f"--recipe {name}: {path} is not a TOML file ({error})") from None
    unknown = sorted(found.keys() - TABLES)
    if unknown:
        raise ValueError(f"--recipe {name}: {path} has {', '.join(unknown)}; a recipe has {', '.join(sorted(TABLES))}")
    for key, kind in {"arch": str, "pretrained": str, "train": dict, "options": dict}.items():
        if not isinstance(found.get(key, kind()), kind):
            raise ValueError(f"--recipe {name}: {key} in {path} is no {'table' if kind is dict else 'text'}")
    return found


def option_words(name: str) -> list[str]:
    """The `[options]` of a recipe as words of a command line, to stand before those that are given and override them."""
    words: list[str] = []
    for key, value in open_recipe(name).get("options", {}).items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        else:
            words.append(f"{flag}={value}")
    return words


def write_recipe(
    folder: Path,
    config: TrainConfig,
    options: Mapping[str, Any],
    *,
    arch: str,
    pretrained: str,
    resolved: Mapping[str, Any],
    remarks: Sequence[str],
) -> None:
    """Write `recipe.toml` into the folder of a run.

    Args:
        folder: of the run; it must exist.
        config: the run's settings, all resolved.
        options: of `cammask train` by name; those that stand in `config`, or are None, are left out.
        arch: name of the model.
        pretrained: its weights: a name or a path.
        resolved: options that were chosen by the program, which replace those given.
        remarks: lines of the comment on top.

    Raises:
        OSError: when the file cannot be written.
    """
    settings = {one.name for kind in (TrainConfig, type(config.optim)) for one in options_of(kind)}
    given = {
        name: value
        for name, value in options.items()
        if name not in NOT_OF_THE_RUN | settings and not (value is None or value is False or value in ("", []))
    }
    table = {name: _absolute(name, value) for name, value in {"data": None, **given, **resolved}.items() if value is not None}
    train = config.to_dict()
    optim = train.pop("optim")
    lines = [f"# {_printable(remark)}" for remark in remarks]
    lines += ["", *_entries({"arch": arch, "pretrained": _absolute("pretrained", pretrained)})]
    for title, entries in (("options", table), ("train", train), ("train.optim", optim)):
        lines += ["", f"[{title}]", *_entries(entries)]
    write_text(folder / RECIPE, "\n".join(lines).lstrip("\n") + "\n")


def _absolute(name: str, value: Any) -> Any:
    """A path from the root, also behind NAME=; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [_absolute(name, one) for one in value]
    if isinstance(value, Path):
        return os.path.abspath(value)
    if not isinstance(value, str):
        return value
    if name == "data":
        return value if value == BENCHMARK or "://" in value else os.path.abspath(value)  # a pattern of shards, too
    before, equals, path = value.partition("=")
    if equals and os.path.exists(path):
        return f"{before}={os.path.abspath(path)}"
    is_path = os.path.isfile(value) or (os.path.isdir(value) and name in FOLDERS and value not in ("tiny", "openai"))
    return os.path.abspath(value) if is_path else value


def _entries(values: Mapping[str, Any]) -> list[str]:
    """`key = value` in TOML; a comment for a value that is not UTF-8, which TOML cannot hold."""
    lines = []
    for name, value in values.items():
        try:
            line = f"{name} = {_toml(value)}"
            line.encode()
        except UnicodeEncodeError:
            shown = str(value).encode("utf-8", "backslashreplace").decode()
            line = f"# {name} = {_toml(shown)} is not UTF-8: give it as --{name.replace('_', '-')}"
        lines.append(line)
    return lines


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)

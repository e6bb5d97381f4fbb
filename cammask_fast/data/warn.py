"""Lines about single images and loaders, each once per process."""

from __future__ import annotations

from cammask_fast.runtime.notices import notice, warn

_said: set[str] = set()


def warn_once(message: str, *, where: str = "", guessed: bool = True) -> None:
    """Print `message` unless this process has.

    Args:
        message: what is said.
        where: such as a file name; put in front, and does not count as another message.
        guessed: something was guessed or replaced: recorded, and an error with `--strict`. Else it is only printed.
    """
    if message not in _said:
        _said.add(message)
        (notice if guessed else warn)(f"{where}{': ' if where else ''}{message}")

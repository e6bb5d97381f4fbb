"""Lines on stderr that are no errors, and the record of them for run.json.

`notice`: something was skipped, ignored, renamed, matched or guessed; an error with `--strict`. `remark`: worth knowing, never
an error. Both are recorded, and said once per command. `warn` and `say` are only printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cammask_fast.runtime.env import rank


class Notices:
    """The notices and remarks of one command, in order. strict: a notice raises ValueError."""

    def __init__(self, *, strict: bool = False):
        self.strict = strict
        self.lines: list[str] = []
        self.warnings: list[str] = []
        """Those of `lines` that are notices."""

    def add(self, message: str, *, is_warning: bool) -> None:
        """Record and print a message, unless the same one was recorded before. Raises ValueError for a notice when strict."""
        message = " ".join(message.split())
        if message in self.lines:
            return
        if is_warning and self.strict:
            raise ValueError(f"{message} (an error because of --strict)")
        self.lines.append(message)
        if is_warning:
            self.warnings.append(message)
        (warn if is_warning else say)(message)


_current: Notices | None = None
"""Of the command that runs; without one, lines are printed and not recorded."""


@contextmanager
def collecting(*, strict: bool = False) -> Iterator[Notices]:
    """Record what is noticed in the block, and nothing from before it."""
    global _current
    before, _current = _current, Notices(strict=strict)
    try:
        yield _current
    finally:
        _current = before


def noticed() -> list[str]:
    """The notices and remarks of this command so far."""
    return [] if _current is None else list(_current.lines)


def notice(message: str) -> None:
    """Record and print that something was skipped, ignored, renamed, matched or guessed. Raises ValueError with `--strict`."""
    if _current is None:
        warn(message)
    else:
        _current.add(message, is_warning=True)


def remark(message: str) -> None:
    """Record and print what is worth knowing and no reason to stop."""
    if _current is None:
        say(message)
    else:
        _current.add(message, is_warning=False)


def warn(message: str) -> None:
    """Print one `cammask: warning: …` line, on the first process of a run only."""
    say(f"warning: {message}")


def say(message: str) -> None:
    """Print one `cammask: …` line on stderr, on the first process of a run only."""
    if rank() == 0:
        print("cammask: " + " ".join(message.split()), file=sys.stderr, flush=True)

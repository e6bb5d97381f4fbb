"""Warnings on stderr, each once per process."""

from __future__ import annotations

import sys

_said: set[str] = set()


def warn_once(message: str, *, where: str = "") -> None:
    """Print `message` unless this process has; `where`, such as a file name, is put in front and does not count."""
    if message not in _said:
        _said.add(message)
        print(f"cammask: warning: {where}{': ' if where else ''}{message}", file=sys.stderr)

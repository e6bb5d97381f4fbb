"""Lines on stderr that are no errors: what was guessed, matched, left out (`notice`), and what was recognised (`say`)."""

from __future__ import annotations

import sys

from cammask_fast.runtime.env import rank


def notice(message: str) -> None:
    """Print one `cammask: warning: …` line, on the first process of a run only."""
    say(f"warning: {message}")


def say(message: str) -> None:
    """Print one `cammask: …` line on stderr, on the first process of a run only."""
    if rank() == 0:
        print("cammask: " + " ".join(message.split()), file=sys.stderr, flush=True)

"""Cases that end in every way a case can end, for the runner's tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.child import Skipped


class OutOfMemoryError(RuntimeError):
    """As PyTorch's is called."""


def well(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"op": "number", "number": number}


def one() -> dict[str, Any]:
    return {"op": "one"}


def wrong() -> Iterator[dict[str, Any]]:
    yield {"op": "number", "number": 0}
    yield {"op": "number", "error": "1 is not 2"}


def raises(text: str) -> Iterator[dict[str, Any]]:
    yield {"op": "before"}
    raise RuntimeError(text)


def out_of_memory() -> None:
    raise OutOfMemoryError("no room")


def skips() -> None:
    raise Skipped("needs a better machine")


def crashes() -> Iterator[dict[str, Any]]:
    yield {"op": "before"}
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def exits() -> None:
    os._exit(7)


def hangs(sign: str) -> Iterator[dict[str, Any]]:
    """With a child of its own, which must not outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(sign).write_text(str(child.pid))
    yield {"op": "before"}
    time.sleep(600)

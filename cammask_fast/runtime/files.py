"""Files that are either whole or not there: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path, *, temporary: str | None = None) -> Iterator[Path]:
    """A temporary path to write to, which takes the name `path` when the block ends and is removed when it raises.

    Args:
        path: the target; its folder must exist.
        temporary: name of the temporary file in the same folder (default: the target's with `.part`). Processes that may write
            the same target at the same time need names of their own.

    Raises:
        OSError: when the file cannot be written or renamed; an earlier file under `path` is then untouched.
    """
    part = path.with_name(temporary or f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically; see `atomic_write`."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")

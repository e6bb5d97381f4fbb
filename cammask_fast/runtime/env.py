"""The one place that reads environment variables: those with which torchrun starts its processes, and where caches lie."""

from __future__ import annotations

import os
from pathlib import Path


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """The rank of this process among all those of a run."""
    return int(os.environ.get("RANK", "0"))


def cache_folder() -> Path | None:
    """Where things are kept that can be made again: CAMMASK_CACHE, else the user's cache folder, None without any.

    An empty CAMMASK_CACHE stands for none.
    """
    own = os.environ.get("CAMMASK_CACHE")
    if own is not None:
        return Path(own) if own else None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # this user has no home
        return None
    return Path(base) / "cammask-fast"

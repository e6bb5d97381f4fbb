"""The one place that reads environment variables: those with which torchrun starts its processes."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """The rank of this process among all those of a run."""
    return int(os.environ.get("RANK", "0"))

"""Which images of a batch DALI refuses: it only says that the batch holds one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cammask_fast.data.loaders.dali_pipeline import Encoded, part

PIPELINES = 3
"""Pipelines that a `Trial` builds at most; on a GPU each has decoders of its own."""


def refused_rows(rows: range, takes: Callable[[range], bool]) -> list[int]:
    """The rows that are not taken, in order, by halving: about 2 log2(n) calls of `takes` for each. Only a row that was asked
    for alone is among them."""
    if not rows or takes(rows):
        return []
    if len(rows) == 1:
        return list(rows)
    half = len(rows) // 2
    return refused_rows(rows[:half], takes) + refused_rows(rows[half:], takes)


class Trial:
    """Asks DALI whether it takes some rows of a batch, with one pipeline.

    DALI calls a pipeline invalid after an error, and yet most go on: after each error a sound image is asked for, and where
    even that fails another pipeline is built, `PIPELINES` at most. After that no row counts as taken, and PIL decodes them.

    build: a pipeline without prefetching around the source of its batches. sound: one row that DALI takes.
    """

    def __init__(self, build: Callable[[Callable[[], Encoded]], Any], batch: Encoded, sound: Encoded) -> None:
        self._build, self._batch, self._sound = build, batch, sound
        self._asked = sound
        self._pipeline: Any = None
        self._left = PIPELINES

    def takes(self, rows: range) -> bool:
        """Whether DALI takes these consecutive rows of the batch."""
        if self._pipeline is None and not self._left:
            return False
        if self._runs(part(self._batch, rows)):
            return True
        if not self._runs(self._sound):
            self._pipeline = None
        return False

    def _runs(self, rows: Encoded) -> bool:
        if self._pipeline is None:
            self._left -= 1
            self._pipeline = self._build(lambda: self._asked)
        self._asked = rows
        try:
            return len(self._pipeline.run()[0]) == len(rows.lengths)
        except RuntimeError:
            return False

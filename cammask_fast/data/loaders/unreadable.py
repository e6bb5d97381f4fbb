"""Samples that cannot be read: counted, listed in a file, and never the end of a run until there are too many. Those of which
something had to be guessed are counted, too."""

from __future__ import annotations

import sys
from pathlib import Path

from cammask_fast.data.warn import warn_once
from cammask_fast.distributed import all_gather_object

DEFAULT_MAX_BAD = 0.01
FEW = 10
"""So many unreadable images never stop a run, however small the data: a share says little there."""


class UnreadableSamples:
    """The unreadable samples of one source.

    where: what the samples belong to, for messages. total: samples of the source. max_share: largest share of unreadable ones
    where they are more than `FEW`; 0: none at all. report: file to which `name<TAB>reason` is added for each, once; created
    with the first. writes: whether this process does so; see `gather`.
    """

    def __init__(self, where: str, total: int, *, max_share: float = DEFAULT_MAX_BAD, report: Path, writes: bool = True):
        if not 0 <= max_share <= 1:
            raise ValueError(f"--max-bad: expected a share in [0, 1], got {max_share}")
        self.where, self.total, self.max_share, self.report = where, total, max_share, report
        self.writes = writes
        self.reasons: dict[str, str] = {}
        self.lost = 0
        """How many of them are not among `total`, such as those behind the cut in a damaged shard."""
        self.guesses: dict[str, set[str]] = {}
        """Names of samples of which something had to be guessed, by what is said of them."""
        self._listed: set[str] | None = None

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        """Count and list a sample; the same one counts once. Raises ValueError when there are too many (more than `max_share`
        and than `FEW`), or none is left that can be read."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        self._write(name, reason)
        allowed = max(self.max_share * self.total, FEW) if self.max_share else 0
        if len(self) - self.lost >= self.total and self.max_share < 1:
            raise ValueError(f"{self.summary()}: none is left; the last is {name} ({reason})")
        if len(self) > allowed:
            raise ValueError(
                f"{self.summary()}, more than --max-bad {self.max_share:g} allows; the last is {name} ({reason}): "
                "remove or replace them"
            )

    def guessed(self, name: str, message: str) -> None:
        """Count what was guessed of a sample; the first of its kind is told at once. Raises ValueError with `--strict`."""
        self.guesses.setdefault(message, set()).add(name)
        warn_once(message, where=name)

    def counted_guesses(self) -> list[str]:
        """A line for everything that was guessed of several samples."""
        return [
            f"{len(names)} of {self.total} images of {self.where}: {message}"
            for message, names in self.guesses.items()
            if len(names) > 1
        ]

    def gather(self) -> None:
        """Learn of the samples of all processes that are unreadable or guessed at; to be called by all of them."""
        for guesses in all_gather_object(self.guesses):
            for message, names in guesses.items():
                self.guesses.setdefault(message, set()).update(names)
        for reasons in all_gather_object(self.reasons):
            for name in reasons.keys() - self.reasons.keys():
                self.reasons[name] = reasons[name]
                self._write(name, reasons[name])

    def summary(self) -> str:
        """One line: how many of the images cannot be read, and where they are listed."""
        share = len(self) / max(1, self.total)
        return f"{len(self)} of {self.total} images of {self.where} ({share:.2%}) cannot be read, listed in {self.report}"

    def _write(self, name: str, reason: str) -> None:
        if not self.writes:
            return
        line = f"{name}\t{reason}".replace("\r", " ").replace("\n", " ")
        try:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            if self._listed is None:  # by this run, before it was interrupted
                lines = self.report.read_text(encoding="utf-8", errors="replace").splitlines() if self.report.exists() else []
                self._listed = set(lines)
            if line in self._listed:
                return
            with self.report.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            self.writes = False
            print(
                f"cammask: warning: cannot list unreadable images in {self.report} ({error.strerror or error})", file=sys.stderr
            )

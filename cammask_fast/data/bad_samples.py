"""Samples that cannot be read: counted, listed in a file, and never the end of a run until there are too many."""

from __future__ import annotations

from pathlib import Path

DEFAULT_MAX_BAD = 0.01


class BadSamples:
    """The unreadable samples of one source.

    where: what the samples belong to, for messages. total: samples of the source. max_share: largest share of unreadable ones.
    report: file to which `name<TAB>reason` is added for each, once; created with the first.
    """

    def __init__(self, where: str, total: int, *, max_share: float = DEFAULT_MAX_BAD, report: Path):
        if not 0 <= max_share <= 1:
            raise ValueError(f"--max-bad: expected a share in [0, 1], got {max_share}")
        self.where, self.total, self.max_share, self.report = where, total, max_share, report
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        """Count and list a sample; the same one counts once. Raises ValueError when more than `max_share` are unreadable."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        self._write(name, reason)
        if len(self) > self.max_share * self.total:
            raise ValueError(
                f"{self.summary()}, more than --max-bad {self.max_share:g} allows; the last is {name} ({reason}): "
                "remove or replace them"
            )

    def summary(self) -> str:
        share = len(self) / max(1, self.total)
        return f"{len(self)} of {self.total} images of {self.where} ({share:.2%}) cannot be read, listed in {self.report}"

    def _write(self, name: str, reason: str) -> None:
        line = f"{name}\t{reason}".replace("\r", " ").replace("\n", " ")
        try:
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with self.report.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise ValueError(
                f"cannot write the list of unreadable images to {self.report}: {error.strerror or error}"
            ) from None

"""Did you mean …?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the known word that is closest whatever its case, or nothing where none is close."""
    spelled = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(word.casefold(), list(spelled), n=1)
    return f"; did you mean {spelled[close[0]]}?" if close else ""

"""The one reader of text files that people write: class lists, class names, prompt templates, lists of shards."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # the first begins with UTF-16's mark: to be looked for first
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(file: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one; line ends become `\\n`.

    Raises ValueError, with what to do, on a file that cannot be read and on other encodings.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file} as text: {error.strerror or error}") from None
    if data.startswith(_UTF32):
        raise ValueError(f"cannot read {file} as text: it is UTF-32; save it as UTF-8")
    encoding = "utf-16" if data.startswith(_UTF16) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, name = data[: error.start].count(b"\n") + 1, encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"cannot read {file} as text: byte {data[error.start]:#04x} in line {line} is not {name}; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"cannot read {file} as text: it holds NUL bytes, as UTF-16 without a byte order mark; save it as UTF-8"
        )
    return re.sub(r"\r\n?", "\n", text)


def read_numbered_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1, spaces at the ends kept. Raises ValueError when
    there are none; see `read_text`."""
    lines = [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty: expected one entry per line")
    return lines


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank; see `read_numbered_lines`."""
    return [line for _, line in read_numbered_lines(file)]


def printable(name: str) -> str:
    """A file's name as text that every encoding of Unicode can hold: bytes that are not UTF-8, and control characters, are
    escaped, as in `caf\\xe9`."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)

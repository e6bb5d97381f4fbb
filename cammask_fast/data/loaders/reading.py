"""Reading the bytes of a sample: what is wrong with the system is waited out, and never taken for a damaged image."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from time import sleep

from cammask_fast.data.types import ImageSource
from cammask_fast.data.warn import warn_once

OF_THE_FILE = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ)
)
"""Errors that say something about one file. All others (EIO, ESTALE, EMFILE, ENOMEM, time-outs) are of the machine, its disk or
its network, whatever file was asked for."""
WAITS = (0.1, 0.5, 2.0, 8.0, 20.0)
"""Seconds between the attempts to read one sample."""


class ReadError(Exception):
    """The system could not read a file that may be sound."""


@dataclass(frozen=True)
class Failed:
    """What a worker returns instead of a batch when the system fails; an exception would arrive with its traceback."""

    message: str


def read_sample(source: ImageSource, index: int) -> bytes:
    """The bytes of a sample. Errors of the system are retried.

    Raises OSError or EOFError when the sample is at fault, ReadError when the system still fails at the last attempt.
    """
    for wait in (*WAITS, None):
        try:
            return source.read(index)
        except OSError as error:
            if error.errno is None or error.errno in OF_THE_FILE:
                raise
            said = f"{error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
            if wait is None:
                raise ReadError(
                    f"cannot read {source.name(index)}: {said} after {len(WAITS) + 1} attempts: {_advice(error.errno)}; "
                    "the image itself is not counted as unreadable"
                ) from None
            warn_once(f"{said} while reading images: trying again", where=source.name(index), guessed=False)
            sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _advice(number: int) -> str:
    if number in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise `ulimit -n` or try fewer --workers"
    if number == errno.ENOMEM:
        return "memory ran out: try fewer --workers"
    return "look at the disk or the network that holds it (dmesg, mount)"

"""SIGTERM and SIGINT while a run trains: the first asks it to save and leave, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

EXIT_CODE = 75
"""Of a run that was stopped before its end and has saved its state (EX_TEMPFAIL: try again)."""


class TrainingPreempted(Exception):  # noqa: N818  (reads as what happened)
    """A run was asked to stop; its state is saved."""


class GracefulShutdown:
    """`requested` becomes true with the first SIGTERM or SIGINT inside the `with`; outside the main thread none is caught."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> GracefulShutdown:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._received) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os.write(2, b"cammask: stopped at once by a second signal\n")
            os._exit(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        os.write(2, f"cammask: {name}: finishing the step and saving; once more to stop at once\n".encode())
        sys.stderr.flush()

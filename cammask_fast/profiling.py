"""Where the time of a training step goes: a trace of a few steps, and the operators that take most of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARM_UP, TRACED = 3, 2, 3
"""Steps that are left alone (compilation, allocation of memory), those in which the profiler warms up, and those it traces."""
TRACE, OPERATORS, ROWS = "trace.json", "operators.txt", 20


class StepProfiler:
    """A torch.profiler over steps `SKIPPED + WARM_UP + 1` to `SKIPPED + WARM_UP + TRACED` of a loop; call it after each step.

    Writes `folder`/trace.json (for chrome://tracing or ui.perfetto.dev) and `folder`/operators.txt, the `ROWS` operators with
    the most time of their own, and prints that table to stderr. On CUDA the time is that of the device. It changes nothing
    that the steps compute.

    Args:
        folder: made when needed; files of an earlier trace are replaced.
        device: type of the device that the steps run on, `cpu` or `cuda`.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--profile: cannot make {folder} ({error.strerror or error}): choose another folder") from None
        self.folder, self.device, self.steps = folder, device, 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        when = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
        self._profile = profile(activities=activities, schedule=when, on_trace_ready=self._write)

    def __enter__(self) -> StepProfiler:
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)
        if self._traced < 1 and kind is None:
            print(f"cammask: warning: --profile: fewer than {SKIPPED + WARM_UP + 1} steps, nothing traced", file=sys.stderr)

    def __call__(self) -> None:
        self.steps += 1
        self._profile.step()

    @property
    def _traced(self) -> int:
        """Whole steps in the trace; a run can end before `TRACED`."""
        return min(self.steps - SKIPPED - WARM_UP, TRACED)

    def _write(self, found: Any) -> None:
        if self._traced < 1:
            return
        found.export_chrome_trace(str(self.folder / TRACE))
        table = operator_table(found.key_averages(), "device" if self.device == "cuda" else "cpu", steps=self._traced)
        (self.folder / OPERATORS).write_text(table + "\n", encoding="utf-8")
        print(f"{table}\ncammask: the trace is in {self.folder / TRACE}", file=sys.stderr)


def operator_table(events: Iterable[Any], clock: str, *, steps: int) -> str:
    """Text table of the `ROWS` operators with the most time of their own, without that of the operators they call.

    Args:
        events: averages of torch.profiler.
        clock: `cpu`, or `device` for the time of the kernels that an operator starts.
        steps: over which the events go.

    Returns:
        The table.
    """
    own = {
        event.key: (getattr(event, f"self_{clock}_time_total") / 1e3 / steps, event.count / steps)
        for event in events
        if event.device_type.name == "CPU" and not event.key.startswith("ProfilerStep")
    }
    total = sum(milliseconds for milliseconds, _ in own.values()) or 1.0
    lines = [f"{clock + ' ms per step':>18}  {'share':>6}  {'calls':>7}  operator"]
    for name, (milliseconds, calls) in sorted(own.items(), key=lambda item: -item[1][0])[:ROWS]:
        lines.append(f"{milliseconds:18.3f}  {milliseconds / total:6.1%}  {calls:7.1f}  {name}")
    return "\n".join(lines)


def profile_steps(step: Callable[[], object], folder: Path, device: str = "cpu") -> None:
    """Run a step as often as a trace needs it, and write the trace.

    Args:
        step: one optimiser step.
        folder: see `StepProfiler`.
        device: see `StepProfiler`.

    Raises:
        ValueError: the folder cannot be made.
    """
    with StepProfiler(folder, device) as profiler:
        for _ in range(SKIPPED + WARM_UP + TRACED):
            step()
            profiler()

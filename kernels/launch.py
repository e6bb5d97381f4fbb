"""A kernel launch as a value: what runs on a GPU, and what ahead-of-time compilation reads without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One launch of a Triton kernel.

    arguments: every parameter of the kernel by name, constexprs included. options: num_warps, num_stages, enable_fp_fusion.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def run(launches: Sequence[Launch]) -> None:
    """Run launches in order on the current stream."""
    for launch in launches:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)

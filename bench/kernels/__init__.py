"""Microbenchmarks of the kernels, and what they need on GPUs that are not here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.records import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--static", action="store_true", help="registers, spills, shared memory, bytes on sm_80, sm_90, sm_100")
    which.add_argument("--cpu", action="store_true", help="seconds of the references and of op-by-op PyTorch")
    text = "with --cpu, instead of op-by-op PyTorch: the kernels of another git commit, in turn with today's, and the ratio"
    parser.add_argument("--base", metavar="REF", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines to this file too")


def main(options: argparse.Namespace) -> int:
    """Compile or measure, then print and write the records."""
    if options.base is not None and not options.cpu:
        raise ValueError("--base: give it with --cpu, nothing is timed without a device")
    found, table = _static() if options.static else _cpu() if options.base is None else _against(options.base)
    show(found, table, as_json=options.json, out=options.out)
    return 0


def _static() -> tuple[list[dict[str, Any]], str]:
    from bench.kernels import prediction, static

    found = static.records()
    return found, f"{static.markdown(found)}\n\n{prediction.markdown()}"


def _cpu() -> tuple[list[dict[str, Any]], str]:
    from bench.kernels import cpu

    found = cpu.records()
    return found, cpu.markdown(found)


def _against(ref: str) -> tuple[list[dict[str, Any]], str]:
    from bench.kernels import base, cpu

    sizes = {"images": cpu.IMAGES, "side": cpu.SIDE, "relevance_images": cpu.RELEVANCE_IMAGES, "heads": cpu.HEADS}
    found = base.records(ref, [base.Case(patches=patches, **sizes) for patches in cpu.PATCHES], repeats=cpu.REPEATS)
    return found, base.markdown(found)

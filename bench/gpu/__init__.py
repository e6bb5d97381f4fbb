"""What runs on a CUDA machine: tests, the whole step, microbenchmarks, loading. Records are flushed line by line."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

PARTS = ("tests", "step", "kernels", "data")
"""In the order of their value to a first session on a GPU."""
ARCHS = ("ViT-B/16", "ViT-B/32", "ViT-L/14")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the records and logs")
    parser.add_argument("--part", choices=PARTS, help="one part, of at most nine minutes (default: all, in this order)")
    parser.add_argument("--arch", choices=ARCHS, nargs="+", default=list(ARCHS), help="models whose shapes are measured")
    parser.add_argument("--first", type=int, default=0, metavar="CASE", help="part kernels: skip the cases before this one")
    parser.add_argument("--seconds", type=float, default=480.0, help="all parts but tests: start no case after so many")


def main(options: argparse.Namespace) -> int:
    """0, or 1 after a failed test or case, or 2 without a GPU."""
    if not torch.cuda.is_available():
        print("bench gpu: no CUDA device here, nothing was measured", file=sys.stderr)
        return 2
    from bench.gpu import data, kernels, step, tests

    options.out.mkdir(parents=True, exist_ok=True)
    codes = []
    for part in [options.part] if options.part else PARTS:
        started = time.monotonic()
        if part == "tests":
            codes.append(tests.run(options.out))
        elif part == "step":
            codes.append(step.run(options.out, archs=options.arch, seconds=options.seconds))
        elif part == "data":
            codes.append(data.run(options.out, archs=options.arch, seconds=options.seconds))
        else:
            codes.append(kernels.run(options.out, archs=options.arch, first=options.first, seconds=options.seconds))
        print(f"part {part}: {'ok' if codes[-1] == 0 else 'failed'} after {time.monotonic() - started:.0f} s", flush=True)
    return max(codes)

"""What runs on a CUDA machine: a smoke test, the whole step, kernels, loader_config, tests. See docs/gpu.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.case import PARTS

PROBE = """
import json, torch
from bench.records import gpu_environment
print(json.dumps([torch.cuda.mem_get_info()[0], gpu_environment()]))
"""
PROBE_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the records and the log; a second call goes on there"
    )
    parser.add_argument("--part", choices=PARTS, help="one part (default: all, in this order)")
    parser.add_argument("--first", type=int, metavar="N", help="the N most valuable cases only")
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything (default: %(default)g)")


def main(options: argparse.Namespace) -> int:
    """0, or 1 after a failed case, or 2 without a GPU. Raises ValueError on options that cannot work."""
    import torch

    if options.seconds <= 0 or (options.first is not None and options.first < 1):
        raise ValueError("expected --seconds above 0 and --first of 1 or more")
    if not torch.cuda.is_available():  # makes no context
        print("bench gpu: no CUDA device here, nothing was measured", file=sys.stderr)
        return 2
    from bench.gpu import runner
    from bench.gpu.cases import PART_SECONDS, all_cases

    cases = [case for case in all_cases() if options.part in (None, case.part)][: options.first]
    options.out.mkdir(parents=True, exist_ok=True)
    free, environment = probe()
    return runner.run(
        cases, options.out.resolve(), seconds=options.seconds, part_seconds=PART_SECONDS, free=free, environment=environment
    )


def probe() -> tuple[int, dict[str, Any]]:
    """Free bytes on the card, and what it is: asked in a process of its own, so that this one holds nothing there. Raises
    ValueError where the card does not answer."""
    words, root = [sys.executable, "-c", PROBE], Path(__file__).parent.parent.parent
    try:
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the CUDA device does not answer within {PROBE_SECONDS:.0f} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"the CUDA device does not answer: {lines[-1]}") from None
    free, environment = json.loads(done.stdout.splitlines()[-1])
    return free, environment

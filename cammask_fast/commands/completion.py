"""`cammask completion`: without PyTorch, as a shell may run it at every start."""

from __future__ import annotations

from typing import Any


def run_completion(args: dict[str, Any]) -> None:
    """Run `cammask completion`: print the script for a shell. Raises ValueError without shtab."""
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs shtab: pip install 'cammask-fast[completion]'") from None
    print(shtab.complete(args["parser"], shell=args["shell"]))

"""`cammask export`: fine-tuned weights in other tools' formats."""

from __future__ import annotations

from pathlib import Path

from cammask_fast.checkpoint.source import find_checkpoint
from cammask_fast.commands.shared import Options
from cammask_fast.export import export


def run_export(args: Options) -> None:
    """Run `cammask export`."""
    run: Path = args["run"]
    folder = args["out"] or Path(f"{run if run.is_dir() else run.with_suffix('')}-{args['to']}")
    written = export(find_checkpoint(run, "RUN"), args["to"], folder, pretrained=args["pretrained"])
    print(f"written to {folder}: {', '.join(path.name for path in written.files)}")
    print(f"read back and compared on random pixels: largest difference {written.difference:.1e}")
    print(written.usage)

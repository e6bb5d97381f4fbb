"""The process of one case: `python -m bench.gpu.child CASE RECORDS OUTCOME`.

Every record that the case yields is a line of the file RECORDS at once, so that what was measured before a crash is kept. How
it ended is written to OUTCOME; a process that dies leaves none. Nothing but the standard library is imported before the case.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.case import Case

OK, FAILED, OUT_OF_MEMORY, SKIPPED = "ok", "failed", "out of memory", "skipped"
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl."""


class Skipped(Exception):  # noqa: N818  (reads as what happened)
    """Raised by a case that cannot run here; says why."""


def missing(modules: Iterable[str]) -> list[str]:
    """Those that are not installed."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of a package that contains it
            return False

    return [name for name in modules if not found(name)]


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line that is on the disk when this returns, after one that was cut by a crash of the machine too."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            cut = file.read() != b"\n"
        else:
            cut = False
        file.write((b"\n" if cut else b"") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run(case: Case, records: Path) -> dict[str, Any]:
    """Run a case here. Returns its result, with the reason where it is not `ok`; a record with `error` makes it `failed`."""
    absent = missing(case.needs)
    if absent:
        return {"result": SKIPPED, "error": f"needs {', '.join(absent)}"}
    module, _, name = case.function.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(**case.arguments)
        wrong = []
        for record in [made] if isinstance(made, Mapping) else made:
            write(records, {**record, "case": case.name})
            wrong += [record["error"]] if "error" in record else []
    except Skipped as reason:
        return {"result": SKIPPED, "error": str(reason)}
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        return {"result": OUT_OF_MEMORY if is_out_of_memory(text) else FAILED, "error": text}
    return {"result": FAILED, "error": f"{len(wrong)} of its records: {wrong[0]}"} if wrong else {"result": OK}


def is_out_of_memory(text: str) -> bool:
    """Of PyTorch's allocator, of CUDA or of a library such as cuBLAS, which names it in its own words."""
    return any(words in text for words in ("OutOfMemoryError", "out of memory", "ALLOC_FAILED"))


def main() -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    case, records, outcome = sys.argv[1:]
    ended = run(Case.from_json(case), Path(records))
    sys.stdout.flush()
    sys.stderr.flush()
    Path(outcome).write_text(json.dumps(ended))
    os._exit(0)  # whatever threads and libraries still hold: the case is over


if __name__ == "__main__":
    from bench.gpu import child  # whose Skipped is the one that cases raise

    child.main()

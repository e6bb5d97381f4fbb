"""`cammask data check`: a report of a data set as a table or JSON, and an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from cammask_fast.commands.shared import Options
from cammask_fast.data.check import check
from cammask_fast.runtime.notices import collecting

PROBLEMS = 1
"""Exit code; 0: none found, 2 (of every error): the data cannot be read."""
CLASSES_SHOWN, IMAGES_SHOWN = 20, 10


def run_check(args: Options) -> int:
    """What is noticed while the data are opened stands in the report, as a problem."""
    workers = args["workers"] if args["workers"] is not None else len(os.sched_getaffinity(0))
    with collecting() as notices, tqdm(unit="img", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = check(args["data"], workers=workers, progress=progress)
    report["notices"] = notices.lines
    report["problems"] += notices.warnings
    if args["strict"]:
        report["problems"] += [f"{kind}: {found['count']}" for kind, found in report["odd"].items()]
    print(json.dumps(report, indent=1) if args["json"] else "\n".join(lines_of(report)))
    return PROBLEMS if report["problems"] else 0


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people; long lists are cut, and say so."""
    splits = report["splits"]
    width = max(len("split"), *map(len, splits))
    yield f"{'split':{width}}  images  classes  unreadable        size  width x height (smallest, median, largest)  path"
    for name, split in splits.items():
        sides = ", ".join(f"{split['pixels'][what][0]:.0f} x {split['pixels'][what][1]:.0f}" for what in split["pixels"])
        numbers = f"{split['images']:6}  {split['classes']:7}  {split['unreadable']:10}  {split['bytes'] / 1e6:7.1f} MB"
        yield f"{name:{width}}  {numbers}  {sides:43}  {split['path']}"
    classes = sorted(report["classes"].items(), key=lambda item: next(iter(item[1].values())))
    width = max(len("class"), *(len(name) for name, _ in classes[:CLASSES_SHOWN]))
    yield ""
    yield f"{'class':{width}}  " + "  ".join(f"{name:>6}" for name in splits) + "  (fewest first)"
    for name, counts in classes[:CLASSES_SHOWN]:
        yield f"{name:{width}}  " + "  ".join(f"{count:6}" for count in counts.values())
    if len(classes) > CLASSES_SHOWN:
        yield f"… and {len(classes) - CLASSES_SHOWN} more classes (--json has all)"
    yield ""
    yield "formats: " + ", ".join(f"{count} {form}" for form, count in report["formats"].items())
    for kind, found in report["odd"].items():
        yield f"  {kind}: {found['count']}, such as {found['examples'][0]}"
    if report["unreadable"]:
        yield ""
        yield "unreadable:"
        yield from (f"  {one['image']}: {one['reason']}" for one in report["unreadable"][:IMAGES_SHOWN])
        if len(report["unreadable"]) > IMAGES_SHOWN:
            yield f"  … and {len(report['unreadable']) - IMAGES_SHOWN} more (--json has all)"
    yield ""
    yield f"problems: {len(report['problems'])}" if report["problems"] else "no problems"
    yield from (f"- {problem}" for problem in report["problems"])

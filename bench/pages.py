"""Write every measured table into the README and docs/: `python -m bench report`.

A section stands between `<!-- name:begin -->` and `<!-- name:end -->` of its page and is made from the committed records alone,
so that running the command twice changes nothing. A test holds that the committed pages are what it writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import audit, defaults, maps, report, scaling
from bench.gpu import tables
from bench.records import ROOT, read
from bench.step import less_work
from cammask_fast.demo.report import accuracy_section, summary

RESULTS = ROOT / "bench/results"


class Section(NamedTuple):
    """name: of the markers. page: relative to the checkout. text: Markdown from the folder of records."""

    name: str
    page: str
    text: Callable[[Path], str]


def records_of(results: Path) -> Sequence[Mapping[str, Any]]:
    """All lines of `results`/*.jsonl, file by file in the order of their names."""
    return tables.with_failures([record for path in sorted(results.glob("*.jsonl")) for record in read(path)])


def demo_of(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / name).read_text())
    return found


def kernels_on_cpu(results: Path) -> str:
    records = records_of(results)
    return f"{report.cpu_section(records)}\n\n{report.static_section(records)}".strip()


SECTIONS = (
    Section("accuracy", "README.md", lambda results: accuracy_section(demo_of(results, "demo.json"))),
    Section("gpu-status", "README.md", lambda results: report.gpu_status(records_of(results))),
    Section("demo", "docs/results.md", lambda results: summary(demo_of(results, "demo.json"))),
    Section("demo-full", "docs/results.md", lambda results: summary(demo_of(results, "demo-full.json"))),
    Section("defaults", "docs/results.md", lambda results: defaults.section(read(results / defaults.RECORDS.name))),
    Section("maps", "docs/maps.md", lambda results: maps.section(records_of(results)) or report.NO_CPU),
    Section("audit", "docs/audit.md", lambda results: audit.section(records_of(results))),
    Section("data", "docs/data.md", lambda results: report.data_section(records_of(results))),
    Section("gpu", "docs/kernels.md", lambda results: report.gpu_section(records_of(results))),
    Section("cpu", "docs/kernels.md", kernels_on_cpu),
    Section("gains", "docs/step.md", lambda results: report.gains_section(records_of(results))),
    Section("less-work", "docs/step.md", lambda results: less_work.section(records_of(results)) or report.NO_CPU),
    Section("step", "docs/step.md", lambda results: report.step_section(records_of(results))),
    Section("runs", "docs/resume-and-scaling.md", lambda results: report.runs_section(records_of(results))),
    Section("model", "docs/resume-and-scaling.md", lambda _: scaling.tables()),
)
"""In the order in which they are written. `model` counts operations with fake tensors; the others only read records."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/ (default: the checkout)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: bench/results)")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="SECTION", help=", ".join(names))


def main(options: argparse.Namespace) -> int:
    chosen = [section for section in SECTIONS if section.name in options.only]
    for page in dict.fromkeys(section.page for section in chosen):
        path = options.root / page
        text = path.read_text(encoding="utf-8")
        for section in (one for one in chosen if one.page == page):
            text = fill(text, section.name, section.text(options.results), page=page)
        path.write_text(text, encoding="utf-8")
        print(f"written to {path}")
    return 0


def fill(text: str, name: str, section: str, *, page: str = "page") -> str:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->`.

    Args:
        text: of the page.
        name: of the section.
        section: its new text.
        page: name for the message.

    Returns:
        The new text of the page.

    Raises:
        ValueError: the page does not have one of each marker, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page}: expected one {begin} and one {end} after it")
    return f"{text.split(begin)[0]}{begin}\n\n{section}\n\n{end}{text.split(end)[1]}"

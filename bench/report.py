"""Tables for the README from the records in bench/results: `python -m bench report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.kernels.cpu import markdown
from bench.records import ROOT, markdown_table, read

NO_GPU = "No GPU figures yet: none has been measured."
NO_CPU = "No CPU figures yet: none has been measured."
Records = Sequence[Mapping[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", help="file with the markers (default: the checkout's)"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench/results", help="folder of *.jsonl (default: the checkout's)"
    )


def main(options: argparse.Namespace) -> int:
    records = [record for path in sorted(options.results.glob("*.jsonl")) for record in read(path)]
    text = options.readme.read_text()
    text = fill(text, "gpu", gpu_section(records))
    text = fill(text, "cpu", f"{cpu_section(records)}\n\n{static_section(records)}".strip())
    options.readme.write_text(text)
    print(f"written to {options.readme}")
    return 0


def fill(text: str, name: str, section: str) -> str:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->`. Raises ValueError without one of each."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README: expected one {begin} and one {end} after it")
    return f"{text.split(begin)[0]}{begin}\n\n{section}\n\n{end}{text.split(end)[1]}"


def gpu_section(records: Records) -> str:
    """A table per GPU: every op at every shape, Triton against both ways to run the reference. The last record of a case
    counts, and is shown as failed if it failed."""
    measured = [r for r in records if "gpu" in r and r.get("provider") in ("triton", "reference", "compiled")]
    sections = []
    for gpu in dict.fromkeys(r["gpu"] for r in measured):
        latest = {(r["op"], r["mode"], r["arch"], r["batch"], r["provider"]): r for r in measured if r["gpu"] == gpu}
        rows = []
        for op, mode, arch, batch in dict.fromkeys(key[:4] for key in latest):
            of_case = [latest.get((op, mode, arch, batch, provider)) for provider in ("triton", "reference", "compiled")]
            name = op if mode == "forward" else f"{op}, {mode}"
            rows.append([name, arch, str(batch), *map(_milliseconds, of_case), _rate(of_case[0])])
        header = ["kernel", "shapes of", "batch", "Triton, ms", "PyTorch, ms", "torch.compile, ms", "Triton's rate"]
        last = [r for r in measured if r["gpu"] == gpu][-1]
        where = f"{gpu}, driver {last['driver']}, torch {last['torch']}, Triton {last['triton']}, commit {last['commit']}"
        rates = [r for r in records if r.get("op") == "device" and r.get("gpu") == gpu]
        if rates:
            copy, product = rates[-1]["copy_gigabytes_per_second"], rates[-1]["bf16_matmul_teraflops"]
            where += f"; its own copy rate {copy:.0f} GB/s and bf16 product {product:.0f} TFLOP/s in the same run"
        sections.append(f"{where}.\n\n{markdown_table(header, rows)}")
    return "\n\n".join(sections) or NO_GPU


def _milliseconds(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "-"
    return "failed" if "error" in record else f"{1e3 * record['seconds_p50']:.3f}"


def _rate(record: Mapping[str, Any] | None) -> str:
    if record is None or "error" in record:
        return "-"
    if "teraflops" in record:
        return f"{record['teraflops']:.1f} TFLOP/s ({record['share_of_matmul']:.0%} of matmul)"
    return f"{record['gigabytes_per_second']:.0f} GB/s ({record['share_of_copy']:.0%} of copy)"


def cpu_section(records: Records) -> str:
    """The last CPU records: the references against op-by-op PyTorch."""
    kept = [dict(r) for r in records if "cpu" in r and "patches" in r]
    latest = list({(r["op"], r["patches"], r["provider"]): r for r in kept}.values())
    if not latest:
        return NO_CPU
    last = latest[-1]
    where = f"{last['cpu']}, {last['threads']} threads, torch {last['torch']}, commit {last['commit']}"
    return f"{where}.\n\n{markdown(latest)}"


def static_section(records: Records) -> str:
    """What the kernels need, by op and architecture, over all configurations of the static table; empty without one."""
    compiled = [r for r in records if "registers" in r and "promises" in r]
    rows = []
    for op, arch in dict.fromkeys((r["op"], r["arch"]) for r in compiled):
        of_op = [r for r in compiled if (r["op"], r["arch"]) == (op, arch)]
        registers, occupancy = [r["registers"] for r in of_op], [r["occupancy"] for r in of_op]
        spilled = max(r["spill_bytes"] + r["stack_bytes"] for r in of_op)
        rows.append(
            [
                op, arch, str(len(of_op)), f"{min(registers)}-{max(registers)}", str(spilled),
                f"{max(r['shared'] for r in of_op) / 1024:.0f}", f"{min(occupancy):.0%}-{max(occupancy):.0%}",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    header = ["kernel", "for", "configurations", "registers", "bytes spilled", "shared, KiB", "occupancy"]
    return f"Compiled with Triton {compiled[-1]['triton']}, not run:\n\n{markdown_table(header, rows)}"

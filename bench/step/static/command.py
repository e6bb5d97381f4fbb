"""`cammask bench step --static`: the record of a generated step, what a card would need for it, and the tables of both."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.kernels.aot import ARCHS
from bench.pages import fill
from bench.records import ROOT, append, read, show, versions
from bench.step.static import Case, unsupported
from bench.step.static.classes import FLAT, KINDS
from bench.step.static.pretended_gpu import in_own_process
from cammask_fast.config import TrainConfig
from cammask_fast.step import build_strategy
from cammask_fast.viz.tables import markdown_table

if TYPE_CHECKING:
    from bench.step.static.generate import Traced

RECORDS, PAGE = ROOT / "bench/results/step-static.jsonl", ROOT / "docs/step-static.md"
LARGEST, AT_PEAK = 15, 12
"""Kernels, and groups of live tensors, that a record names."""


class Card(NamedTuple):
    """Rates that a large bf16 product and a large copy reach."""

    teraflops: float
    terabytes: float


CARDS = {"h100": Card(790, 3.0), "h200": Card(790, 4.3), "a100": Card(249, 1.83)}
"""H100, H200: measured. A100 (80 GB): its data sheet times the shares of theirs that an H200 reached, 80 % and 90 %."""


def card(text: str) -> Card:
    """A known card, or `TFLOP/s,TB/s`. Raises ValueError on anything else."""
    if text.lower() in CARDS:
        return CARDS[text.lower()]
    try:
        rates = Card(*(float(number) for number in text.split(",")))
    except (TypeError, ValueError):
        rates = Card(0, 0)
    if min(rates) <= 0:
        raise ValueError(f"--card: expected {', '.join(CARDS)} or TFLOP/s,TB/s such as 790,4.3, got {text!r}")
    return rates


def predict(record: Mapping[str, Any], rates: Card) -> dict[str, float]:
    """Milliseconds of the products at one rate and of the bytes outside them at the other, one after the other."""
    arithmetic = 1e3 * record["tflop"] / rates.teraflops
    traffic = (record["triton_gb"] + record["custom_gb"] + record["aten_gb"]) / rates.terabytes
    step = arithmetic + traffic
    return {
        "arithmetic_ms": arithmetic,
        "traffic_ms": traffic,
        "step_ms": step,
        "images_per_second": 1e3 * record["batch"] / step,
    }


def count(
    case: Case,
    *,
    archs: Sequence[int] = ARCHS,
    compiled: int | None = None,
    workers: int | None = None,
    trace: Traced | None = None,
) -> dict[str, Any]:
    """The record of a step, counted in this process, which believes in a GPU from then on: see `in_own_process`.

    Args:
        case: the step to generate.
        archs: compute capabilities to compile the kernels for, none for none.
        compiled: how many kernels to compile, those with the most bytes, beside those that update the weights; None for all.
        workers: processes that compile, None for one per core, 1 for this one.
        trace: of the step, where it is at hand.

    Returns:
        The counts by name, as JSON can hold them.
    """
    from bench.step.static.compiled import compile_kernels
    from bench.step.static.generate import generate
    from bench.step.static.replay import replay

    generated = generate(case, trace)
    calls, peak, at_peak, recomputed = replay(generated)
    launched = Counter(call.name for call in calls if call.kind == "triton")
    kernels = sorted(generated.kernels.values(), key=lambda k: -k.bytes * launched[k.name])
    started = time.perf_counter()
    chosen = kernels[:compiled] + [k for k in kernels[len(kernels[:compiled]) :] if k.kind in FLAT]
    built = compile_kernels(chosen, archs, workers=workers) if archs else []
    ptxas = time.perf_counter() - started
    kinds = {
        kind: {
            "launches": sum(launched[k.name] for k in kernels if k.kind == kind),
            "gb": sum(launched[k.name] * k.bytes for k in kernels if k.kind == kind) / 1e9,
        }
        for kind in KINDS
    }
    flat = {k.name for k in kernels if k.kind in FLAT}

    def of(kind: str) -> tuple[int, float]:
        ours = [call for call in calls if call.kind == kind]
        return sum(call.launches for call in ours), sum(call.bytes for call in ours) / 1e9

    triton_launches, triton_gb = of("triton")
    custom_launches, custom_gb = of("ours")
    return {
        "op": "step-static", "arch": case.arch, "mode": case.config.method, "masking": case.config.resolved.masking,
        "batch": case.batch, "layers": case.depth,
        "triton_launches": triton_launches, "triton_kernels": len(kernels), "triton_gb": triton_gb,
        "products": of("product")[0], "attention": of("attention")[0], "custom_ops": sum(c.kind == "ours" for c in calls),
        "custom_launches": custom_launches, "custom_gb": custom_gb, "aten": of("aten")[0], "aten_gb": of("aten")[1],
        "tflop": sum(call.flops for call in calls) / 1e12,
        "peak_gb": peak / 1e9, "at_peak": [[label, size / 1e9] for label, size in at_peak[:AT_PEAK]],
        "square_tensors": generated.square, "recomputed_statistics": recomputed,
        "fp64_optimizer": max((b.fp64 for b in built if b.kernel in flat), default=None),
        "spills": sum(b.stack > 0 for b in built) if built else None,
        "registers": {f"sm_{arch}": max(b.registers for b in built if b.arch == arch) for arch in archs},
        "kinds": kinds,
        "largest": [
            {
                "kind": k.kind, "launches": launched[k.name], "gb": launched[k.name] * k.bytes / 1e9,
                "moves": [str(a) for a in sorted(k.accesses, key=lambda a: -a.bytes) if a.bytes >= 1e6],
                "ops": [name for name, _ in k.ops.most_common(8)],
            }
            for k in kernels[:LARGEST]
        ],
        "seconds": {**generated.seconds, "ptxas": ptxas}, **versions(),
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `--static`, beside the race's --arch, --mode, --masking and --batch."""
    only = "with --static: "
    parser.add_argument("--card", default="h100", help=only + f"{', '.join(CARDS)} or TFLOP/s,TB/s")
    parser.add_argument("--layers", type=int, help=only + "blocks to generate (default: the arch's)")
    parser.add_argument("--sm", type=int, nargs="*", choices=ARCHS, default=ARCHS, help=only + "compile the kernels for these")
    parser.add_argument("--note", default="", help=only + "what changed, for the page's history")
    parser.add_argument("--write", action="store_true", help=only + "append the record and write the tables into docs")


def main(options: argparse.Namespace) -> int:
    """Generate, count, print."""
    rates = card(options.card)
    batch = 256 if options.batch is None else options.batch
    if options.precision not in ("auto", "bf16"):
        raise ValueError(f"--precision: --static generates the bf16 step, got {options.precision}")
    if batch < 2 or (options.layers is not None and options.layers < 2):
        raise ValueError("--batch, --layers: --static needs at least 2 images and 2 blocks")
    config = TrainConfig(method=options.mode, masking=options.masking, precision="bf16")
    if config.resolved.trained == "none":
        raise ValueError(f"--mode: {options.mode} trains nothing, there is no step")
    build_strategy(config)
    if (reason := unsupported()) is not None:
        raise ValueError(reason)
    case = Case(arch=options.arch, config=config, batch=batch, layers=options.layers)
    record = in_own_process(count, case, archs=tuple(options.sm))
    record |= {"card": options.card, **predict(record, rates), "note": options.note}
    if options.write:
        append(RECORDS, record)
        write_page()
    show([record], summary(record), as_json=options.json, out=options.out)
    return 0


def summary(record: Mapping[str, Any]) -> str:
    """One record for the terminal."""
    r = record
    rows = [[KINDS[kind], str(found["launches"]), f"{found['gb']:.2f}"] for kind, found in _by_bytes(r["kinds"])]
    largest = [
        [k["kind"], str(k["launches"]), f"{k['gb']:.2f}", ", ".join(k["moves"]), " ".join(k["ops"])] for k in r["largest"]
    ]
    seconds = ", ".join(f"{stage} {spent:.0f}" for stage, spent in r["seconds"].items())
    registers = ", ".join(f"{arch} {most}" for arch, most in r["registers"].items())
    return "\n".join(
        [
            f"{r['arch']}, {r['layers']} blocks, {r['mode']} {r['masking']}, bf16, batch {r['batch']}, torch {r['torch']}",
            f"launches: {r['triton_launches']} of {r['triton_kernels']} Triton kernels, {r['products']} products, "
            f"{r['attention']} attentions, {r['custom_launches']} by {r['custom_ops']} operators of ours, {r['aten']} of ATen",
            f"bytes: {r['triton_gb']:.1f} GB Triton, {r['custom_gb']:.1f} ours, {r['aten_gb']:.2f} ATen; "
            f"{r['tflop']:.2f} TFLOP; peak of live storage {r['peak_gb']:.2f} GB",
            f"float64 instructions in the optimiser {r['fp64_optimizer']}, spills {r['spills']}, "
            f"most registers {registers or '-'}, tensors of N x A x L x L {r['square_tensors']}",
            f"seconds: {seconds}",
            f"predicted for {r['card']}: arithmetic {r['arithmetic_ms']:.1f} ms + traffic {r['traffic_ms']:.1f} ms = "
            f"{r['step_ms']:.1f} ms, {r['images_per_second']:.0f} images/s",
            "",
            markdown_table(["Triton kernels of", "launches", "GB"], rows),
            "",
            markdown_table(["largest", "launches", "GB", "one launch moves", "operators"], largest),
            "",
            markdown_table(["alive at the peak", "GB"], [[label, f"{size:.2f}"] for label, size in r["at_peak"]]),
        ]
    )


def _by_bytes(kinds: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Mapping[str, float]]]:
    return sorted(((kind, found) for kind, found in kinds.items() if found["launches"]), key=lambda pair: -pair[1]["gb"])


def write_page(page: Path = PAGE, records: Path = RECORDS) -> None:
    """Fill the tables of docs/step-static.md from the records."""
    found = read(records)
    text = fill(page.read_text(), "steps", steps_table(found))
    text = fill(text, "history", history_table(found))
    page.write_text(fill(text, "kinds", kinds_table(found)))


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['arch']}, {record['masking'] if record['masking'] != 'none' else record['mode']}, {record['batch']}"


def steps_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The last record of every step, with what the cards would need."""
    rows = []
    for r in {_name(r): r for r in records}.values():
        times = [predict(r, CARDS[name]) for name in ("h100", "h200", "a100")]
        rows.append(
            [
                _name(r), str(r["triton_launches"]), str(r["products"]), f"{r['attention']} + {r['custom_launches']}",
                f"{r['triton_gb']:.1f} + {r['custom_gb']:.1f}", f"{r['tflop']:.1f}", f"{r['peak_gb']:.2f}",
                *(f"{t['step_ms']:.0f} ({t['images_per_second']:.0f})" for t in times),
            ]
        )  # fmt: skip
    header = ["step, batch", "Triton launches", "products", "attention + our kernels", "GB Triton + ours", "TFLOP", "peak, GB"]
    return markdown_table(header + [f"{name}, predicted ms (images/s)" for name in ("H100", "H200", "A100")], rows)


def history_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Every record of the step that has most of them, with what changed."""
    most, _ = Counter(_name(r) for r in records).most_common(1)[0]
    rows = [
        [
            r["note"] or "-", str(r["triton_launches"] + r["custom_launches"]), f"{r['triton_gb']:.1f} + {r['custom_gb']:.1f}",
            f"{r['peak_gb']:.2f}", f"{r['tflop']:.2f}", _or_dash(r["fp64_optimizer"]), _or_dash(r["spills"]),
            f"{predict(r, CARDS['h100'])['step_ms']:.1f}", r["commit"],
        ]
        for r in records
        if _name(r) == most
    ]  # fmt: skip
    header = ["change", "launches, Triton + ours", "GB, Triton + ours", "peak, GB", "TFLOP", "float64 in AdamW", "spills"]
    return f"{most}:\n\n{markdown_table([*header, 'H100, predicted ms', 'commit'], rows)}"


def _or_dash(found: int | None) -> str:
    """A count of the compiled kernels, `-` where none was compiled."""
    return "-" if found is None else str(found)


def kinds_table(records: Sequence[Mapping[str, Any]]) -> str:
    """First and last record of that step by kind of kernel."""
    most, _ = Counter(_name(r) for r in records).most_common(1)[0]
    first, last = ([r for r in records if _name(r) == most][at] for at in (0, -1))
    rows = []
    found = [kind for kind in KINDS if any(r["kinds"][kind]["launches"] for r in (first, last))]
    for kind in sorted(found, key=lambda kind: -first["kinds"][kind]["gb"]):
        cells = [f"{r['kinds'][kind]['gb']:.1f} ({r['kinds'][kind]['launches']})" for r in (first, last)]
        rows.append([KINDS[kind], *cells])
    return f"{most}:\n\n{markdown_table(['Triton kernels of', 'first, GB (launches)', 'now'], rows)}"

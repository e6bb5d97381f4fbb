"""Tables of the records that only a GPU run makes: checks, the step against its prediction, small batches, attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cammask_fast.viz.tables import markdown_table

Records = Sequence[Mapping[str, Any]]


def with_failures(records: Records) -> list[Mapping[str, Any]]:
    """The records, and for each case that failed one in the form of the measurement that it should have made."""
    made: list[Mapping[str, Any]] = []
    for record in records:
        if record.get("op") != "case":
            made.append(record)
        elif "of" in record and record["result"] not in ("ok", "skipped", "not run"):
            shown = record["result"] if record["result"] != "failed" else record["error"]
            made.append({**{k: v for k, v in record.items() if k not in ("op", "of", "error")}, **record["of"], "error": shown})
    return made


def sections(records: Records) -> list[str]:
    """A section per kind of table and GPU that there are records of."""
    made = []
    for gpu in dict.fromkeys(r["gpu"] for r in records if "gpu" in r):
        of_gpu = [r for r in records if r.get("gpu") == gpu]
        for op, title, table in (
            ("correctness", "Five optimiser steps against float64 on a CPU, relative errors", correctness_table),
            ("step", "Our compiled step against its prediction from counted work and the card's rates", prediction_table),
            ("step-small", "Small batches, with and without CUDA graphs", mode_table),
            ("step-mode", "Modes of torch.compile", mode_table),
            ("attention", "PyTorch's attention by backend, bf16", attention_table),
        ):
            rows = table([r for r in of_gpu if r.get("op") == op])
            if rows:
                last = [r for r in of_gpu if r.get("op") == op][-1]
                made.append(f"{title}, {gpu}, torch {last['torch']}, commit {last['commit']}:\n\n{rows}")
    return made


def _latest(records: Iterable[Mapping[str, Any]], *keys: str) -> list[Mapping[str, Any]]:
    return list({tuple(r[key] for key in keys): r for r in records}.values())


def correctness_table(records: Records) -> str:
    rows = [
        [
            r["mode"], r["precision"], r["provider"], f"{r['loss_error']:.1e}", f"{r['loss_error_on_cpu']:.1e}",
            f"{r['gradient_error']:.1e}", f"{r['gradient_error_on_cpu']:.1e}", "wrong" if "error" in r else "yes",
        ]
        for r in _latest(records, "mode", "precision", "provider")
    ]  # fmt: skip
    header = ["methods", "precision", "step", "losses", "on a CPU", "gradients", "on a CPU", "within the rule"]
    return markdown_table(header, rows) if rows else ""


def prediction_table(records: Records) -> str:
    rows = [
        [
            r["arch"], r["mode"], str(r["batch"]), backends(r), f"{r['images_per_second']:.0f}",
            f"{r['predicted']['images_per_second']:.0f}", f"{r['predicted']['floor_images_per_second']:.0f}",
            f"{r['measured_over_predicted']:.2f}",
        ]
        for r in _latest((r for r in records if "predicted" in r), "arch", "mode", "provider")
    ]  # fmt: skip
    header = ["model", "method", "batch", "attention", "images/s", "predicted", "floor", "seconds over predicted"]
    return markdown_table(header, rows) if rows else ""


def mode_table(records: Records) -> str:
    """A row per model, batch and compile mode."""
    rows = []
    for r in _latest((r for r in records if "compile" in r), "arch", "batch", "compile"):
        measured = [f"{1e3 * r['seconds_p50']:.2f}", f"{1e3 * r['host_seconds']:.2f}", f"{r['images_per_second']:.0f}"]
        rows.append([r["arch"], str(r["batch"]), r["compile"], *measured, backends(r), f"{r['compile_seconds']:.0f}"])
    header = ["model", "batch", "compile mode", "ms per step", "of it Python, ms", "images/s", "attention", "compile, s"]
    return markdown_table(header, rows) if rows else ""


def attention_table(records: Records) -> str:
    rows = [
        [
            str(r["length"]), str(r["queries"]), str(r["batch"]), r["provider"], backends(r),
            *(f"{1e6 * r[f'{way}_seconds']:.0f} ({r[f'{way}_teraflops']:.0f} TFLOP/s)" for way in ("forward", "backward")),
        ]
        for r in _latest((r for r in records if "forward_seconds" in r), "length", "queries", "provider")
    ]  # fmt: skip
    header = ["tokens", "queries", "batch", "asked for", "ran", "forward, µs", "backward, µs"]
    return markdown_table(header, rows) if rows else ""


def backends(record: Mapping[str, Any]) -> str:
    """Attention's in a step, such as `cudnn` or `cudnn and efficient`."""
    return " and ".join(sorted(record.get("attention", {}))) or "-"

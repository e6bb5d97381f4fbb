"""What every kernel needs on sm_80, sm_90 and sm_100, compiled without a GPU: `python -m bench kernels --static`.

One row per kernel, configuration and architecture. Bytes are counted from shapes at batch 512: moved = what the programs of
the launch load and store if no cache helped from one to the next; floor = every input once, every output once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench.kernels.aot import ARCHS, Compiled, compile_launch
from cammask_fast.kernels.cls_relevance import (
    SHARED,
    _cls_relevance_row_fwd_kernel,
    _cls_relevance_statistics_fwd_kernel,
    needs_statistics,
    plan_cls_relevance,
)
from cammask_fast.kernels.counterfactual_batch import plan_counterfactual_batch
from cammask_fast.kernels.launch import Launch
from cammask_fast.kernels.legrad import plan_legrad
from cammask_fast.kernels.masked_fill import plan_masked_fill
from cammask_fast.kernels.normalise import plan_normalise
from cammask_fast.kernels.patch_select import plan_patch_select

RECORDS = Path(__file__).parent.parent / "results" / "static.jsonl"
BATCH = 512
REGISTER_SLACK = 8
"""Registers that a kernel may gain over its record under the same Triton before a test fails."""
ANY_VERSION = {"registers": 255, "shared": 100 * 1024}
"""Budget under a Triton other than the recorded one."""


class Arch(NamedTuple):
    patches: int
    patch_size: int
    heads: int

    @property
    def length(self) -> int:
        return self.patches + 1


MODELS = {
    "one-head": Arch(36, 8, 1),
    "ViT-B/32": Arch(49, 32, 12),
    "ViT-B/16": Arch(196, 16, 12),
    "ViT-L/14": Arch(256, 14, 16),
    "ViT-L/14-336": Arch(576, 14, 16),
}
RELEVANCE_ONLY = ("one-head", "ViT-L/14-336")
"""Shapes that only the relevance and LeGrad are compiled for."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IMAGE = 224


class Case(NamedTuple):
    """One configuration. promises: `matrix` (matrix units), `wide` (16-byte loads and stores), or nothing beyond no spills."""

    op: str
    configuration: str
    launch: int
    """Position in the op's plan."""
    promises: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.configuration} {self.launch}"


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def plan(op: str, configuration: str) -> list[Launch]:
    """The launches of an op for a configuration such as `ViT-B/16 bf16 threshold nearest single nchw`."""
    model, *options = configuration.split()
    arch = MODELS[model]
    dtype = next((DTYPES[o] for o in options if o in DTYPES), torch.float32)
    if op == "cls_relevance":
        width = 32 if "d32" in options else 64
        packed = meta(BATCH, arch.length, 3 * arch.heads * width, dtype=dtype)
        q, k, v = (part.unflatten(-1, (arch.heads, width)).transpose(1, 2) for part in packed.chunk(3, -1))
        grad_out = meta(BATCH, arch.length, arch.heads, width, dtype=dtype).transpose(1, 2)
        rows = slice(0, 1 if "last" in options else arch.length)
        q, grad_out = q[:, :, rows], grad_out[:, :, rows]
        relevance, added = meta(BATCH, arch.length), meta(BATCH, arch.heads, arch.length)
        lse = meta(*q.shape[:3]) if "lse" in options else None
        shared = 0 if "tiles" in options else SHARED
        scratch = meta(2, *k.shape[:3]) if needs_statistics(q, k, lse, shared) else None
        above = None if "last" in options else added
        return plan_cls_relevance(relevance, added, scratch, relevance, above, q, k, v, grad_out, lse, shared=shared)
    if op == "legrad":
        width = 32 if "d32" in options else 64
        v = meta(BATCH, arch.length, 3 * arch.heads * width, dtype=dtype).chunk(3, -1)[2]
        v = v.unflatten(-1, (arch.heads, width)).transpose(1, 2)
        grad_out = meta(BATCH, arch.length, arch.heads, width, dtype=dtype).transpose(1, 2)
        total = meta(*v.shape[:3])
        return plan_legrad(
            total, None if "first" in options else total, v, grad_out[:, :, :1] if "last" in options else grad_out
        )
    relevance = meta(BATCH, arch.patches)
    top_k = _top_k(options, arch.patches)
    if op == "patch_select":
        context = "context" in options
        columns = 0 if top_k is None else (top_k if context else arch.patches - top_k) + 1
        mask, counts = meta(BATCH, arch.patches, dtype=torch.bool), meta(BATCH, dtype=torch.int64)
        kept = meta(BATCH, columns, dtype=torch.int64)
        threshold = 0.3 if top_k is None else None
        selector = meta(BATCH, arch.patches)
        return plan_patch_select(relevance, mask, counts, kept, selector, threshold=threshold, top_k=top_k, context=context)
    images = meta(BATCH, 3, IMAGE, IMAGE) if "float" in options else meta(BATCH, IMAGE, IMAGE, 3, dtype=torch.uint8)
    layout = "patches" if "patches" in options else "nchw"
    shape = (BATCH, arch.patches, 3 * arch.patch_size**2) if layout == "patches" else (BATCH, 3, IMAGE, IMAGE)
    out = meta(*shape, dtype=dtype)
    if op == "normalise":
        return plan_normalise(out, images, layout=layout, patch_size=arch.patch_size if layout == "patches" else None)
    donors = None
    if "constant" not in options:
        donors = meta(BATCH, arch.patches, dtype=torch.int64) if "multi" in options else meta(BATCH, dtype=torch.int64)
    if op == "masked_fill":
        return plan_masked_fill(out, images, meta(BATCH, arch.patches, dtype=torch.bool), donors, layout=layout)
    return plan_counterfactual_batch(
        out,
        images,
        relevance,
        donors,
        threshold=None if top_k is not None else 0.3,
        top_k=top_k,
        upsample="bilinear" if "bilinear" in options else "nearest",
        layout=layout,
    )


def _top_k(options: Sequence[str], patches: int) -> int | None:
    counts = {"top-k": patches // 2, "top-1": 1, "top-all": patches}
    return next((counts[option] for option in options if option in counts), None)


def cases() -> list[Case]:
    """The checked table. `context` is an argument of counterfactual_batch that is never made a constant: a row of it serves
    object and context masks, as its record says. patch_select is compiled for each."""
    found = []
    for model, arch in MODELS.items():
        if model in RELEVANCE_ONLY:
            continue
        wide = "wide" if arch.patch_size % 16 == 0 else ""
        for dtype in DTYPES:
            names = ("layer",) if dtype == "fp16" else ("layer", "lse layer", "last")
            found += [case for name in names for case in _relevance(model, dtype, name)]
            found += [_legrad(f"{model} {dtype} layer")]
            found += [Case("normalise", f"{model} {dtype} {layout}", 0, wide) for layout in ("nchw", "patches")]
            found += [Case("masked_fill", f"{model} {dtype} single patches", 0, wide)]
            found += [
                Case(
                    "counterfactual_batch", f"{model} {dtype} {select} single {layout}", 0, "" if "bilinear" in select else wide
                )
                for select in ("threshold nearest", "top-k nearest", "threshold bilinear")
                for layout in ("nchw", "patches")
            ]
            if dtype != "fp16":
                found += [Case("counterfactual_batch", f"{model} {dtype} top-k bilinear single patches", 0, "")]
            found += [Case("counterfactual_batch", f"{model} {dtype} threshold nearest multi patches", 0, wide)]
        found += [Case("counterfactual_batch", f"{model} bf16 threshold nearest constant patches", 0, wide)]
        found += [Case("counterfactual_batch", f"{model} bf16 threshold nearest float single patches", 0, "")]
        found += [
            Case("patch_select", f"{model} {select}{masked}", 0, "")
            for select in ("threshold", "top-k", "top-1", "top-all")
            for masked in ("", " context")
        ]
    found += _relevance("ViT-B/16", "fp32", "d32 layer")
    for name in ("d32 layer", "d32 lse layer", "lse last", "tiles layer", "tiles lse layer"):  # tiles: little shared memory
        found += _relevance("ViT-B/16", "bf16", name)
    for name in ("layer", "lse layer"):
        found += _relevance("ViT-L/14-336", "bf16", name)
    for configuration in ("bf16 layer", "fp32 layer", "fp32 last"):  # Triton makes a constant of a single head
        found += _relevance("one-head", *configuration.split())
    for configuration in ("ViT-B/16 bf16 first layer", "ViT-B/16 bf16 last", "ViT-B/16 fp32 last", "ViT-B/16 bf16 d32 layer",
                          "ViT-B/16 fp32 d32 layer", "ViT-L/14-336 bf16 layer", "one-head bf16 layer"):  # fmt: skip
        found.append(_legrad(configuration))
    return found


def _legrad(configuration: str) -> Case:
    return Case("legrad", configuration, 0, "" if "fp32" in configuration or "last" in configuration else "matrix")


def _relevance(model: str, dtype: str, name: str) -> list[Case]:
    """The launches of one layer."""
    dots = "" if dtype == "fp32" or "last" in name else "matrix"
    configuration = f"{model} {dtype} {name}"
    return [Case("cls_relevance", configuration, at, dots) for at in range(len(plan("cls_relevance", configuration)))]


def bytes_moved(case: Case) -> tuple[int, int]:
    """(moved, floor) of one launch at batch 512."""
    model, *options = case.configuration.split()
    arch = MODELS[model]
    item = next((DTYPES[o].itemsize for o in options if o in DTYPES), 4)
    pixels = BATCH * 3 * IMAGE * IMAGE
    if case.op == "patch_select":
        floor = BATCH * (arch.patches * (4 + 4 + 1) + 8)
        top_k = _top_k(options, arch.patches)
        if top_k is not None:
            floor += BATCH * 8 * ((top_k if "context" in options else arch.patches - top_k) + 1)
        chunks = 1 if top_k is None else 2
        return floor + BATCH * arch.patches * 4 * chunks, floor
    if case.op in ("normalise", "masked_fill", "counterfactual_batch"):
        floor = pixels * ((4 if "float" in options else 1) + item)
        if "top-k" in options and "bilinear" in options:  # four patches' relevance per pixel, in every step of the bisection
            return floor + 35 * BATCH * IMAGE * IMAGE * 4 * 4, floor
        return floor, floor  # each pixel is loaded once; maps, masks and donors are a thousandth of it
    launch = plan(case.op, case.configuration)[case.launch]
    return legrad_bytes(launch) if case.op == "legrad" else relevance_bytes(launch)


def legrad_bytes(launch: Launch) -> tuple[int, int]:
    """(moved, floor) of one launch of LeGrad's sum: every program reads all rows of the gradient."""
    v, grad = launch.arguments["v_ptr"], launch.arguments["grad_out_ptr"]
    count, heads, length, _ = v.shape
    sums = (2 if launch.arguments["HAS_TOTAL"] else 1) * count * heads * length * 4
    tiles = launch.grid[0] // (count * heads)
    return v.nbytes + tiles * grad.nbytes + sums, v.nbytes + grad.nbytes + sums


def relevance_bytes(launch: Launch) -> tuple[int, int]:
    """(moved, floor) of one launch of the relevance."""
    given = launch.arguments
    k = given["k_ptr"]
    programs = launch.grid[0]
    count, heads, length, _ = k.shape
    matrix, row, r = k.numel() * k.itemsize, count * heads * length * 4, count * length * 4
    if launch.kernel is _cls_relevance_statistics_fwd_kernel:
        return matrix + programs // (count * heads) * matrix + 2 * row, 2 * matrix + 2 * row
    above = row if given["HAS_ADDED"] else 0
    if launch.kernel is _cls_relevance_row_fwd_kernel:
        again = 0 if given["HAS_LSE"] else matrix
        return 2 * matrix + again + above + row + 2 * r, 2 * matrix + above + row + 2 * r
    tiles = programs // (count * heads)
    statistics = {"lse": row, "scratch": 2 * row, "inside": 0}[given["STATISTICS"]]
    of_every_program = heads * tiles * (above + r)  # each averages the heads of the layer above
    moved = 2 * matrix + tiles * (2 * matrix + statistics) + of_every_program + row + r
    return moved, 4 * matrix + statistics + above + row + 2 * r


def _measure(job: tuple[Case, int]) -> Compiled:
    case, arch = job
    return compile_launch(plan(case.op, case.configuration)[case.launch], arch)


def measure(jobs: Sequence[tuple[Case, int]], *, workers: int | None = None) -> list[Compiled]:
    """Compile cases for architectures in worker processes."""
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_measure, jobs, chunksize=4))


def masks(case: Case) -> str:
    """The masks that the compiled code of a case makes; empty for a kernel that selects nothing."""
    if case.op == "patch_select":
        return "context" if "context" in case.configuration.split() else "object"
    return "object and context" if case.op == "counterfactual_batch" else ""


def records(*, workers: int | None = None) -> list[dict[str, Any]]:
    """The whole table, a record per case and architecture."""
    jobs = [(case, arch) for case in cases() for arch in ARCHS]
    table = []
    for (case, arch), built in zip(jobs, measure(jobs, workers=workers), strict=True):
        moved, floor = bytes_moved(case)
        table.append(
            {
                "op": case.op, "configuration": case.configuration, "launch": case.launch, "arch": f"sm_{arch}",
                "masks": masks(case), "promises": case.promises, **{k: v for k, v in built._asdict().items() if k != "seconds"},
                "blocks_per_sm": built.blocks_per_sm(arch), "occupancy": round(built.occupancy(arch), 3),
                "bytes_moved": moved, "bytes_floor": floor, "batch": BATCH, "triton": triton.__version__,
            }
        )  # fmt: skip
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = [
        "| kernel | configuration | arch | registers | spills | stack | shared, B | occupancy | matrix | 16 B loads "
        "| 16 B stores | moved / floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['op']} | {r['configuration']} | {r['arch']} | {r['registers']} | {r['spill_bytes']} | {r['stack_bytes']} "
        f"| {r['shared']} | {r['occupancy']:.0%} | {r['matrix']} | {r['wide_loads']}/{r['loads']} "
        f"| {r['wide_stores']}/{r['stores']} | {r['bytes_moved'] / r['bytes_floor']:.2f} |"
        for r in table
    ]
    return "\n".join(lines)


def recorded() -> dict[tuple[str, str], dict[str, Any]]:
    """The committed table by (case name, arch)."""
    lines = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    return {(f"{r['op']} {r['configuration']} {r['launch']}", r["arch"]): r for r in lines}

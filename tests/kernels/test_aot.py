"""Guards of the kernels on a machine without a GPU: every case of the table compiled for sm_80, sm_90 and sm_100."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from bench.kernels import static
from bench.kernels.aot import ARCHS, Compiled, compile_launch
from bench.kernels.static import ANY_VERSION, REGISTER_SLACK, Case, cases, markdown, recorded
from cammask_fast.kernels.backend import INTERPRETED
from cammask_fast.kernels.launch import Launch

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is on in this process; it cannot compile")
NAMES = sorted(f"{case.name} sm_{arch}" for case in cases() for arch in ARCHS)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, Any]]:
    """The table of this machine's Triton, compiled once."""
    return {f"{r['op']} {r['configuration']} {r['launch']} {r['arch']}": r for r in static.records()}


def broken_promises(record: dict[str, Any]) -> list[str]:
    """What a kernel must not do, in any version of Triton."""
    broken = [name for name in ("spill_bytes", "stack_bytes") if record[name]]
    if "matrix" in record["promises"] and not record["matrix"]:
        broken.append("no matrix units")
    if "wide" in record["promises"] and not (record["wide_loads"] >= 3 and record["wide_stores"] >= 3):
        broken.append("pixels are not moved 16 bytes at a time")
    return broken


def over_budget(record: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Registers and shared memory beyond the committed record (same Triton), or beyond any sensible budget (another one)."""
    if record["triton"] == known["triton"]:
        most = {"registers": known["registers"] + REGISTER_SLACK, "shared": known["shared"]}
    else:
        most = ANY_VERSION
    return [f"{name} {record[name]} > {limit}" for name, limit in most.items() if record[name] > limit]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_spills_matrix_units_wide_accesses_and_budget(table: dict[str, dict[str, Any]], name: str) -> None:
    record = table[name]
    assert broken_promises(record) == []
    assert over_budget(record, recorded()[name.rpartition(" ")[0], record["arch"]]) == []


@pytest.mark.slow
def test_the_committed_table_is_of_these_cases(table: dict[str, dict[str, Any]]) -> None:
    committed = recorded()
    assert {f"{name} {arch}" for name, arch in committed} == set(table)
    for name, record in table.items():
        known = committed[name.rpartition(" ")[0], record["arch"]]
        assert {k: known[k] for k in ("bytes_moved", "bytes_floor", "promises")} == {
            k: record[k] for k in ("bytes_moved", "bytes_floor", "promises")
        }, name
        assert record["bytes_moved"] >= record["bytes_floor"] > 0
        assert 0 < record["occupancy"] <= 1


def test_the_table_has_every_model_dtype_selection_and_upsampling() -> None:
    fused = {case.configuration for case in cases() if case.op == "counterfactual_batch"}
    for model in ("ViT-B/32", "ViT-B/16", "ViT-L/14"):
        for dtype in ("bf16", "fp16", "fp32"):
            for select in ("threshold nearest", "top-k nearest", "threshold bilinear"):
                assert f"{model} {dtype} {select} single patches" in fused
            assert f"{model} {dtype} layer" in {case.configuration for case in cases() if case.op == "cls_relevance"}


@triton.jit
def _spilling_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    offsets = rows[:, None] * BLOCK + rows[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x * tl.sum(x))


@triton.jit
def _narrow_kernel(out_ptr, x_ptr, step, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(out_ptr + rows * step, tl.load(x_ptr + rows * step))


def toy(kernel: Any, block: int, *, maxnreg: int | None = None, **arguments: int) -> Compiled:
    x = torch.empty(block * block, device="meta")
    options = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": maxnreg}
    return compile_launch(Launch(kernel, (1,), {"out_ptr": x, "x_ptr": x, "BLOCK": block, **arguments}, options), 90)


def test_a_kernel_that_spills_is_caught() -> None:
    record = toy(_spilling_kernel, 64, maxnreg=24)._asdict() | {"promises": ""}
    assert broken_promises(record)


def test_a_kernel_without_wide_accesses_or_matrix_units_is_caught() -> None:
    narrow = toy(_narrow_kernel, 64, step=3)
    assert (narrow.wide_loads, narrow.wide_stores) == (0, 0)
    assert narrow.loads > 0
    assert broken_promises(narrow._asdict() | {"promises": "wide matrix"}) == [
        "no matrix units",
        "pixels are not moved 16 bytes at a time",
    ]


def test_a_kernel_over_its_budget_is_caught() -> None:
    known = {"registers": 40, "shared": 0, "triton": triton.__version__}
    assert over_budget(known | {"registers": 48}, known) == []
    assert over_budget(known | {"registers": 49, "shared": 1}, known) == ["registers 49 > 48", "shared 1 > 0"]
    other = known | {"triton": "0.0"}
    assert over_budget(known | {"registers": 255}, other) == []
    assert over_budget(known | {"registers": 256}, other) == ["registers 256 > 255"]


@pytest.mark.slow
def test_the_table_prints(table: dict[str, dict[str, Any]]) -> None:
    text = markdown([table[NAMES[0]]])
    assert text.count("\n") == 2
    assert json.loads(json.dumps(table[NAMES[0]])) == table[NAMES[0]]
    assert Case("op", "ViT-B/16 bf16", 0, "").name == "op ViT-B/16 bf16 0"

"""The generated CUDA code of the step stays within its budget, and the count notices what makes it worse."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.__main__ import main
from bench.records import read
from bench.step.static import Case, unsupported
from bench.step.static.classes import KINDS, Access, classify
from bench.step.static.command import (
    CARDS,
    PAGE,
    RECORDS,
    Card,
    card,
    count,
    history_table,
    kinds_table,
    predict,
    summary,
    write_page,
)
from bench.step.static.generate import square_tensors, traced
from bench.step.static.pretended_gpu import in_own_process
from cammask_fast.config import TrainConfig
from cammask_fast.optim import FlatAdamW

NEEDS_INDUCTOR = pytest.mark.skipif(unsupported() is not None, reason=unsupported() or "")
LAYERS = 2
"""A first and a last block: what lies between them costs what the first does."""
CASES = {
    "ViT-B/16": Case(arch="ViT-B/16", config=TrainConfig(method="masked-object"), layers=LAYERS),
    "ViT-B/32": Case(arch="ViT-B/32", config=TrainConfig(method="ft"), layers=LAYERS),
}
PLAIN = "ViT-B/32"
"""The case that is also counted under every mutant: a single pass is generated in seconds."""
BUDGETS = {
    "ViT-B/16": {"launches": 140, "gb": 14.82, "peak_gb": 2.38},
    "ViT-B/32": {"launches": 77, "gb": 2.21, "peak_gb": 0.91},
}
"""At 256 images: launches and bytes of all Triton kernels, Inductor's and ours, and the peak of live storage. Four of the
launches (three without a mask) sum what a run logs of a step: scalars and an (N, P) map."""
COMPILED = 6
"""Kernels given to ptxas, those with the most bytes, beside the optimiser's."""


def over_budget(record: dict[str, Any], budget: dict[str, float]) -> list[str]:
    """What a step must not do, and what exceeds its budget."""
    found = {
        "launches": record["triton_launches"] + record["custom_launches"],
        "gb": record["triton_gb"] + record["custom_gb"],
        "peak_gb": record["peak_gb"],
    }
    never = {key: record[key] for key in ("square_tensors", "spills", "fp64_optimizer") if record[key]}
    return [f"{key} {found[key]:.2f} > {most}" for key, most in budget.items() if found[key] > most] + list(never)


def materialised(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    assert attn_mask is None
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def cast_one_by_one(self: FlatAdamW, flat: Tensor) -> dict[str, Tensor]:
    """FlatAdamW.parts whose cast weights are casts of the parts."""
    parts = flat.split([shape.numel() for shape in self.shapes])
    masters = self.flat.split([shape.numel() for shape in self.shapes])
    if flat.dtype == torch.bfloat16:
        parts = tuple(master.to(torch.bfloat16) for master in masters)
    return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


MUTANTS: dict[str, tuple[object, str, object]] = {
    "equal nodes not merged": ("bench.step.static.generate", "inductor_options", lambda mode: {}),
    "weights cast a second time": (FlatAdamW, "parts", cast_one_by_one),
    "sums written late": ("cammask_fast.inductor_options", "WriteSumsOnce", lambda: lambda graph: None),
    "bias gradients read again": ("cammask_fast.inductor_options", "SumColumnsInStages", lambda: lambda graph: None),
}


def count_all() -> dict[str, dict[str, Any]]:
    """Records of the cases, and of one of them under every mutant; in one process, which warms Inductor up once."""
    records = {name: count(case, archs=(90,), compiled=COMPILED, workers=1) for name, case in CASES.items()}
    with patch.object(F, "scaled_dot_product_attention", materialised):
        records["attention materialised"] = {"square_tensors": square_tensors(traced(CASES[PLAIN]).graph, CASES[PLAIN])}
    for name, (owner, attribute, mutant) in MUTANTS.items():
        with patch.object(import_module(owner) if isinstance(owner, str) else owner, attribute, mutant):
            records[name] = count(CASES[PLAIN], archs=(), workers=1)
    return records


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    return in_own_process(count_all)


@pytest.mark.slow
@NEEDS_INDUCTOR
@pytest.mark.parametrize("name", CASES)
def test_bytes_launches_and_peak_stay_within_the_budget(records: dict[str, dict[str, Any]], name: str) -> None:
    assert over_budget(records[name], BUDGETS[name]) == []


@pytest.mark.slow
@NEEDS_INDUCTOR
@pytest.mark.parametrize("name", MUTANTS)
def test_a_worse_step_is_over_its_budget(records: dict[str, dict[str, Any]], name: str) -> None:
    assert over_budget(records[name], BUDGETS[PLAIN]) != []


@pytest.mark.slow
@NEEDS_INDUCTOR
def test_materialised_attention_is_seen(records: dict[str, dict[str, Any]]) -> None:
    """In the graph; Inductor may fuse it again where it knows the pattern."""
    worse = records[PLAIN] | records["attention materialised"]
    assert over_budget(worse, BUDGETS[PLAIN]) == ["square_tensors"]


@pytest.mark.slow
@NEEDS_INDUCTOR
def test_the_record_adds_up(records: dict[str, dict[str, Any]]) -> None:
    for name in (*CASES, *MUTANTS):
        record = records[name]
        assert json.loads(json.dumps(record)) == record, name
        assert sum(kind["launches"] for kind in record["kinds"].values()) == record["triton_launches"]
        assert sum(kind["gb"] for kind in record["kinds"].values()) == pytest.approx(record["triton_gb"])
        assert record["peak_gb"] > sum(size for _, size in record["at_peak"]) * 0.999
        assert record["largest"] == sorted(record["largest"], key=lambda kernel: -kernel["gb"])
        assert len(record["largest"]) == 15
        assert record["kinds"]["optimiser"]["launches"] == 1
    record = records["ViT-B/16"]
    assert record["registers"]["sm_90"] > 32
    assert "layer norm forward" in summary({**record, "card": "h100", "note": "", **predict(record, CARDS["h100"])})


def touched(*parts: tuple[str, int, torch.dtype], whole: int | None = None) -> list[Access]:
    return [Access(sign == "+", elements, whole or elements, dtype) for sign, elements, dtype in parts]


BF16, FP32 = torch.bfloat16, torch.float32
KERNELS: dict[str, tuple[list[Access], set[str], set[str]]] = {
    "optimiser": (touched(("-", 1000, FP32), ("+", 1000, FP32)), {"mul", "sqrt"}, set()),
    "weight cast": (touched(("-", 1000, FP32), ("+", 1000, BF16)), set(), set()),
    "gradient norm": (touched(("-", 1000, FP32), ("+", 1, FP32)), {"abs"}, {"sum"}),
    "gradients": (touched(("-", 90, BF16)) + touched(("+", 90, FP32), whole=1000), {"add"}, set()),
    "norm forward": (touched(("-", 512, BF16), ("+", 512, BF16)), {"rsqrt", "var_mean"}, {"var_mean"}),
    "norm backward": (touched(("-", 512, BF16), ("+", 512, BF16)), {"rsqrt", "sum"}, {"sum"}),
    "column sums": (touched(("-", 512, BF16), ("+", 8, FP32)), {"sum", "sigmoid"}, {"sum"}),
    "activation backward": (touched(("-", 512, BF16), ("+", 512, BF16)), {"sigmoid", "mul"}, set()),
    "activation forward": (touched(("-", 512, BF16), ("+", 512, BF16)), {"exp", "neg"}, set()),
    "packing": (touched(("-", 512, BF16), ("+", 512, BF16)), {"cat"}, set()),
    "other": (touched(("-", 512, BF16), ("+", 512, BF16)), {"add"}, set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_of_its_kind(kind: str) -> None:
    assert classify(*KERNELS[kind], parameters=1000) == kind


def test_a_prediction_is_arithmetic_then_traffic() -> None:
    record = {"tflop": 79.0, "triton_gb": 20.0, "custom_gb": 9.0, "aten_gb": 1.0, "batch": 220}
    found = predict(record, Card(790, 3.0))
    assert (found["arithmetic_ms"], found["traffic_ms"]) == pytest.approx((100, 10))
    assert (found["step_ms"], found["images_per_second"]) == pytest.approx((110, 2000))


def test_cards_by_name_or_by_rates() -> None:
    assert card("H200") == CARDS["h200"]
    assert card("700,3.5") == Card(700, 3.5)


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        (["--card", "h900"], "h100, h200, a100 or TFLOP/s,TB/s"),
        (["--card", "700,-1"], "TFLOP/s,TB/s"),
        (["--batch", "1"], "at least 2 images"),
        (["--layers", "1"], "2 blocks"),
        (["--mode", "zeroshot"], "trains nothing"),
        (["--precision", "fp32"], "bf16"),
        (["--sm", "42"], "42"),
        (["--masking", "Magic(3)"], "Magic"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--static", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert wrong in error


def test_another_torch_is_refused_with_what_it_needs() -> None:
    assert unsupported("2.14.3+cpu") is None
    assert "torch 2.14" in (unsupported("2.13.0") or "")
    assert "torch 2.14" in (unsupported("2.15.0a0") or "")


def test_the_page_is_that_of_the_records(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shutil.copy(PAGE, page)
    write_page(page)
    assert page.read_text() == PAGE.read_text()
    assert "predicted from generated code" in page.read_text()
    assert {"triton_launches", "triton_gb", "peak_gb", "fp64_optimizer", "spills", "square_tensors", "tflop", "torch"} <= set(
        read(RECORDS)[-1]
    )


def test_tables_show_new_kinds_and_uncompiled_steps() -> None:
    first = read(RECORDS)[0]
    none = {kind: {"launches": 0, "gb": 0.0} for kind in KINDS}
    last = first | {"kinds": none | {"gradients": {"launches": 1, "gb": 0.5}}, "fp64_optimizer": None, "spills": None}
    kinds = " ".join(kinds_table([first, last]).split())
    assert f"| {KINDS['gradients']} | 0.0 (0) | 0.5 (1) |" in kinds
    assert f"| {KINDS['optimiser']} | 2.4 (1) | 0.0 (0) |" in kinds
    assert "| - | - |" in " ".join(history_table([first, last]).split()).splitlines()[-1]

"""The generated CUDA code of the step stays within its budget, and the count notices what makes it worse."""

from __future__ import annotations

import gc
import json
import operator
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

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
from bench.step.static.generate import Generated, Traced, square_tensors, traced
from bench.step.static.pretended_gpu import in_own_process
from bench.step.static.replay import replay
from cammask_fast import inductor_options
from cammask_fast.config import TrainConfig
from cammask_fast.model.vit import VisionTransformer

prims = torch.ops.prims
NEEDS_INDUCTOR = pytest.mark.skipif(unsupported() is not None, reason=unsupported() or "")
LAYERS = 2
"""A first and a last block: what lies between them costs what the first does."""
CASES = {
    "ViT-B/16": Case(arch="ViT-B/16", config=TrainConfig(method="masked-object"), layers=LAYERS),
    "ViT-B/32": Case(arch="ViT-B/32", config=TrainConfig(method="ft"), layers=LAYERS),
}
PLAIN = "ViT-B/32"
"""The case that is also counted under every mutant: a single pass is generated in seconds."""
SLACK = 1.02
"""Of bytes: another patch release of PyTorch may move a few."""
BUDGETS: dict[str, dict[str, float]] = {
    "ViT-B/16": {"launches": 120, "gb": SLACK * 14.67, "peak_gb": SLACK * 2.38},
    "ViT-B/32": {
        "launches": 75, "gb": SLACK * 2.22, "peak_gb": SLACK * 0.914,
        "norm forward": SLACK * 0.259, "norm backward": SLACK * 0.341, "activation forward": SLACK * 0.162,
        "activation backward": SLACK * 0.247, "column sums": SLACK * 0.079, "packing": SLACK * 0.208,
        "optimiser": SLACK * 0.49, "weight cast": SLACK * 0.105, "other": SLACK * 0.142,
    },
}  # fmt: skip
"""At 256 images: launches and bytes of all Triton kernels, Inductor's and ours, the peak of live storage, and gigabytes of
Inductor's kernels by kind. Four of the launches (three without a mask) sum what a run logs of a step: scalars and an (N, P)
map."""
BARS = {"launches": 500, "gb": 125.0, "peak_gb": 17.0}
"""Of the whole step in the records, Inductor's kernels and ours together."""
BF16, FP32 = torch.bfloat16, torch.float32
NOTHING: dict[str, Any] = {
    "triton_launches": 0, "custom_launches": 0, "triton_gb": 0.0, "custom_gb": 0.0, "peak_gb": 0.0, "square_tensors": 0,
    "recomputed_statistics": 0, "spills": None, "fp64_optimizer": 0,
    "kinds": {kind: {"launches": 0, "gb": 0.0} for kind in KINDS},
}  # fmt: skip
COMPILED = 6
"""Kernels given to ptxas, those with the most bytes, beside the optimiser's. The records have those of all."""


def over_budget(record: Mapping[str, Any], budget: Mapping[str, float]) -> list[str]:
    """What a step must not do, and what exceeds its budget."""
    found = {
        "launches": record["triton_launches"] + record["custom_launches"],
        "gb": record["triton_gb"] + record["custom_gb"],
        "peak_gb": record["peak_gb"],
        **{kind: of_kind["gb"] for kind, of_kind in record["kinds"].items()},
    }
    never = ("square_tensors", "recomputed_statistics", "spills", "fp64_optimizer")
    return [f"{key} {found[key]:.2f} > {most}" for key, most in budget.items() if found[key] > most] + [
        key for key in never if record[key]
    ]


def cast_one_by_one(trace: Traced) -> Traced:
    """The step with weights that are cast part by part, not as one tensor."""
    graph = deepcopy(trace.graph.graph)
    (cast,) = (
        node
        for node in graph.nodes
        if node.target is prims.convert_element_type.default
        and (node.meta["val"].ndim, node.meta["val"].dtype, node.args[0].op) == (1, BF16, "placeholder")
    )
    for split in list(cast.users):
        for part in list(split.users):
            with graph.inserting_before(part):
                masters = new_node(graph, split.target, cast.args[0], *split.args[1:])
                master = new_node(graph, operator.getitem, masters, part.args[1])
                part.replace_all_uses_with(new_node(graph, cast.target, master, BF16))
    graph.eliminate_dead_code()
    return trace._replace(graph=GraphModule(trace.graph, graph))


def new_node(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


MUTANTS = {"WriteSumsOnce": "norm forward", "SumColumnsInStages": "column sums", "cast_one_by_one": "other"}
"""Passes that are switched off, and a step with one cast per weight; the kind of kernel whose budget each exceeds, alone as
well as together."""


def count_all() -> dict[str, dict[str, Any]]:
    """Records of the cases, and of one of them under all mutants; in one process, which warms Inductor up once, and from one
    trace of each case."""
    gc.disable()  # the collector takes a tenth of the time, and the process ends
    first, plain = (traced(CASES[name]) for name in ("ViT-B/16", PLAIN))
    records = {
        "ViT-B/16": count(CASES["ViT-B/16"], archs=(90,), compiled=COMPILED, workers=1, trace=first),
        PLAIN: count(CASES[PLAIN], archs=(), trace=plain),
    }
    with ExitStack() as switched_off:
        for name in MUTANTS:
            if hasattr(inductor_options, name):
                switched_off.enter_context(patch.object(inductor_options, name, lambda: lambda graph: None))
        records["mutants"] = count(CASES[PLAIN], archs=(), trace=cast_one_by_one(plain))
    with patch.object(inductor_options, "MergeEqualNodes", lambda: lambda graph: None):
        records["unmerged"] = count(CASES["ViT-B/16"], archs=(), trace=first)
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
    excesses = over_budget(records["mutants"], BUDGETS[PLAIN])
    assert [excess for excess in excesses if excess.startswith(f"{MUTANTS[name]} ")], excesses
    assert {"launches", "gb"} <= {excess.split()[0] for excess in excesses}


@pytest.mark.slow
@NEEDS_INDUCTOR
def test_equal_nodes_that_are_not_merged_live_at_the_peak(records: dict[str, dict[str, Any]]) -> None:
    """A step with two pullbacks of one pass: each would keep its own normalised activations."""
    assert [excess.split()[0] for excess in over_budget(records["unmerged"], BUDGETS["ViT-B/16"])] == ["peak_gb"]


def materialised(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    assert attn_mask is None
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def test_materialised_attention_is_seen() -> None:
    """In the graph; Inductor may fuse it again where it knows the pattern."""
    case = CASES[PLAIN]
    with FakeTensorMode(allow_non_fake_inputs=True):
        tower = VisionTransformer(replace(case.race.vit, layers=LAYERS))
        graphs = [make_fx(tower)(torch.empty(case.batch, 3, 224, 224))]
        with patch.object(F, "scaled_dot_product_attention", materialised):
            graphs.append(make_fx(tower)(torch.empty(case.batch, 3, 224, 224)))
    assert square_tensors(graphs[0], case) == 0
    assert over_budget({**NOTHING, "square_tensors": square_tensors(graphs[1], case)}, BUDGETS[PLAIN]) == ["square_tensors"]


def test_every_excess_is_told() -> None:
    budget = {"launches": 2, "gb": 2.0, "peak_gb": 1.0, "packing": 1.0}
    assert over_budget(NOTHING, budget) == []
    for key in NOTHING:
        more = {"packing": {"launches": 0, "gb": 3.0}} if key == "kinds" else 3
        assert len(over_budget({**NOTHING, key: more}, budget)) == 1, key


@pytest.mark.slow
@NEEDS_INDUCTOR
def test_the_record_adds_up(records: dict[str, dict[str, Any]]) -> None:
    for name in (*CASES, "mutants"):
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


WRAPPER = """
class Runner:
    def __init__(self, partitions):
        pass

    def call(self, args):
        r, q, lse = args
        args.clear()
        r, added = torch.ops.cammask.cls_relevance.default(r, None, q, q, q, q, lse)
        r, added = torch.ops.cammask.cls_relevance.default(r, added, q, q, q, q, None)
        del added
        wide = empty_strided_cuda((1000, 64), (64, 1), torch.float32)
        del r
        extern_kernels.mm(reinterpret_tensor(q, (54, 32), (32, 1), 0), reinterpret_tensor(wide, (32, 8), (8, 1), 0), out=wide)
        return (q.exp(),)
"""


def test_a_wrapper_is_replayed() -> None:
    """Two images, three heads, nine tokens: one relevance with the statistics of its attention, one without; a product; what
    lives when most does."""
    strides: dict[tuple[int, ...], tuple[int, ...]] = {
        (2, 9): (9, 1), (2, 3, 9, 32): (864, 288, 32, 1), (2, 3, 9): (27, 9, 1),
    }  # fmt: skip
    inputs = [(torch.Size(shape), of_shape, FP32) for shape, of_shape in strides.items()]
    found = replay(Generated(kernels={}, wrapper=WRAPPER, inputs=inputs, square=0, seconds={}))
    assert found.recomputed == 1
    assert [(call.kind, call.launches) for call in found.calls] == [("ours", 1), ("ours", 2), ("product", 1), ("aten", 1)]
    assert found.calls[2].flops == 2 * 54 * 32 * 8
    assert found.calls[3].bytes == 2 * 1728 * 4
    heads, wide = 1728 * 4, 64000 * 4
    assert found.at_peak == [
        ("float32 (1000, 64)", wide), ("float32 (2, 3, 9, 32)", 2 * heads), ("float32 (2, 3, 9)", 54 * 4),
        ("float32 (2, 9)", 18 * 4),
    ]  # fmt: skip
    assert found.peak == sum(size for _, size in found.at_peak)


def touched(*parts: tuple[str, int, torch.dtype], whole: int | None = None) -> list[Access]:
    return [Access(sign == "+", elements, whole or elements, dtype) for sign, elements, dtype in parts]


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


def test_the_newest_count_of_the_whole_step_is_within_the_bars() -> None:
    """All twelve layers, every kernel compiled for three GPUs."""
    case = ("ViT-B/16", "masked-object", 12, 256)
    *_, newest = (r for r in read(RECORDS) if (r["arch"], r["mode"], r["layers"], r["batch"]) == case)
    assert over_budget({"recomputed_statistics": 0} | newest, BARS) == []
    assert set(newest["registers"]) == {"sm_80", "sm_90", "sm_100"}


def test_tables_show_new_kinds_and_uncompiled_steps() -> None:
    first = read(RECORDS)[0]
    none = {kind: {"launches": 0, "gb": 0.0} for kind in KINDS}
    last = first | {"kinds": none | {"gradients": {"launches": 1, "gb": 0.5}}, "fp64_optimizer": None, "spills": None}
    kinds = " ".join(kinds_table([first, last]).split())
    assert f"| {KINDS['gradients']} | 0.0 (0) | 0.5 (1) |" in kinds
    assert f"| {KINDS['optimiser']} | 2.4 (1) | 0.0 (0) |" in kinds
    assert "| - | - |" in " ".join(history_table([first, last]).split()).splitlines()[-1]

"""The bench command: exit codes, records, tables, and the GPU part with a pretended device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cammask_fast
from bench import pages, records, report
from bench.__main__ import main
from bench.data import loaders
from bench.data.photographs import generate
from bench.gpu import kernels
from bench.gpu.timer import Timed
from bench.kernels import aot, cpu, static
from bench.records import ROOT, Spread, append, interleaved, read, spread
from bench.step.work import count_flops
from cammask_fast import cli
from cammask_fast.kernels.backend import INTERPRETED, set_backend
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.viz.tables import markdown_table

WHERE = {"gpu": "a GPU", "driver": "1.2", "torch": "2.15", "triton": "3.9", "commit": "abc"}
ON_CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        (["nonsense"], "nonsense"),
        ([], "COMMAND"),
        (["kernels"], "--static"),
        (["kernels", "--static", "--cpu"], "--cpu"),
        (["gpu"], "--out"),
        (["gpu", "--out", "x", "--part", "loader"], "loader"),
        (["gpu", "--out", "x", "--first", "0"], "--first"),
        (["gpu", "--out", "x", "--seconds", "-1"], "--seconds"),
        (["report", "--root", "/nowhere"], "/nowhere"),
        (["report", "--only", "nonsense"], "nonsense"),
        (["step", "--batch", "1"], "--batch"),
        (["data", "--repeats", "1"], "--repeats"),
        (["data", "--images", "/nowhere"], "no folder at /nowhere"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    argv: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: error: ")
    assert error.count("\n") == 1
    assert wrong in error


@ON_CPU_ONLY
def test_gpu_without_cuda_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(tmp_path / "records")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "bench gpu: no CUDA device here, nothing was measured\n"
    assert not (tmp_path / "records").exists()


@ON_CPU_ONLY
def test_cammask_bench_is_python_m_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "gpu", "--out", str(tmp_path / "records")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert cli.main(["bench", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_outside_a_checkout_bench_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cammask_fast, "__file__", str(tmp_path / "site-packages/cammask_fast/__init__.py"))
    assert cli.main(["bench", "kernels", "--static"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "checkout" in error


def test_quantiles_and_turns() -> None:
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    now, order = iter(range(1000)), []
    functions = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = interleaved(functions, repeats=3, warmup=1, clock=lambda: float(next(now)))
    assert order == ["a", "b"] * 4
    assert times == {"a": (1.0, 1.0, 1.0), "b": (1.0, 1.0, 1.0)}


def test_records_are_lines(tmp_path: Path) -> None:
    append(tmp_path / "r.jsonl", {"op": "a"})
    append(tmp_path / "r.jsonl", {"op": "b"})
    assert read(tmp_path / "r.jsonl") == [{"op": "a"}, {"op": "b"}]


def test_a_record_names_the_checkout_it_was_made_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {"rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(records, "_git", lambda command, *_: answers[command])
    assert records.commit() == "abc1234"
    answers["status"] = " M kernels/launch.py"
    assert records.commit() == "abc1234+"
    monkeypatch.undo()
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit() == "unknown"


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return cpu.records(images=4, side=28, patches=(4, 49), relevance_images=1, heads=2, repeats=3)


def test_cpu_records_have_their_fields(measured: list[dict[str, Any]]) -> None:
    assert [(r["op"], r["provider"], r["patches"]) for r in measured] == [
        (op, provider, patches)
        for patches in (4, 49)
        for op in ("counterfactual", "cls_relevance")
        for provider in ("reference", "op-by-op")
    ]
    for record in measured:
        assert 0 < record["seconds_p20"] <= record["seconds_p50"] <= record["seconds_p80"]
        assert {"images", "shape", "dtype", "mode", "threads", "cores", "cpu", "torch", "triton", "commit"} <= set(record)
    assert json.loads(json.dumps(measured)) == measured


def test_the_cpu_table_shows_the_ratio() -> None:
    what = {"op": "counterfactual", "patches": 49, "images": 64}
    table = cpu.markdown(
        [what | {"provider": "reference", "seconds_p50": 0.1}, what | {"provider": "op-by-op", "seconds_p50": 0.25}]
    )
    assert cells(table.splitlines()[2]) == ["counterfactual", "49", "64", "100.0", "250.0", "2.5x"]


def test_a_benchmark_that_fails_gives_the_cores_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with pytest.raises(ValueError, match="disagree with 3 threads"), cpu.all_cores():
        raise ValueError(f"the providers disagree with {torch.get_num_threads()} threads")
    assert torch.get_num_threads() == 1


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = counterfactual_batch
    monkeypatch.setattr("bench.kernels.cpu.counterfactual_batch", lambda *a, **k: honest(*a, **k) + (k.get("dtype") is None))
    with pytest.raises(ValueError, match="counterfactual: not timed"):
        cpu.counterfactual_functions(2, 4, 28)


@pytest.mark.parametrize("as_json", [True, False])
def test_records_are_printed_and_written(as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.show([{"op": "a"}], "| op |", as_json=as_json, out=tmp_path / "new" / "r.jsonl")
    assert capsys.readouterr().out == ('{"op": "a"}\n' if as_json else "| op |\n")
    assert read(tmp_path / "new" / "r.jsonl") == [{"op": "a"}]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels have no signature")
@pytest.mark.parametrize("one", ["context", "heads"])
def test_signatures_are_those_of_the_launcher(one: str) -> None:
    """Every argument of every case, one of them 1, against the specialisation of the installed Triton."""
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "create_function_from_signature"):
        pytest.skip("this Triton specialises elsewhere")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))
    spelled_otherwise = {"*u1": "*i1"}
    for case in static.cases():
        launch = static.plan(case.op, case.configuration)[case.launch]
        if one in launch.arguments:
            launch = launch._replace(arguments=launch.arguments | {one: 1})
        bind = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        signature, constants, attributes = aot.specialise(launch)
        for position, (parameter, (kind, key)) in enumerate(
            zip(launch.kernel.params, bind(**launch.arguments)[1], strict=True)
        ):
            where = f"{case.name}, {parameter.name}"
            assert signature[parameter.name] == spelled_otherwise.get(kind, kind), where
            assert ((position,) in constants) == (kind == "constexpr"), where
            if kind != "constexpr":
                assert ((position,) in attributes) == (key == "D"), where


def pretended_meter(**changes: Any) -> kernels.Meter:
    meter = kernels.Meter(
        device=torch.device("cpu"),
        time=lambda function: Timed(Spread(1e-3, 1e-3, 1e-3), "pretended", 3),
        peak=lambda function: 17,
        copy=1e12,
        product=1e14,
        environment=WHERE,
    )
    return meter._replace(**changes)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile returns the function: Inductor takes minutes here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("op", kernels.OPS)
def test_every_op_is_measured(op: str) -> None:
    work = kernels.build(op, "ViT-B/32", 16, torch.device("cpu"))
    record = kernels.measure(kernels.Case(op, "ViT-B/32", 16, "reference"), work, pretended_meter())
    assert record["op"] == op.partition(" ")[0]
    assert record["seconds_p20"] == record["seconds_p50"] == record["seconds_p80"] == 1e-3
    assert record["peak_memory_bytes"] == 17
    assert (record["timing"], record["calls_per_event_pair"]) == ("pretended", 3)
    assert record["shape"][0] == record["batch"] == 16
    assert record["gigabytes_per_second"] == pytest.approx(work.bytes / 1e6)
    assert record["share_of_copy"] == pytest.approx(work.bytes / 1e9)
    assert ("teraflops" in record) == (op in ("cls_relevance layer", "legrad layer"))
    output = work.ours(*work.inputs)
    assert work.bytes == sum(t.numel() * t.itemsize for t in (*work.inputs, *output))


def test_the_work_of_relevance_is_the_references() -> None:
    work = kernels.build("cls_relevance layer", "ViT-B/32", 8, torch.device("cpu"))
    assert work.flops == count_flops(lambda: work.reference(*work.inputs))


def test_a_wrong_kernel_is_not_timed() -> None:
    work = kernels.build("normalise", "ViT-B/32", 8, torch.device("cpu"))
    with pytest.raises(ValueError, match="not timed"):
        kernels.compare([output + 0.05 for output in work.ours(*work.inputs)], work)
    with pytest.raises(ValueError, match="not timed"):
        kernels.compare([output * torch.nan for output in work.ours(*work.inputs)], work)


@ON_CPU_ONLY
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs what must fail here")
@pytest.mark.usefixtures("no_compiler")
def test_a_provider_that_fails_is_a_record_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cuda_meter", pretended_meter)
    found = list(kernels.run(op="normalise", arch="ViT-B/32", providers=["triton", "reference", "compiled"], batches=[8]))
    assert [r["provider"] for r in found] == ["triton", "reference", "compiled"]
    for record in found:
        assert ("error" in record) == (record["provider"] == "triton"), record  # the CPU has no Triton
        assert "needs CUDA tensors" in record.get("error", "needs CUDA tensors")
        assert {"op", "provider", "mode", "arch", "batch", *WHERE} <= set(record)
    assert set_backend("auto") == "auto", "the chosen backend is restored"
    monkeypatch.setattr(
        kernels, "measure", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access"))
    )
    with pytest.raises(RuntimeError, match="illegal"):
        list(kernels.run(op="normalise", arch="ViT-B/32", providers=["triton"], batches=[8]))


def gpu_records() -> list[dict[str, Any]]:
    case = {"op": "cls_relevance", "mode": "layer", "arch": "ViT-B/16", "batch": 512, **WHERE}
    rate = {"gigabytes_per_second": 1500.0, "share_of_copy": 0.35}
    pixels = {"op": "normalise", "mode": "forward", "arch": "ViT-B/32", "batch": 64, **WHERE}
    return [
        {"op": "device", "provider": "torch", "copy_gigabytes_per_second": 4300.0, "bf16_matmul_teraflops": 790.0, **WHERE},
        case | {"provider": "triton", "seconds_p50": 9.0, "teraflops": 1.0, "share_of_matmul": 0.01} | rate,
        case | {"provider": "triton", "seconds_p50": 5e-4, "teraflops": 250.0, "share_of_matmul": 0.316} | rate,
        case | {"provider": "reference", "seconds_p50": 4e-3} | rate,
        case | {"provider": "compiled", "error": "ValueError: no"},
        pixels | {"provider": "triton", "seconds_p50": 1e-4} | rate,
    ]


def test_the_report_writes_records_into_the_pages(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    page, results = tmp_path / "docs/kernels.md", tmp_path / "results"
    results.mkdir()
    page.parent.mkdir()
    page.write_text("a\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nb\n<!-- cpu:begin -->\n<!-- cpu:end -->\nc\n")
    command = ["report", "--root", str(tmp_path), "--results", str(results), "--only", "gpu", "cpu"]
    assert main(command) == 0
    assert report.NO_GPU in page.read_text()
    assert report.NO_CPU in page.read_text()
    assert "old" not in page.read_text()
    for record in gpu_records():
        append(results / "h200.jsonl", record)
    for record in measured:
        append(results / "cpu.jsonl", record)
    assert main(command) == 0
    text = page.read_text()
    assert report.NO_GPU not in text
    assert report.NO_CPU not in text
    assert "a GPU, driver 1.2, torch 2.15, Triton 3.9, commit abc; its own copy rate 4300 GB/s" in text
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    layer = ["cls_relevance, layer", "ViT-B/16", "512", "0.500", "4.000", "failed", "250.0 TFLOP/s (32% of matmul)"]
    assert layer in rows
    assert ["normalise", "ViT-B/32", "64", "0.100", "-", "-", "1500 GB/s (35% of copy)"] in rows
    assert [row[:3] for row in rows if row[0] == "counterfactual"] == [
        ["counterfactual", "4", "4"],
        ["counterfactual", "49", "4"],
    ]
    assert main(command) == 0
    assert page.read_text() == text


def test_the_gpu_sentence_names_what_was_measured() -> None:
    nothing = "Not measured on a GPU yet: kernels, training step, data loading."
    failed = {"op": "data", "gpu": "a GPU", "error": "no"}
    assert report.gpu_status([failed, {"op": "step", "cpu": "a CPU"}]) == nothing
    some = "Measured on a GPU: kernels on a GPU. Not measured on a GPU yet: training step, data loading."
    assert report.gpu_status(gpu_records()) == some
    everything = [*gpu_records(), {"op": "step", "gpu": "b"}, {"op": "data", "gpu": "b"}, {"op": "data", "gpu": "a"}]
    assert report.gpu_status(everything) == (
        "Measured on a GPU: kernels on a GPU, training step on b, data loading on a and b."
    )


def race(provider: str, seconds: float, **changes: Any) -> dict[str, Any]:
    units = 9.0 if provider.startswith("authors") else 7.5
    where = {"op": "step", "cpu": "c", "batch": 2, "arch": "ViT-B/16", "mode": "masked-object", "precision": "fp32"}
    return where | {"provider": provider, "seconds_p50": seconds, "forward_units": units} | changes


def test_every_run_of_a_race_counts_and_the_goal_is_judged() -> None:
    runs = [
        race("authors", 2.8), race("ours-eager", 2.0), race("authors", 2.6), race("ours-eager", 2.0), race("ours-eager", 9.0),
        race("authors-bf16", 1.0, precision="bf16"), race("ours-eager-bf16", 0.5, precision="bf16"),
        race("ours-eager", 1.0, cpu="no opponent"), race("authors", 1.0, cpu="failed", error="x"),
    ]  # fmt: skip
    rows = [cells(line) for line in report.gains_section(runs).splitlines()[2:]]
    assert rows == [
        ["ViT-B/16", "masked-object", "fp32", "2", "c", "1.20x", "1.40x, 1.30x", "1.40x: met by 1 of 2"],
        ["ViT-B/16", "masked-object", "bf16", "2", "c", "1.20x", "2.00x", "-"],
    ]
    assert report.gains_section([]) == report.NO_CPU


def test_the_report_sums_up_the_static_table() -> None:
    row = {"op": "normalise", "arch": "sm_90", "registers": 40, "spill_bytes": 0, "stack_bytes": 0, "shared": 2048}
    row |= {"occupancy": 0.5, "promises": "wide", "triton": "3.9"}
    text = report.static_section([row, row | {"registers": 64, "occupancy": 1.0, "shared": 0}])
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert ["normalise", "sm_90", "2", "40-64", "0", "2", "50%-100%"] in rows
    assert report.static_section([]) == ""


@pytest.mark.parametrize("text", ["", "<!-- gpu:end --><!-- gpu:begin -->", 2 * "<!-- gpu:begin --><!-- gpu:end -->"])
def test_a_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"docs/x\.md: expected one <!-- gpu:begin"):
        pages.fill(text, "gpu", "section", page="docs/x.md")


def test_tables_line_up() -> None:
    assert markdown_table(["a", "bc"], [["def", "g"]]) == "| a   | bc |\n|-----|----|\n| def | g  |"


def step_records() -> list[dict[str, Any]]:
    shared = {"op": "step", "arch": "ViT-B/16", "mode": "masked-object", "torch": "2.15", "commit": "abc"}
    cpu = shared | {"cpu": "a CPU", "threads": 2, "batch": 2, "forward_units": 9.0, "precision": "fp32"}
    gpu = shared | {"gpu": "a GPU", "forward_units": 9.0, "precision": "bf16"}
    return [
        cpu
        | {
            "provider": "authors",
            "seconds_p50": 3.0,
            "images_per_second": 0.7,
            "activation_mb": 700.0,
            "peak_mb": 2000.0,
            "share_of_matmul": 0.789,
        },
        cpu
        | {"provider": "ours-eager", "seconds_p50": 1.5, "images_per_second": 1.4, "activation_mb": 250.0, "peak_mb": 1500.0},
        cpu | {"op": "ablation", "provider": "ours-eager", "seconds_p50": 1.6, "images_per_second": 1.25},
        cpu | {"op": "ablation", "provider": "without-x", "seconds_p50": 2.0, "images_per_second": 1.0},
        {**cpu, "op": "stages", "provider": "ours-eager", "seconds": {"task": 3.0, "cam": 1.0}},
        gpu | {"provider": "authors", "batch": 64, "seconds_p50": 0.4, "images_per_second": 160.0, "peak_mb": 90000.0},
        gpu | {"provider": "authors-compiled", "batch": 512, "error": "out of memory"},
        gpu
        | {
            "provider": "ours-compiled",
            "batch": 512,
            "seconds_p50": 0.4,
            "images_per_second": 1280.0,
            "peak_mb": 60000.0,
            "activation_mb": 50000.0,
            "compile_seconds": 99.0,
            "share_of_matmul": 0.5,
        },
        gpu
        | {
            "provider": "ours-eager",
            "batch": 256,
            "seconds_p50": 0.8,
            "images_per_second": 320.0,
            "stages": {"task": 0.5, "teacher": 0.3, "cam": 0.2},
        },
    ]


def test_the_report_shows_every_race_of_the_step() -> None:
    text = report.step_section(step_records())
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert ["authors", "fp32", "2", "3.000", "0.7", "1.00x", "9.00", "79%", "700", "2000", "-"] in rows
    assert ["ours-eager", "fp32", "2", "1.500", "1.4", "2.00x", "9.00", "-", "250", "1500", "-"] in rows
    assert ["ours-compiled", "bf16", "512", "0.400", "1280.0", "8.00x", "9.00", "50%", "50000", "60000", "99"] in rows
    assert ["authors-compiled", "-", "512", "out of memory", "-", "-", "-", "-", "-", "-", "-"] in rows
    assert "ViT-B/16, masked-object, batch 2, 2 threads, a CPU, torch 2.15, commit abc:" in text
    assert "each at its largest batch, a GPU" in text
    assert ["without-x", "fp32", "2", "2.000", "1.0", "0.80x", "9.00", "-", "-", "-", "-"] in rows
    assert "Stages of ours-eager: task 75%, cam 25%." in text
    assert "Stages of ours-eager: task 50%, teacher 30%, cam 20%." in text
    assert report.NO_STEP_ON_GPU not in text
    assert report.step_section(step_records()[:5]).startswith(report.NO_STEP_ON_GPU)


def test_every_loader_is_measured_on_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "LEAST_IMAGES", 24)
    root, out = generate(tmp_path / "images", 12), tmp_path / "data.jsonl"
    assert main(["data", "--images", str(root), "--threads", "1", "--repeats", "2", "--out", str(out)]) == 0
    found = {record["provider"]: record for record in read(out)}
    assert list(found) == ["dali", "torchvision", "torch"]
    for record in found.values():
        assert record["threads"] == 1
        assert record["images_per_s"] == pytest.approx(24 / record["seconds_p50"])
        assert record["cpu_s_per_1000"] > 0
    assert found["torchvision"]["mean_abs_diff"] == 0
    assert 0 < found["torch"]["mean_abs_diff"] < 0.1
    assert 0 < found["dali"]["mean_abs_diff"] <= 0.5
    text = report.data_section(read(out))
    assert text.startswith(report.NO_DATA_ON_GPU)
    assert "12 photographs" in text

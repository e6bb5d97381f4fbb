"""The bench command: exit codes, records, tables, and the GPU part with a pretended device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cammask_fast
from bench import gpu, records, report
from bench.__main__ import main
from bench.data import loaders
from bench.data.photographs import generate
from bench.gpu import data as gpu_data
from bench.gpu import kernels, tests
from bench.gpu import step as gpu_step
from bench.kernels import aot, cpu, static
from bench.records import ROOT, append, interleaved, markdown_table, read, spread
from bench.step import race as step_race
from bench.step.ablations import ABLATIONS
from bench.step.race import Race
from bench.step.work import count_flops
from cammask_fast import cli
from cammask_fast.config import TrainConfig
from cammask_fast.kernels.backend import INTERPRETED, set_backend
from cammask_fast.kernels.masked_fill import counterfactual_batch
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer

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
        (["gpu", "--out", "x", "--arch", "ViT-Z"], "ViT-Z"),
        (["report", "--readme", "/nowhere/README.md"], "/nowhere"),
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
        times=lambda function, repeats: [1e-3] * repeats,
        peak=lambda function: 17,
        healthy=lambda: True,
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
    assert record["shape"][0] == record["batch"] == 16
    assert record["gigabytes_per_second"] == pytest.approx(work.bytes / 1e6)
    assert record["share_of_copy"] == pytest.approx(work.bytes / 1e9)
    assert ("teraflops" in record) == (op == "cls_relevance layer")
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


def test_the_large_batch_and_triton_come_first() -> None:
    order = kernels.cases(gpu.ARCHS)
    assert order[0] == ("counterfactual_batch threshold", "ViT-B/16", 512, "triton")
    assert [case.batch for case in order] == sorted((case.batch for case in order), reverse=True)
    assert len(set(order)) == len(order) == 2 * len(kernels.OPS) * 3 * 3
    large = [case.provider for case in order if case.batch == 512]
    assert large.index("compiled") == len(large) * 2 // 3


@ON_CPU_ONLY
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs what must fail here")
@pytest.mark.usefixtures("no_compiler")
def test_a_failed_case_is_a_record_and_the_run_goes_on(tmp_path: Path) -> None:
    code = kernels.run(tmp_path, archs=["ViT-B/32"], batches=[8], meter=pretended_meter())
    first, *rest = read(tmp_path / "kernels.jsonl")
    assert first == {
        "op": "device", "provider": "torch", "copy_gigabytes_per_second": 1e3, "bf16_matmul_teraflops": 100.0, **WHERE,
    }  # fmt: skip
    assert code == 1
    assert len(rest) == 3 * len(kernels.OPS)
    for record in rest:
        assert ("error" in record) == (record["provider"] == "triton"), record  # the CPU has no Triton
        assert "needs CUDA tensors" in record.get("error", "needs CUDA tensors")
        assert {"op", "provider", "mode", "arch", "batch", *WHERE} <= set(record)
    assert set_backend("auto") == "auto", "the chosen backend is restored"


@pytest.mark.usefixtures("no_compiler")
def test_the_run_stops_by_itself_and_can_go_on(tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 100))
    options: dict[str, Any] = {"archs": ["ViT-B/32"], "batches": [8], "meter": pretended_meter()}
    kernels.run(tmp_path, seconds=250, clock=lambda: float(next(now)), **options)
    *_, stopped = read(tmp_path / "kernels.jsonl")
    assert stopped == {"op": "stopped", "reason": "250 s have passed", "next": 2, "cases": 3 * len(kernels.OPS)}
    before = len(read(tmp_path / "kernels.jsonl"))
    assert kernels.run(tmp_path, first=stopped["cases"] - 1, **options) == 0
    (last,) = read(tmp_path / "kernels.jsonl")[before:]
    assert (last["op"], last["provider"]) == ("patch_select", "compiled")


@ON_CPU_ONLY
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs what must fail here")
def test_after_a_crash_of_the_device_a_new_process_goes_on(tmp_path: Path) -> None:
    commands: list[Sequence[str]] = []

    def restart(command: Sequence[str]) -> int:
        commands.append(command)
        return 0

    meter = pretended_meter(healthy=lambda: False)
    assert kernels.run(tmp_path, archs=["ViT-B/32"], batches=[8], meter=meter, clock=lambda: 5.0, restart=restart) == 1
    assert commands == [["--out", str(tmp_path), "--first", "1", "--seconds", "480", "--arch", "ViT-B/32"]]


def executed(codes: Mapping[str, int | None], junit: str) -> Any:
    """A pretended execution of pytest and compute-sanitizer."""

    def execute(command: Sequence[str], log: Path, seconds: float, variables: Mapping[str, str]) -> int | None:
        name = "memcheck" if "memcheck" in command else "tests"
        assert 0 < seconds <= tests.SECONDS
        if name == "tests":
            (log.parent / "tests.xml").write_text(junit)
        return codes[name]

    return execute


JUNIT = '<testsuites><testsuite name="pytest" tests="7" failures="{}" errors="0" skipped="2"></testsuite></testsuites>'


@pytest.mark.parametrize(
    ("codes", "failures", "sanitizer", "code", "errors"),
    [
        ({"tests": 0, "memcheck": 0}, 0, "/bin/cs", 0, (None, None)),
        ({"tests": 1, "memcheck": 0}, 1, "/bin/cs", 1, ("exit code 1", None)),
        ({"tests": 0, "memcheck": 1}, 0, "/bin/cs", 1, (None, "exit code 1")),
        ({"tests": None, "memcheck": 0}, 0, "/bin/cs", 1, ("stopped at the time limit", None)),
        ({"tests": 0}, 0, None, 0, (None, None)),
        ({"tests": 0}, 5, None, 1, ("no test ran", None)),
    ],
)
def test_outcomes_of_the_tests_part(
    codes: dict[str, int | None], failures: int, sanitizer: str | None, code: int, errors: tuple[Any, Any], tmp_path: Path
) -> None:
    done = tests.run(
        tmp_path,
        execute=executed(codes, JUNIT.format(failures)),
        environment=lambda: dict(WHERE),
        which=lambda name: sanitizer,
        clock=lambda: 0.0,
    )
    ran, checked = read(tmp_path / "tests.jsonl")
    assert done == code
    assert (ran["op"], ran.get("error")) == ("tests", errors[0])
    assert (ran["passed"], ran["failed"], ran["skipped"]) == (5 - failures, failures, 2)
    assert (checked["op"], checked.get("error")) == ("memcheck", errors[1])
    assert ("skipped" in checked) == (sanitizer is None)
    assert ran["gpu"] == checked["gpu"] == WHERE["gpu"]


def test_a_command_is_logged_and_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert (
        tests.execute([sys.executable, "-c", "import os; print(os.environ['ASKED']); exit(3)"], log, 60, {"ASKED": "yes"}) == 3
    )
    assert log.read_text() == "yes\n"
    assert tests.execute([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.2, {}) is None


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


def test_the_report_writes_gpu_records_into_the_readme(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(
        "a\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nb\n<!-- cpu:begin -->\n<!-- cpu:end -->\nc\n"
        "<!-- step:begin --><!-- step:end --><!-- runs:begin -->\n<!-- runs:end -->\n<!-- data:begin --><!-- data:end -->"
    )
    command = ["report", "--readme", str(readme), "--results", str(results)]
    assert main(command) == 0
    assert report.NO_GPU in readme.read_text()
    assert report.NO_CPU in readme.read_text()
    assert "old" not in readme.read_text()
    for record in gpu_records():
        append(results / "h200.jsonl", record)
    for record in measured:
        append(results / "cpu.jsonl", record)
    assert main(command) == 0
    text = readme.read_text()
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
    once = readme.read_text()
    assert main(command) == 0
    assert readme.read_text() == once


def test_the_report_sums_up_the_static_table() -> None:
    row = {"op": "normalise", "arch": "sm_90", "registers": 40, "spill_bytes": 0, "stack_bytes": 0, "shared": 2048}
    row |= {"occupancy": 0.5, "promises": "wide", "triton": "3.9"}
    text = report.static_section([row, row | {"registers": 64, "occupancy": 1.0, "shared": 0}])
    assert cells(text.splitlines()[-1]) == ["normalise", "sm_90", "2", "40-64", "0", "2", "50%-100%"]
    assert report.static_section([]) == ""


@pytest.mark.parametrize("text", ["", "<!-- gpu:end --><!-- gpu:begin -->", 2 * "<!-- gpu:begin --><!-- gpu:end -->"])
def test_a_readme_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="gpu:begin"):
        report.fill(text, "gpu", "section")


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


def test_every_provider_runs_at_the_largest_batch_that_fits(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def measure(race: Race, provider: str) -> dict[str, Any]:
        seen.append((provider, race.batch))
        if provider == "authors" and race.batch > 128:
            raise torch.OutOfMemoryError("no")
        if provider == "ours-eager":
            raise RuntimeError("broken")
        return {"images_per_second": 1.0}

    moments = iter(range(0, 10_000, 100))
    code = gpu_step.run(
        tmp_path, archs=["ViT-B/16"], seconds=450, measure=measure, environment=dict, clock=lambda: float(next(moments))
    )
    assert code == 1, "a failed case is a failure, after all the others"
    records = read(tmp_path / "step.jsonl")
    assert [(r["provider"], r["batch"]) for r in records] == [
        ("ours-compiled", 512), ("authors", 128), ("authors-compiled", 512), ("ours-eager", 512)
    ]  # fmt: skip
    assert [batch for provider, batch in seen if provider == "authors"] == [512, 256, 128]
    assert records[-1]["error"] == "RuntimeError: broken"
    assert all(r["mode"] == "masked-object" for r in records), "no case starts after the time is over"


@pytest.mark.parametrize("provider", ["authors", "ours-compiled"])
def test_a_case_of_the_step_on_a_gpu_is_complete(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CPU in the place of the GPU, and a stand-in for its memory: 1 000 000 000 bytes at the peak, 10 000 000 held."""
    said: list[str] = []
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1_000_000_000)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", said.append)
    monkeypatch.setattr(gpu_step, "_matmul_rate", lambda precision: {"fp32": 1e12, "bf16": 4e12}[precision])
    ours = provider == "ours-compiled"
    if ours:  # the compiler takes minutes on a CPU
        monkeypatch.setattr(gpu_step, "optimiser_step", lambda race, provider: lambda: None)
    race = Race(arch="tiny", config=TrainConfig(method="masked-object", precision="bf16"), batch=4)
    record = gpu_step.measure(race, provider)
    assert record["precision"] == ("bf16" if ours else "fp32")
    assert record["matmul_teraflops"] == (4.0 if ours else 1.0)
    assert record["share_of_matmul"] == pytest.approx(record["teraflops"] / record["matmul_teraflops"])
    weights = 4 * sum(p.numel() for p in Classifier(VisionTransformer(race.vit), torch.zeros(1000, 64)).parameters())
    assert record["peak_mb"] == 1000.0
    assert record["activation_mb"] == pytest.approx(990.0 - (weights / 1e6 if ours else 0.0)), "gradients are no activations"
    assert ("compile_seconds" in record) == ours
    assert ("error" in said) == ours, "a synchronisation inside our compiled step is an error"
    assert said[-1] == "default"


def test_cases_of_the_step_on_a_gpu() -> None:
    cases = [(op, race.arch, race.config.method, provider) for op, race, provider in gpu_step.cases(["ViT-B/16", "ViT-B/32"])]
    assert cases[0] == ("step", "ViT-B/16", "masked-object", "ours-compiled"), "the most valuable first"
    assert len(set(cases)) == len(cases)
    raced = {case[3] for case in cases if case[:3] == ("step", "ViT-B/16", "masked-object")}
    assert raced == {*step_race.EAGER, *step_race.COMPILED}
    ablations = [race for op, race, _ in gpu_step.cases(["ViT-B/16"]) if op == "ablation"]
    assert len(ablations) == 1 + len(ABLATIONS)
    assert {race.config.precision for race in ablations} == {"tf32"}
    assert all(op == "step" for op, *_ in gpu_step.cases(["ViT-L/14"])), "identities are switched off at B/16 only"


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


def test_loading_on_a_gpu_records_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_data, "FILES", 4)

    def measure(case: gpu_data.Case, _source: object, _folder: Path) -> dict[str, Any]:
        if case[1] == "ViT-B/32":
            raise RuntimeError("broken")
        return {"images_per_s": 7000.0} | ({"step_alone_images_per_s": 7500.0, "waited_for_data": 0.02} if case[1] else {})

    archs = ["ViT-B/16", "ViT-B/32", "ViT-L/14"]
    assert gpu_data.run(tmp_path, archs=archs, measure=measure, environment=lambda: WHERE) == 1
    found = read(tmp_path / "data.jsonl")
    assert [(r["mode"], r["arch"]) for r in found] == [
        ("decode", ""), ("train", "ViT-B/16"), ("train", "ViT-B/32"), ("decode", ""), ("decode", ""), ("decode", "")
    ]  # fmt: skip
    rows = [cells(line) for line in report.data_section(found).splitlines() if line.startswith("| ")]
    assert ["train ViT-B/16", "512", "75%", "7000", "7500", "2%"] in rows
    assert ["train ViT-B/32", "512", "75%", "failed", "-", "-"] in rows
    moments = iter(range(0, 10_000, 300))
    (tmp_path / "late").mkdir()
    arguments = {"archs": archs, "measure": measure, "environment": lambda: WHERE, "clock": lambda: float(next(moments))}
    assert gpu_data.run(tmp_path / "late", **arguments) == 0  # type: ignore[arg-type]
    assert len(read(tmp_path / "late" / "data.jsonl")) == 1, "no case starts after the time is over"

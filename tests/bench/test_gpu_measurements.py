"""Each kind of case of `bench gpu` with a CPU instead of the GPU, and the tables of their records."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import report
from bench.data.photographs import generate, mean_kilobytes
from bench.gpu import (
    attention,
    cases,
    data,
    kernels,
    memory,
    prediction,
    profiler,
    smoke,
    step,
    tables,
    tests,
    tiles,
    timer,
)
from bench.gpu.child import Skipped
from bench.records import ROOT, Spread
from bench.step import race
from cammask_fast.config import TrainConfig
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.kernels import cls_relevance
from cammask_fast.kernels.cls_relevance import Tiles

WHERE = {"gpu": "a GPU", "driver": "1.2", "torch": "2.15", "triton": "3.9", "commit": "abc"}
GB = 1e9


def pretended_timer(*durations: float) -> Callable[[Callable[[], object]], timer.Timed]:
    """The next of the durations at every call."""
    left = iter(durations)

    def time(function: Callable[[], object]) -> timer.Timed:
        function()
        seconds = next(left)
        return timer.Timed(Spread(seconds, seconds, seconds), "pretended", 3)

    return time


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GB are free; 1 GB was used at the peak and 10 MB before."""
    memory_of_gpu = {"mem_get_info": (int(100 * GB), int(100 * GB)), "memory_allocated": 10_000_000}
    memory_of_gpu |= {"max_memory_allocated": 1_000_000_000, "synchronize": None, "reset_peak_memory_stats": None}
    memory_of_gpu |= {"get_device_capability": (9, 0)}
    for name, value in memory_of_gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for module in (step, data, smoke, tests):
        monkeypatch.setattr(module, "gpu_environment", lambda: WHERE)


def test_attention_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = attention.Shape(9, 2, 9)
    record = attention.measure(shape, "default", pretended_timer(1e-3, 4e-3), batch=5, device="cpu")  # type: ignore[arg-type]
    assert record["attention"] == {"flash": 1}
    assert record["error"] <= 2 * record["error_of_formula"]
    assert record["backward_seconds"] == pytest.approx(3e-3)
    assert record["forward_teraflops"] == pytest.approx(4 * 5 * 2 * 81 * 64 / 1e9)
    assert record["backward_teraflops"] == pytest.approx(record["forward_teraflops"] * 2.5 / 3)
    assert attention.Shape(9, 2, 1).flops(5) * 9 == shape.flops(5)
    q, k, v = attention.inputs(attention.Shape(9, 2, 1), 5, "cpu")
    assert (q.shape, k.shape) == ((5, 2, 1, 64), (5, 2, 9, 64))
    with pytest.raises(ValueError, match="wrong output"):
        attention.check(F.scaled_dot_product_attention(q, k, v) * 1.05, q, k, v)
    assert {shape.length for shape in attention.SHAPES} == {50, 99, 197, 257}

    def measure(shape: attention.Shape, backend: str, _: object) -> dict[str, Any]:
        if backend == "cudnn":
            raise RuntimeError("No available kernel. Aborting execution.")
        if backend == "flash":
            raise ValueError("wrong output")
        if backend == "efficient":
            raise RuntimeError("CUDA error: an illegal memory access")
        return {"forward_seconds": 1.0}

    monkeypatch.setattr(attention, "measure", measure)
    monkeypatch.setattr(attention, "CudaTimer", object)
    found: list[dict[str, Any]] = []
    with pytest.raises(RuntimeError, match="illegal"):
        found.extend(attention.run([[197, 12, 1]]))
    assert [(r["provider"], r.get("unavailable"), r.get("error")) for r in found] == [
        ("default", None, None), ("cudnn", "No available kernel. Aborting execution.", None), ("flash", None, "wrong output"),
    ]  # fmt: skip


@pytest.mark.parametrize("group", ["fine-tuning", "random"])
def test_a_step_is_held_against_float64(group: str) -> None:
    found = list(smoke.correctness(group=group, device="cpu"))
    assert [(r["precision"], r["provider"]) for r in found] == [("fp32", "eager"), ("bf16", "eager")]
    for record in found:
        assert record["gradient_error"] == record["gradient_error_on_cpu"]
        assert "error" not in record
    assert 0 < found[0]["gradient_error"] < 1e-4 < found[1]["gradient_error"] < 0.2
    assert smoke.broken((1e-3, 3e-3), (1e-3, 1e-3)) == {
        "error": "wrong gradients: error 3.0e-03 against float64, PyTorch on the CPU has 1.0e-03"
    }
    assert "wrong losses" in smoke.broken((float("nan"), 0.0), (1.0, 1.0))["error"]
    assert smoke.broken((2e-3, 2e-3), (1e-3, 1e-3)) == {}


def test_every_group_of_methods_can_be_run() -> None:
    for group, options in smoke.GROUPS.items():
        config = TrainConfig(epochs=1, precision="fp32", **options)
        losses, moments = smoke.course(config)
        assert losses.shape == (smoke.STEPS, 3), group
        assert losses.isfinite().all(), group
        assert moments.norm() > 0, group


@pytest.mark.usefixtures("cpu_for_gpu")
@pytest.mark.parametrize("provider", ["authors", "ours-compiled"])
def test_a_case_of_the_step_is_complete(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "Race", lambda **options: race.Race(**{**options, "device": "cpu"}))
    ours = provider == "ours-compiled"
    noted: list[bool] = []
    if ours:  # the compiler takes minutes on a CPU
        monkeypatch.setattr(step, "optimiser_step", lambda race, provider: lambda: None)

    def step_times(run: Callable[[], object], repeats: int, *, quiet: bool) -> tuple[list[float], list[float]]:
        run()
        noted.append(quiet)
        return [0.5] * repeats, [0.1] * repeats

    monkeypatch.setattr(step, "step_times", step_times)
    monkeypatch.setitem(prediction.COUNTED, ("tiny", "masked-object"), prediction.Work(1e9, 1e8, 1e6, 1e6))
    (record,) = step.run(
        provider=provider, arch="tiny", mode="masked-object", batches=[4], precision="bf16",
        rates=lambda precision: ({"fp32": 1e12, "bf16": 4e12}[precision], 2e9),
    )  # fmt: skip
    assert record["precision"] == ("bf16" if ours else "fp32")
    assert record["matmul_teraflops"] == (4.0 if ours else 1.0)
    assert record["share_of_matmul"] == pytest.approx(record["teraflops"] / record["matmul_teraflops"])
    assert record["images_per_second"] == 4 / 0.5
    assert record["host_seconds"] == 0.1
    weights = race.trained_bytes(race.ARCHS["tiny"]) / 1e6
    assert record["peak_mb"] == 1000.0
    assert record["activation_mb"] == pytest.approx(990.0 - (weights if ours else 0.0)), "gradients are no activations"
    assert record["model_mb"] == pytest.approx(memory.step_bytes(provider, "tiny", 4) / 1e6)
    assert ("compile_seconds" in record) == ("predicted" in record) == ours
    assert noted == [ours], "a synchronisation inside our compiled step is an error"
    assert record["gpu"] == "a GPU"
    assert record["attention"] == {}, "nothing is attention where probabilities are materialised"
    if ours:
        seconds = 4 * 1e9 / 4e12 / prediction.PRODUCTS + 4 * 1e8 / 4e12 / prediction.ATTENTION + 5e6 / 2e9 / prediction.TRAFFIC
        assert record["predicted"]["seconds"] == pytest.approx(seconds)
        assert record["measured_over_predicted"] == pytest.approx(0.5 / seconds)


@pytest.mark.usefixtures("cpu_for_gpu")
def test_the_largest_batch_that_fits_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def measure(one: race.Race, *_: object) -> dict[str, Any]:
        tried.append(one.batch)
        if one.batch > least:
            raise torch.OutOfMemoryError("no")
        return {"images_per_second": 1.0}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "optimiser_step", lambda *_: lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(30 * GB), int(80 * GB)))
    options: dict[str, Any] = {
        "provider": "ours-compiled",
        "arch": "ViT-B/16",
        "mode": "masked-object",
        "batches": cases.BATCHES,
    }
    least = 128
    (record,) = step.run(**options, rates=lambda _: (1.0, 1.0))
    assert tried == [256, 128], "512 cannot fit by the model and is not tried"
    assert (record["batch"], record["out_of_memory_at"], record["free_mb"]) == (128, [256], 30_000)
    least = 1
    with pytest.raises(Skipped, match=r"needs 93\.\d GB of GPU memory, 30\.0 GB are free"):
        list(step.run(**options | {"provider": "authors", "arch": "ViT-L/14"}, rates=lambda _: (1.0, 1.0)))
    least = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(step.run(**options, rates=lambda _: (1.0, 1.0)))


def test_the_profile_holds_the_compilers_kernels_against_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profiler.Profile((profiler.Kernel("triton_poi_1", 3, 0.5), profiler.Kernel("nvjet", 2, 0.25)), Counter())
    monkeypatch.setattr(step, "profiled", lambda _: found)
    one = race.Race(arch="ViT-B/16", config=TrainConfig(method="masked-object"), batch=512)
    record = step.profile(one, lambda: None, 1e12)
    assert record["kernel_seconds"] == 0.75
    assert record["counted_bytes"] == pytest.approx(289.3e9, rel=1e-3)
    assert record["share_of_copy"] == pytest.approx(record["counted_bytes"] / 0.5e12)
    assert record["bytes_at_copy_rate"] == 0.5e12
    assert [kernel["kernel"] for kernel in record["top"]] == ["triton_poi_1", "nvjet"]


def tile_record(tiles_: tuple[int, ...], arch: str, seconds: float | None) -> dict[str, Any]:
    measured = {"unavailable": "no"} if seconds is None else {"seconds_p50": seconds}
    return {"op": "tiles", "tiles": list(tiles_), "arch": arch, **measured}


def test_the_sweeps_winner_goes_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, even, broken, lost, small = (256, 32, 4, 2), (256, 64, 8, 2), (256, 64, 4, 3), (256, 64, 4, 2), (64, 64, 4, 2)
    records = [
        tile_record(fast, "B", 1.0), tile_record(fast, "L", 9.0), tile_record(even, "B", 1.1), tile_record(even, "L", 3.0),
        tile_record(broken, "B", 0.1), tile_record(broken, "B", 0.5), tile_record(broken, "L", None),
        tile_record(lost, "B", 0.5), tile_record(lost, "L", 3.0), tile_record(lost, "L", None),
        tile_record(small, "S", 1e-3), {"op": "device"},
    ]  # fmt: skip
    assert tiles.winners(records) == [Tiles(*even), Tiles(*small)]
    scores = tiles.scores(records, 256)
    assert scores[Tiles(*even)] == pytest.approx((1.1 / 0.5 + 1) / 2)
    assert Tiles(*broken) not in scores
    assert Tiles(*lost) not in scores, "the last record of a case counts"
    source = Path(str(cls_relevance.__file__)).read_text()
    text = tiles.rewritten(source, Tiles(256, 2, 3, 4))
    changed = [(a, b) for a, b in zip(source.splitlines(), text.splitlines(), strict=True) if a != b]
    assert changed == [("    256: Tiles(256, 32, 8, 2),", "    256: Tiles(256, 2, 3, 4),")]
    with pytest.raises(ValueError, match="expected one row"):
        tiles.rewritten("nothing", Tiles(256, 2, 3, 4))
    with pytest.raises(ValueError, match="no tiles ran"):
        tiles.winners(records[-1:])
    copy = tmp_path / "kernel.py"
    copy.write_text(source)
    (tmp_path / "kernels.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    monkeypatch.setattr(cls_relevance, "__file__", str(copy))
    monkeypatch.setattr(sys, "argv", ["tiles", str(tmp_path), "--write"])
    tiles.main()
    assert "    256: Tiles(256, 64, 8, 2)," in copy.read_text()
    assert "    64: Tiles(64, 64, 4, 2)," in copy.read_text()


def test_the_sweep_tries_every_tile_and_restores_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = cls_relevance.ALL_KEYS[256], []

    def ours(*_: object) -> tuple[torch.Tensor, ...]:
        seen.append(cls_relevance.ALL_KEYS[256])
        if seen[-1].num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return (torch.full((8,), 2.0 if seen[-1].num_stages == 3 else 1.0),)

    def exact(*_: object) -> tuple[torch.Tensor, ...]:
        return (torch.ones(8),)

    work = kernels.Work(ours, exact, exact, (), (), torch.float32, 1, flops=8)
    meter = kernels.Meter(torch.device("cpu"), pretended_timer(*[1e-3] * 99), lambda _: 0, 1.0, 1.0, WHERE)
    monkeypatch.setattr(tiles, "build", lambda *_: work)
    monkeypatch.setattr(tiles, "cuda_meter", lambda: meter)
    monkeypatch.setattr(tiles, "set_backend", lambda _: "auto")
    found = list(tiles.sweep(block_keys=256))
    assert [tuple(r["tiles"]) for r in found] == 2 * [tuple(tile) for tile in tiles.candidates(256)]
    for record in found:
        _, _, warps, stages = record["tiles"]
        assert ("unavailable" in record) == (warps == 8)
        assert ("error" in record) == (stages == 3), "wrong outputs are not timed"
    assert cls_relevance.ALL_KEYS[256] == before == Tiles(*found[0]["now"])
    for keys in tiles.KEYS:
        assert cls_relevance.ALL_KEYS[keys] in tiles.candidates(keys), "the present tiles are among those that are swept"


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_for_gpu")
def test_loading_is_measured_without_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DEVICE", "cpu")
    monkeypatch.setattr(data, "BATCH", 4)
    monkeypatch.setattr(data, "images", lambda: generate(tmp_path / "images", 4))
    monkeypatch.setattr(
        data, "loading", lambda loader, share, folder: LoaderConfig(kind=loader, workers=0, report=folder / "bad.tsv")
    )
    record = data.run(what="decode", loader="torch")
    assert record["images_per_s"] > 0
    assert (record["provider"], record["files"], record["batch"]) == ("torch", 4, 4)
    assert record["mean_kb"] == pytest.approx(mean_kilobytes(tmp_path / "images"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(2 * GB), int(2 * GB)))
    with pytest.raises(Skipped, match=r"2\.0 GB are free"):
        data.run(what="train", loader="torch", arch="ViT-B/16")


def test_generated_photographs_have_the_size_of_imagenets(tmp_path: Path) -> None:
    assert mean_kilobytes(generate(tmp_path, 6)) == pytest.approx(110, rel=0.05)


RUN_TESTS = """
import json, sys
from bench.gpu import tests
tests.gpu_environment = dict
for file in sys.argv[1:]:
    print("\\n" + json.dumps(tests.run(file=file)))
"""
MARK = "pytest.mark.triton"
FILE = f"""
import pytest
pytestmark = {MARK}
def test_good(): ...
@pytest.mark.skip
def test_skipped(): ...
def test_bad(): assert {{good}}
"""


def test_a_file_of_tests_is_a_record(tmp_path: Path) -> None:
    files: list[tuple[str, str, dict[str, Any]]] = [
        ("test_green.py", FILE.format(good=True), {"passed": 2, "skipped": 1, "failed": 0}),
        ("test_red.py", FILE.format(good=False), {"passed": 1, "skipped": 1, "failed": 1, "error": "1 tests failed"}),
        ("test_other.py", "def test_other(): ...", {"passed": 0, "error": "no test ran"}),
        ("test_broken.py", "import nothing_such", {"failed": 1, "error": "1 tests failed"}),
    ]
    for name, text, _ in files:
        (tmp_path / name).write_text(text)
    words = [sys.executable, "-c", RUN_TESTS, *(str(tmp_path / name) for name, *_ in files)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"op"')]
    for record, (name, _, expected) in zip(records, files, strict=True):
        assert record["file"].endswith(name)
        assert expected.items() <= record.items()
        assert len(record["failed_tests"]) == record["failed"]
        assert ("error" in record) == ("error" in expected)


def test_files_of_tests_come_step_first_and_loader_last() -> None:
    found = tests.files()
    assert found[0] == "tests/test_step_on_gpu.py"
    assert found[-1] == "tests/test_loader_on_gpu.py"
    assert "tests/kernels/test_cls_relevance.py" in found


def test_the_tables_show_what_a_gpu_run_recorded() -> None:
    shared = {"gpu": "a GPU", "torch": "2.15", "commit": "abc", "arch": "ViT-B/16", "mode": "masked-object", "batch": 512}
    one = shared | {
        "op": "step",
        "provider": "ours-compiled",
        "precision": "bf16",
        "seconds_p50": 0.4,
        "images_per_second": 1280.0,
    }
    one |= {"forward_units": 7.5, "attention": {"cudnn": 71}, "measured_over_predicted": 1.1}
    one |= {"predicted": {"images_per_second": 1400.0, "floor_images_per_second": 2100.0}}
    small = shared | {"op": "step-small", "batch": 32, "compile": "reduce-overhead", "seconds_p50": 0.02, "host_seconds": 1e-4}
    small |= {"images_per_second": 1600.0, "attention": {"flash": 3, "cudnn": 1}, "compile_seconds": 33.0}
    heads = shared | {"op": "attention", "provider": "cudnn", "length": 197, "queries": 197, "attention": {"cudnn": 1}}
    heads |= {"forward_seconds": 1e-4, "backward_seconds": 3e-4, "forward_teraflops": 300.0, "backward_teraflops": 200.0}
    check = shared | {"op": "correctness", "mode": "object", "precision": "bf16", "provider": "eager", "loss_error": 1e-3}
    check |= {"loss_error_on_cpu": 2e-3, "gradient_error": 0.5, "gradient_error_on_cpu": 1e-2, "error": "wrong gradients"}
    failed = shared | {
        "op": "case",
        "case": "step authors",
        "part": "step",
        "result": "timed out",
        "error": "stopped after 9 s",
    }
    failed |= {"of": {"op": "step", "provider": "authors", "batch": 64, "arch": "ViT-B/16", "mode": "masked-object"}}
    passed = failed | {"result": "ok", "of": failed["of"] | {"provider": "ours-compiled"}}  # type: ignore[operator]
    records = tables.with_failures(
        [one, small, heads, heads | {"unavailable": "no", "provider": "flash"}, check, failed, passed]
    )
    assert [r["provider"] for r in records if r["op"] == "step"] == ["ours-compiled", "authors"]
    text = report.gpu_section(records)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert ["ViT-B/16", "masked-object", "512", "cudnn", "1280", "1400", "2100", "1.10"] in rows
    assert ["ViT-B/16", "32", "reduce-overhead", "20.00", "0.10", "1600", "cudnn and flash", "33"] in rows
    assert ["197", "197", "512", "cudnn", "cudnn", "100 (300 TFLOP/s)", "300 (200 TFLOP/s)"] in rows
    assert ["object", "bf16", "eager", "1.0e-03", "2.0e-03", "5.0e-01", "1.0e-02", "wrong"] in rows
    assert "| authors       | -         | 64    | timed out" in report.step_section(records)
    loading = shared | {"op": "data", "provider": "torch", "mode": "train", "hardware_share": 0.75, "images_per_s": 900.0}
    loading |= {"files": 512, "images": "generated JPEGs", "mean_kb": 112.6}
    section = report.data_section([loading])
    assert section.startswith("512 generated JPEGs of 113 KB, a GPU, torch 2.15")
    assert "| train ViT-B/16 | PyTorch | 512   | -" in section

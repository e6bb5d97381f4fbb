"""What `bench gpu` knows before it measures, memory and time of a step, and what it measures with: profiler and timer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import (
    cases,
    memory,
    prediction,
    profiler,
    timer,
)
from bench.step import race
from cammask_fast.config import TrainConfig

GB = 1e9


@pytest.mark.parametrize(
    ("provider", "arch", "batch", "counted"),
    [
        ("ours-compiled", "ViT-B/16", 64, 6.05),  # live storages of the generated code, torch 2.14
        ("ours-compiled", "ViT-B/16", 256, 18.95),
        ("ours-compiled", "ViT-B/16", 512, 36.14),
        ("ours-compiled", "ViT-B/32", 64, 2.90),
        ("ours-compiled", "ViT-B/32", 512, 10.69),
        ("ours-compiled", "ViT-L/14", 128, 36.44),  # continued from 4 and 8 layers: 5.74 and 11.88
        ("ours-eager", "ViT-B/16", 64, 6.11),  # bench.step.race.counted, eager in bf16
        ("ours-eager", "ViT-B/32", 64, 2.90),
        ("authors", "ViT-B/16", 64, 23.83),
        ("authors", "ViT-B/32", 64, 6.97),
        ("authors-bf16", "ViT-B/16", 64, 14.01),
        ("authors-bf16", "ViT-B/32", 8, 2.31),
    ],
)
def test_the_memory_model_gives_what_was_counted(provider: str, arch: str, batch: int, counted: float) -> None:
    assert memory.step_bytes(provider, arch, batch) / GB == pytest.approx(counted, rel=0.02)


def test_the_memory_model_is_the_count_of_a_model_it_was_not_fitted_to() -> None:
    for provider, tolerance in (("authors", 0.08), ("authors-bf16", 0.08)):
        one = race.Race(arch="tiny", config=TrainConfig(method="masked-object"), batch=64)
        counted = race.counted(one, provider)["peak_mb"] * 1e6
        assert memory.step_bytes(provider, "tiny", 64) == pytest.approx(counted, rel=tolerance)


def test_batches_that_cannot_fit_are_not_tried() -> None:
    batches = (512, 256, 128, 64)
    assert memory.fitting("ours-compiled", "ViT-B/16", batches, 79 * GB) == [512, 256, 128, 64]
    assert memory.fitting("ours-compiled", "ViT-L/14", batches, 79 * GB) == [256, 128, 64]
    assert memory.fitting("ours-compiled", "ViT-B/16", batches, 23 * GB) == [256, 128, 64]
    assert memory.fitting("authors", "ViT-B/16", batches, 139 * GB) == [256, 128, 64]
    assert memory.fitting("authors", "ViT-L/14", batches, 79 * GB) == []
    least = {case.name: case.memory for case in cases.step_cases()}
    assert least["step authors ViT-L/14 masked-object"] > 79 * GB, "skipped by the runner, before a process is started"


def test_the_prediction_is_the_estimate_of_the_counted_work() -> None:
    h200 = {"matrix_rate": 790e12, "copy_rate": 4.3e12}
    found = prediction.predict("ViT-B/16", "masked-object", 512, **h200)
    assert found is not None
    assert found.products + found.attention == pytest.approx(0.1718, rel=2e-3), "135.75 TFLOP"
    assert found.traffic == pytest.approx(289.3e9 / 4.3e12, rel=1e-3)
    assert found.floor == pytest.approx(found.products + found.attention + found.traffic)
    assert 0.335 < found.seconds < 0.375
    fields = found.fields(512)
    assert fields["images_per_second"] == pytest.approx(512 / found.seconds)
    assert fields["floor_images_per_second"] == pytest.approx(512 / found.floor)
    assert fields["provenance"] == "counted from generated code, torch 2.14"
    assert prediction.predict("ViT-B/16", "masked-random", 512, **h200) is None


@pytest.mark.parametrize("arch", ["ViT-B/32", pytest.param("ViT-B/16", marks=pytest.mark.slow)])
def test_the_counted_work_is_that_of_the_eager_step(arch: str) -> None:
    """Two counts that share nothing: of the generated code at a large batch, and of operators here."""
    config = TrainConfig(method="masked-object", precision="bf16")
    flops = race.counted(race.Race(arch=arch, config=config, batch=2), "ours-eager")["flops"] / 2
    work = prediction.COUNTED[arch, "masked-object"]
    assert work.products + work.attention == pytest.approx(flops, rel=0.01)


def test_the_backend_of_attention_is_read_off_a_profile() -> None:
    q = torch.randn(2, 2, 9, 8, requires_grad=True)
    assert profiler.attention_calls(profiler.profiled(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())) == {
        "flash": 2
    }
    assert profiler.attention_of(lambda: q + 1) == {"attention": {}}
    names = [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3x64x128x64_4x1x1_kernel0_0",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64> >",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>)",
        "triton_red_fused_native_layer_norm_12", "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNN", "_cls_relevance_fwd_kernel",
        "Memcpy DtoD (Device -> Device)", "void at::native::vectorized_elementwise_kernel<4>",
    ]  # fmt: skip
    assert [profiler.class_of(name) for name in names] == [
        *["attention"] * 3, "compiler's Triton kernels", "matrix products", "own kernels", "copies and fills of memory",
        "other",
    ]  # fmt: skip
    kernels = tuple(profiler.Kernel(name, 11, 0.5) for name in names)
    replayed = profiler.Profile(kernels, Counter())
    assert profiler.attention_calls(replayed) == {"cudnn": 11, "flash": 11, "efficient": 11}
    assert replayed.seconds == 4.0
    assert profiler.summary(kernels)["attention"] == {"seconds": 1.5, "launches": 33}
    assert profiler.top(kernels, 1) == [{"kernel": names[0], "class": "attention", "launches": 11, "seconds": 0.5}]
    by_operator = profiler.Profile((), Counter({
        "aten::_scaled_dot_product_cudnn_attention": 36, "aten::_scaled_dot_product_cudnn_attention_backward": 35,
        "aten::_scaled_dot_product_attention_math": 1, "aten::scaled_dot_product_attention": 36,
    }))  # fmt: skip
    assert profiler.attention_calls(by_operator) == {"cudnn": 71, "math": 1}


class PretendedCuda:
    """A device whose time passes by what runs on it, an overwriting kernel included; captures are replayed call by call."""

    def __init__(self, *, can_capture: bool):
        self.now, self.can_capture, self.overwritten = 0.0, can_capture, 0
        self.captured: list[Callable[[], None]] | None = None

    def spend(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            if self.captured is None:
                self.now += seconds
            else:
                self.captured.append(run)

        return run

    def install(self, monkeypatch: pytest.MonkeyPatch) -> timer.CudaTimer:
        device, nothing = self, SimpleNamespace(wait_stream=lambda _: None)

        class Event:
            def __init__(self, **_: object):
                self.at = 0.0

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Graph:
            calls: list[Callable[[], None]]

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Capture:
            def __init__(self, graph: Graph, **_: object):
                self.graph = graph

            def __enter__(self) -> None:
                if not device.can_capture:
                    raise RuntimeError("operation not permitted when stream is capturing")
                device.captured = self.graph.calls = []

            def __exit__(self, *_: object) -> None:
                device.captured = None

        class Stream:
            def __init__(self, *_: object): ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...
            def wait_stream(self, _: object) -> None: ...

        fakes: dict[str, Any] = {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "stream": Stream}
        fakes |= {"current_stream": lambda: nothing, "synchronize": lambda: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        made = object.__new__(timer.CudaTimer)
        made.budget, made.stream = 0.4, Stream()  # type: ignore[assignment]
        overwrite = self.spend(1e-4)

        def counted() -> None:
            self.overwritten += 1
            overwrite()

        monkeypatch.setattr(made, "overwrite", counted)
        return made


def test_a_call_is_timed_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PretendedCuda(can_capture=True)
    found = cuda.install(monkeypatch)(cuda.spend(2e-4))
    assert found.seconds == pytest.approx((2e-4, 2e-4, 2e-4)), "without the overwriting kernels"
    assert (found.how, found.calls) == (timer.IN_GRAPH, 10)
    assert found.fields()["timing"] == timer.IN_GRAPH
    assert cuda.overwritten >= 2 * found.calls, "before every call of both graphs"


def test_a_call_that_cannot_be_captured_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PretendedCuda(can_capture=False)
    moments = iter([0.0, 1e-3])
    measure = cuda.install(monkeypatch)
    measure.clock = lambda: next(moments)
    found = measure(cuda.spend(1e-2))
    assert found.seconds == pytest.approx((1e-2, 1e-2, 1e-2))
    assert (found.how, found.calls) == (timer.QUEUED, 1)
    repeats, before = 39, 9
    assert cuda.overwritten == before + 20 * repeats, "1 ms of launches behind 2 ms of overwriting kernels"

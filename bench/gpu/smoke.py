"""What to know first about a card: its rates, and whether a step of every group of methods is right on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.step import rates
from bench.records import gpu_environment
from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.masking import MaskRandomness
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.precision import set_matmul_precision
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness

VIT = ViTConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2, output_dim=32)
CLASSES, BATCH, STEPS = 10, 8, 5
AWAY = 0.3
"""Of a parameter's deviation, by which the student's differ from the teacher's: so far that bf16 resolves what is distilled."""
GROUPS: dict[str, dict[str, Any]] = {
    "object": {"method": "masked-object"},
    "top-k": {"method": "masked-topk"},
    "context": {"masking": "CtxMaskMultiFill(0.3)"},
    "random": {"masking": "RandMaskNoFill(0.75)"},
    "distillation": {"method": "ft-kd"},
    "fine-tuning": {"method": "ft"},
}
COMPILED_GROUPS = ("object", "top-k")
FACTOR, TINY = 2.0, torch.finfo(torch.float32).eps
"""The error rule: at most FACTOR times the error of PyTorch on a CPU in the same type, plus TINY."""


class Course(NamedTuple):
    """What a few optimiser steps leave behind, in float64 on the CPU: losses (STEPS, 3), and the first moments of all
    parameters, which are sums of the clipped gradients."""

    losses: Tensor
    moments: Tensor


def course(config: TrainConfig, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compiled: bool = False) -> Course:
    """Train a small model on seeded batches and draws, the same wherever they run.

    Args:
        config: settings of the method.
        device: of the model.
        dtype: of the master weights.
        compiled: use the compiled step.

    Returns:
        Losses of all steps and the optimiser's first moments after the last.
    """
    torch.manual_seed(0)
    teacher = Classifier(VisionTransformer(VIT), torch.randn(CLASSES, VIT.output_dim))
    student = teacher.frozen_copy().train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(AWAY * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    state = TrainState.create(student.to(device, dtype), config, steps_per_epoch=STEPS, compiled=compiled)
    step, strategy = build_train_step(state, teacher.to(device, dtype).frozen_copy(), config), build_strategy(config)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        images = torch.randint(0, 256, (BATCH, 64, 64, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        data = Batch(images, labels, torch.arange(BATCH))
        draws = sample_step_randomness(strategy, data, VIT.patches, generator)
        parts = [(data.to(device), _to(draws, device))]
        losses.append(torch.stack([part.detach().cpu().double() for part in step(parts)[:3]]))
    moments = [value.detach().flatten() for name, value in state.moments().items() if name.startswith("exp_avg.")]
    return Course(torch.stack(losses), torch.cat(moments).cpu().double())


def _to(draws: MaskRandomness | None, device: str) -> MaskRandomness | None:
    if draws is None:
        return None
    uniform, donors, kept = (None if t is None else t.to(device) for t in (draws.uniform, draws.donors, draws.kept_tokens))
    return MaskRandomness(uniform, donors, kept)


def errors(found: Course, gold: Course) -> tuple[float, float]:
    """Of the losses, the largest, and of the moments, the norm; both relative."""
    losses = ((found.losses - gold.losses).abs().amax() / gold.losses.abs().amax()).item()
    return losses, ((found.moments - gold.moments).norm() / gold.moments.norm()).item()


def correctness(*, group: str, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """A record per precision, eager and for COMPILED_GROUPS compiled: the errors of STEPS steps on the device against float64
    on the CPU, and those of the same steps on the CPU in the same precision. `error` says where the rule is broken."""
    config = TrainConfig(epochs=1, precision="fp32", **GROUPS[group])
    environment = gpu_environment() if device == "cuda" else {}
    set_matmul_precision("fp32")
    gold = course(config, dtype=torch.float64)
    for precision in ("fp32", "bf16"):
        config = replace(config, precision=precision)
        allowed = errors(course(config), gold)
        for compiled in (False, True) if group in COMPILED_GROUPS else (False,):
            torch._dynamo.reset()
            found = errors(course(config, device=device, compiled=compiled), gold)
            record: dict[str, Any] = {
                "op": "correctness", "mode": group, "precision": precision, "provider": "compiled" if compiled else "eager",
                "loss_error": found[0], "loss_error_on_cpu": allowed[0], "gradient_error": found[1],
                "gradient_error_on_cpu": allowed[1], "rule": f"at most {FACTOR:g} times the CPU's + {TINY:.1e}",
            }  # fmt: skip
            yield record | broken(found, allowed) | environment


def broken(found: Sequence[float], allowed: Sequence[float]) -> dict[str, str]:
    """The field `error` where the rule does not hold; NaN breaks it."""
    for name, error, limit in zip(("losses", "gradients"), found, allowed, strict=True):
        if not error <= FACTOR * limit + TINY:
            return {"error": f"wrong {name}: error {error:.1e} against float64, PyTorch on the CPU has {limit:.1e}"}
    return {}


def device() -> dict[str, Any]:
    """What the card is and how fast it copies and multiplies."""
    properties = torch.cuda.get_device_properties()
    record: dict[str, Any] = {
        "op": "device", "provider": "torch", "memory_gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 1e6, "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }  # fmt: skip
    for precision in ("fp32", "tf32", "bf16"):
        set_matmul_precision(precision)
        product, copy = rates(precision)
        record |= {f"{precision}_matmul_teraflops": product / 1e12, "copy_gigabytes_per_second": copy / 1e9}
    return record | gpu_environment()

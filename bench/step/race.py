"""One optimiser step, ours against the authors' algorithm: seconds, counted work and counted memory in one run.

Providers: `authors` (float32, materialised attention, torch's default AdamW), `authors-fused-adamw` (the same with the fused
optimiser, so that the gain is not the optimiser's), `ours-eager`. Losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from bench.step.authors import build_authors_step, forward
from bench.step.memory import LiveStorages
from cammask_fast.config import TrainConfig
from cammask_fast.data.batch import Batch
from cammask_fast.masking import Draws
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.optim import build_optimizer
from cammask_fast.step import Losses, build_step, build_strategy, draw_for_step

ARCHS = {
    "tiny": ViTConfig(image_size=48, patch_size=8, width=96, layers=4, heads=3, output_dim=64),
    "ViT-B/32": ViTConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, output_dim=512),
    "ViT-B/16": ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512),
    "ViT-L/14": ViTConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, output_dim=768),
}
CLASSES = 1000
PROVIDERS = ("authors", "authors-fused-adamw", "ours-eager")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
"""Relative, in float32: sums over twelve layers in different orders. Masks that differ in one patch exceed both by far."""

Step = Callable[[Batch, Draws | None], Losses]


def models(vit: ViTConfig) -> tuple[Classifier, Classifier]:
    """A student a little away from its teacher, with random weights."""
    torch.manual_seed(0)
    teacher = Classifier(VisionTransformer(vit), torch.randn(CLASSES, vit.output_dim))
    student = teacher.frozen_copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    return student.requires_grad_(True), teacher.requires_grad_(False).eval()


def random_batch(vit: ViTConfig, count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, vit.image_size, vit.image_size, 3), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.randint(0, CLASSES, (count,), generator=generator), torch.arange(count))


def build(provider: str, student: Classifier, teacher: Classifier, config: TrainConfig) -> Step:
    return build_step(student, teacher, config) if provider.startswith("ours") else build_authors_step(student, teacher, config)


def compare(vit: ViTConfig, config: TrainConfig, count: int) -> None:
    """Raise ValueError unless every provider gives the same losses and gradients (hence the same masks)."""
    student, teacher = models(vit)
    data = random_batch(vit, count)
    draws = draw_for_step(build_strategy(config), data, vit.patches, torch.Generator().manual_seed(2))
    losses, gradients = {}, {}
    for provider in ("authors", "ours-eager"):
        student.zero_grad()
        losses[provider] = build(provider, student, teacher, config)(data, draws).total.item()
        gradients[provider] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}
    reference, ours = gradients["authors"], gradients["ours-eager"]
    norm = torch.stack([g.norm() for g in reference.values()]).norm()
    worst = max(reference, key=lambda name: ((ours[name] - reference[name]).norm() / norm).item())
    error = ((ours[worst] - reference[worst]).norm() / norm).item()
    apart = abs(losses["ours-eager"] / losses["authors"] - 1)
    if not (apart <= LOSS_TOLERANCE and error <= GRADIENT_TOLERANCE):
        raise ValueError(f"the providers disagree: loss by {apart:.1e}, gradient of {worst} by {error:.1e} of the global norm")


def optimiser_step(provider: str, vit: ViTConfig, config: TrainConfig, data: Batch) -> Callable[[], None]:
    """A closure that draws, steps, clips and updates."""
    student, teacher = models(vit)
    step, strategy, generator = (
        build(provider, student, teacher, config),
        build_strategy(config),
        torch.Generator().manual_seed(2),
    )
    if provider == "authors":
        c = config.optim
        optimizer = AdamW(student.parameters(), lr=c.lr, betas=(0.9, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
    else:
        optimizer = build_optimizer(student.parameters(), config.optim)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(data, draw_for_step(strategy, data, vit.patches, generator))
        clip_grad_norm_(student.parameters(), config.optim.clip_norm)
        optimizer.step()

    return run


def counted(provider: str, vit: ViTConfig, config: TrainConfig, count: int) -> dict[str, float]:
    """Forward units and megabytes of activations of one step (live storages beyond weights, gradients and the batch)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = Classifier(VisionTransformer(vit), torch.zeros(CLASSES, vit.output_dim))
        teacher = student.frozen_copy()
        data = Batch(
            torch.zeros(count, vit.image_size, vit.image_size, 3, dtype=torch.uint8),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
        )
        draws = draw_for_step(build_strategy(config), data, vit.patches, torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as unit, torch.no_grad():
            forward(student, torch.zeros(count, 3, vit.image_size, vit.image_size))
        step = build(provider, student, teacher, config)
        with FlopCounterMode(display=False) as flops:
            step(data, draws)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        owned = [
            *student.parameters(),
            *teacher.parameters(),
            *(p.grad for p in student.parameters() if p.grad is not None),
            *data,
        ]
        with LiveStorages(owned) as memory:
            step(data, draws)
    return {"forward_units": flops.get_total_flops() / unit.get_total_flops(), "activation_mb": memory.peak / 1e6}


def race(
    arch: str, mode: str, count: int, *, masking: str = "", repeats: int = 7, providers: Sequence[str] = PROVIDERS
) -> list[dict[str, Any]]:
    """Records of every provider, timed in turn in the same run. Raises ValueError where the providers disagree."""
    vit, config = ARCHS[arch], TrainConfig(method=mode, masking=masking)
    compare(vit, config, count)
    data = random_batch(vit, count)
    runs = {provider: optimiser_step(provider, vit, config, data) for provider in providers}
    seconds: dict[str, list[float]] = {provider: [] for provider in providers}
    for repeat in range(repeats + 1):
        for provider, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[provider].append(time.perf_counter() - started)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    records = []
    for provider, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=5)[0], statistics.median(times), statistics.quantiles(times, n=5)[3]
        records.append(
            {
                "op": "step", "provider": provider, "arch": arch, "mode": mode, "masking": config.resolved.masking,
                "batch": count, "precision": "fp32", "seconds_p20": low, "seconds_p50": middle, "seconds_p80": high,
                "images_per_second": count / middle, **counted(provider, vit, config, count),
                "device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit.stdout.strip(),
            }
        )  # fmt: skip
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds, ratio to `authors`, counted work and memory."""
    base = next(r for r in records if r["provider"] == "authors")
    lines = [
        "| provider | s per step (p50) | speed-up | forward units | activations, MB |",
        "|---|---|---|---|---|",
    ]
    for r in records:
        ratio = base["seconds_p50"] / r["seconds_p50"]
        units, megabytes = r["forward_units"], r["activation_mb"]
        lines.append(f"| {r['provider']} | {r['seconds_p50']:.3f} | {ratio:.2f}x | {units:.2f} | {megabytes:.0f} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=ARCHS, default="ViT-B/32")
    parser.add_argument("--mode", default="masked-object", help="a training method, as `cammask train --method`")
    parser.add_argument("--masking", default="", help="a strategy other than the method's, as `cammask train --masking`")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON line per record")
    parser.add_argument("--out", type=Path, help="append the records to this file too")


def main(options: argparse.Namespace) -> int:
    if options.batch < 2 or options.repeats < 5:
        raise ValueError("--batch: at least 2 images (a fill needs a donor); --repeats: at least 5")
    records = race(options.arch, options.mode, options.batch, masking=options.masking, repeats=options.repeats)
    lines = [json.dumps(record) for record in records]
    print("\n".join(lines) if options.json else table(records))
    if options.out is not None:
        with options.out.open("a") as file:
            file.write("\n".join(lines) + "\n")
    return 0

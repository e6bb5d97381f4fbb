"""What data-parallel training costs on many GPUs: a model out of counted work and the makers' bandwidths, nothing measured.

step      = flops per GPU / (peak * share of the peak)
all-reduce = 2 (n - 1) / n * bytes / bandwidth of the slowest link, inside a node first and between nodes then
overlap   = all buckets but the last travel while the masked images' backward pass (2 of its forward units) computes
efficiency = step / (step + what of the all-reduce sticks out)
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from bench.step.race import CLASSES, Race, counted
from cammask_fast.config import TrainConfig
from cammask_fast.distributed import BUCKET_BYTES
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.viz.tables import markdown_table

ARCHS = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
GPUS = (8, 64, 512)
GLOBAL_BATCH = 512
OWN_BATCH = 64
NODE = 8
PEAK = 989e12
"""bf16 FLOP/s of an H100 or H200 SXM without sparsity (data sheet)."""
SHARE = 0.4
"""Of the peak that a step is taken to reach."""
NVLINK = 450e9
"""Bytes/s of one GPU in one direction (data sheet)."""
INFINIBAND = 50e9
"""Bytes/s of one GPU's 400 Gbit/s adapter (data sheet)."""
REACHED = 0.8
"""Of a link's bandwidth that a large all-reduce is taken to reach."""
BACKWARD_UNITS = 2.0
"""Of the masked images' pass, under which gradients travel."""


class Work(NamedTuple):
    """Of one image: FLOPs of a step and forward units. parameters: of the student, all in float32."""

    flops: float
    units: float
    parameters: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options; `bench report` writes the tables into docs/resume-and-scaling.md."""


def main(options: argparse.Namespace) -> int:
    print(tables())
    return 0


def work_of(arch: str) -> Work:
    """Counted with fake tensors, two images per step."""
    race = Race(arch=arch, config=TrainConfig(method="masked-object", batch_size=2), batch=2)
    found = counted(race, "ours-eager")
    with torch.device("meta"):
        student = Classifier(VisionTransformer(race.vit), torch.zeros(CLASSES, race.vit.output_dim))
    return Work(found["flops"] / 2, found["forward_units"], sum(p.numel() for p in student.parameters()))


def seconds(work: Work, gpus: int, batch: int) -> tuple[float, float, float]:
    """Model a training step on several GPUs.

    Args:
        work: FLOPs and parameters of a model.
        gpus: their number.
        batch: images per GPU.

    Returns:
        Seconds of computation, of the all-reduce, and of that part of the all-reduce that is not hidden by computation.
    """
    step = batch * work.flops / (PEAK * SHARE)
    size = 4 * work.parameters
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)

    def reduce(size: float) -> float:
        """Hierarchical: over NVLink inside a node, each GPU's share over its own adapter between nodes."""
        time = 2 * (inside - 1) / inside * size / (NVLINK * REACHED)
        return time + 2 * (nodes - 1) / nodes * size / inside / (INFINIBAND * REACHED)

    whole, last = reduce(size), reduce(min(size, BUCKET_BYTES))
    hidden = step * BACKWARD_UNITS / work.units
    return step, whole, max(last, whole - hidden)


def tables() -> str:
    """The model for a global batch that stays and for one that grows with the GPUs."""
    works = {arch: work_of(arch) for arch in ARCHS}
    header = ["", "GPUs", "images per GPU", "gradients, MB", "step, ms", "all-reduce, ms", "of it exposed, ms", "efficiency"]
    sections = []
    for title, batch_of in (
        (f"Global batch {GLOBAL_BATCH}, as in the paper", lambda gpus: GLOBAL_BATCH // gpus),
        (f"{OWN_BATCH} images per GPU", lambda gpus: OWN_BATCH),
    ):
        rows = []
        for arch, work in works.items():
            for gpus in GPUS:
                step, whole, exposed = seconds(work, gpus, batch_of(gpus))
                times = [f"{1000 * time:.2f}" for time in (step, whole, exposed)]
                size = f"{4 * work.parameters / 1e6:.0f}"
                rows.append([arch, str(gpus), str(batch_of(gpus)), size, *times, f"{step / (step + exposed):.0%}"])
        sections.append(f"{title}:\n\n{markdown_table(header, rows)}")
    return "\n\n".join(sections)

"""The CUDA code of the whole compiled step, generated and counted on a machine without a GPU: `cammask bench step --static`.

trace.py makes the step's ATen graph for CUDA tensors that hold no data; generate.py lets Inductor write the code for it, as if
pretended_gpu.py's H100 were there; replay.py runs the generated wrapper on meta tensors and logs every launch; compiled.py
gives its Triton kernels to ptxas; command.py makes a record and the tables. What needs a card's speed is a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.step.race import ARCHS, Race
from cammask_fast.config import TrainConfig

SUPPORTED = (2, 14)
"""The PyTorch that this package knows: it relies on private parts of Inductor, which move between releases."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step to generate. layers: of the arch's blocks, None for all; the first and the last block differ from the others."""

    arch: str = "ViT-B/16"
    config: TrainConfig = field(default_factory=TrainConfig)
    batch: int = 256
    layers: int | None = None

    @property
    def race(self) -> Race:
        return Race(arch=self.arch, config=self.config, batch=self.batch, device="cuda")

    @property
    def depth(self) -> int:
        return self.layers or ARCHS[self.arch].layers


def unsupported(version: str = torch.__version__) -> str | None:
    """Why the code cannot be generated with this PyTorch; None if it can."""
    if tuple(int(part) for part in version.split(".")[:2]) == SUPPORTED:
        return None
    known = ".".join(map(str, SUPPORTED))
    return f"step --static: knows the Inductor of torch {known}, found {version}: pip install 'torch=={known}.*'"

"""How much memory a step takes, before it runs: which batches can fit a card.

    bytes(batch) = parameters * per_parameter + batch * layers * (tokens * width * per_channel + heads * tokens^2 * per_score)

per_parameter: weights, gradients, both moments, the teacher and the copies in the type of the products. per_channel: what the
backward pass reads, per token, channel and layer. per_score: attention probabilities that are kept, as the authors' algorithm
does. `COSTS` holds the three numbers, in bytes, solved from counts at two sizes each: for the compiled step from the buffers of
the code that Inductor generates for sm_90 (torch 2.14, live storages of the generated wrapper), for the eager ones from live
storages (`bench.step.race.counted`). The tests hold the formula against those counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.step.race import ARCHS, trained_bytes

CONTEXT = 1.2e9
"""Bytes of CUDA's context, loaded kernels and libraries' workspaces, about."""
SLACK = 1.08
"""The allocator rounds and leaves gaps."""


class Cost(NamedTuple):
    """Bytes, as in the formula."""

    per_parameter: float
    per_channel: float
    per_score: float = 0.0


COMPILED, EAGER, AUTHORS, AUTHORS_IN_BF16 = Cost(20.2, 37.0), Cost(20.1, 37.9), Cost(20.1, 169.3, 6.75), Cost(22.1, 95.9, 2.65)
COSTS = {
    "ours-compiled": COMPILED,
    "ours-eager": EAGER,
    "authors": AUTHORS,
    "authors-fused-adamw": AUTHORS,
    "authors-compiled": AUTHORS_IN_BF16,  # at most: the compiler keeps less than autograd
    "authors-bf16": AUTHORS_IN_BF16,
}
EAGER_IN_FLOAT32 = Cost(20.1, 2 * 37.9, 6.75)
"""Of our eager step with one identity switched off, at most: some keep the probabilities."""


def step_bytes(provider: str, arch: str, batch: int) -> float:
    """Bytes that a training step holds at its peak, without CUDA's own.

    The clean pass, over all tokens, decides: a method whose masked pass drops some needs as much (B/16 at 256 images by count:
    18.95 GB with all, 19.45 GB with half of them).

    Args:
        provider: of the step.
        arch: key of `ARCHS`.
        batch: images.

    Returns:
        Bytes.
    """
    vit, cost = ARCHS[arch], COSTS.get(provider, EAGER_IN_FLOAT32)
    tokens = vit.patches + 1
    per_image = vit.layers * (tokens * vit.width * cost.per_channel + vit.heads * tokens**2 * cost.per_score)
    return trained_bytes(vit) / 4 * cost.per_parameter + batch * per_image


def needed(provider: str, arch: str, batch: int) -> float:
    """Bytes that must be free on the card before a training step is started.

    Args:
        provider: of the step.
        arch: key of `ARCHS`.
        batch: images.

    Returns:
        Bytes.
    """
    return SLACK * step_bytes(provider, arch, batch) + CONTEXT


def fitting(provider: str, arch: str, batches: Sequence[int], free: float) -> list[int]:
    """The batches that a card can hold.

    Args:
        provider: of the step.
        arch: key of `ARCHS`.
        batches: numbers of images.
        free: bytes on the card.

    Returns:
        Those that fit, in their order.
    """
    return [batch for batch in batches if needed(provider, arch, batch) <= free]

"""The one place where masking draws random numbers. They are inputs of selection and fill, so results can be reproduced."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.strategy import Strategy


class MaskRandomness(NamedTuple):
    """uniform: float32 (N, P) in [0, 1), for random masks. donors: int64 (N,) for single-fill, (N, P) for multi-fill.
    kept_tokens: int64 (N, n_keep + 1), CLS (0) first, then patch + 1 ascending, for random no-fill.
    pool: the images (M, …) that donors refer to, of which first..first + N - 1 are the batch; without it they are the batch.
    first: int64 (), on the device: as a Python number it would be another graph for every micro-batch of a compiled step.
    None where the strategy does not use it."""

    uniform: Tensor | None = None
    donors: Tensor | None = None
    kept_tokens: Tensor | None = None
    pool: Tensor | None = None
    first: Tensor | None = None

    def part(self, first: int, count: int, pool: Tensor) -> MaskRandomness:
        """The draws of some of the images.

        Args:
            first: index of the first image.
            count: number of images.
            pool: the whole batch that was drawn for, from which donors come.

        Returns:
            The draws of the images first..first + count - 1.
        """
        uniform, donors, kept = (
            None if t is None else t[first : first + count] for t in (self.uniform, self.donors, self.kept_tokens)
        )
        if donors is None:
            return MaskRandomness(uniform, donors, kept)
        return MaskRandomness(uniform, donors, kept, pool, torch.full((), first, dtype=torch.int64, device=donors.device))


def sample_mask_randomness(strategy: Strategy, *, count: int, patches: int, generator: torch.Generator) -> MaskRandomness:
    """Draw the random numbers of a batch, on the generator's device.

    Single-fill: donors are a random permutation of the batch, as in the paper; a fixed point (one per batch on average)
    leaves its image unmasked. Multi-fill: donor = (n + shift) mod N with shift in 1..N-1, never the image itself.
    Order and shapes of the draws are the authors', so the same CPU seed gives their masks (random no-fill excepted).

    Args:
        strategy: decides what is drawn.
        count: images, N.
        patches: patches per image, P.
        generator: advances.

    Returns:
        What the strategy needs; the rest is None.

    Raises:
        ValueError: a donor is needed and the batch has one image.
    """
    device = generator.device
    if strategy.fill != "none" and count < 2:
        raise ValueError(f"{strategy.fill}-fill takes patches from other images: the batch needs at least 2, got {count}")
    uniform = donors = kept = None
    if strategy.selection == "random":
        uniform = torch.rand(count, patches, generator=generator, device=device)
        if strategy.fill == "none":
            kept = uniform.argsort(1)[:, : strategy.keep_count(patches)].sort(1).values
            kept = F.pad(kept + 1, (1, 0))
            uniform = None
    if strategy.fill == "single":
        donors = torch.randperm(count, generator=generator, device=device)
    elif strategy.fill == "multi":
        shift = torch.randint(1, count, (count, patches), generator=generator, device=device)
        donors = (torch.arange(count, device=device)[:, None] + shift) % count
    return MaskRandomness(uniform, donors, kept)

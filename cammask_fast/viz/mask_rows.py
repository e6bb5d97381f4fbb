"""What `cammask mask` finds out about a photograph and a prompt: map, masks, counterfactuals, where these come from, scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast.data.transforms import centre_window
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import MaskRandomness, Strategy
from cammask_fast.masking.object_patches import Box, component_boxes, object_patches
from cammask_fast.strategy import Cut, shown_strategies
from cammask_fast.viz.look import Look
from cammask_fast.viz.mask_images import Photograph, filled, other_donors
from cammask_fast.viz.plots import GalleryRow

CELL_PIXELS = 264
"""Least side of a picture on a sheet, which shows the photograph and not the few pixels that the model sees."""


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How maps and masks are made."""

    masking: str = ""
    """One strategy under the paper's name; empty: object and context with the paper's single-fill."""
    threshold: str = ""
    """See `shown_strategies`."""
    cam: str = "mm-cam"
    cam_start_layer: int = 0
    cam_contrast: str = "none"
    seed: int = 0
    """Of donors and random masks."""
    pixels: bool = False
    """Also make the counterfactuals of what the model sees."""
    scores: bool = False
    """Also measure each map by insertion and deletion."""

    @property
    def strategies(self) -> tuple[list[Strategy], Cut | None]:
        """The strategies, and what cuts the map before them."""
        return shown_strategies(self.masking, self.threshold)


class Masked(NamedTuple):
    """What a strategy does to one photograph."""

    mask: Tensor
    """bool (G, G), True = masked."""
    donors: Tensor
    """int64 (G, G), the place in the pool of the image that fills a patch, -1 where nothing does."""
    shown: Tensor
    """uint8 (D, D, 3), the counterfactual for the eye."""
    seen: Tensor | None
    """uint8 (S, S, 3), the counterfactual as the model sees it; None unless it was asked for."""
    boxes: list[Box]
    """Of the mask's components."""

    @property
    def note(self) -> str:
        """How many patches are masked."""
        return f"{int(self.mask.sum())} of {self.mask.numel()} patches masked"


@dataclass(frozen=True, kw_only=True)
class MaskRow:
    """One photograph and one prompt."""

    photograph: Photograph
    prompt: str
    probability: float | None
    """Of the prompt among all of the model's; None where it is the only one."""
    relevance: Tensor
    """float32 (G, G), not normalised."""
    masked: dict[str, Masked]
    """By the title of the strategy."""
    scores: tuple[float, float] | None = None
    """Areas under insertion and deletion, where they were asked for."""

    @property
    def title(self) -> str:
        """Photograph and prompt."""
        return f"{self.photograph.path.name}\n{self.prompt}"

    def drawn(self, *, boxes: bool) -> GalleryRow:
        """The row of a sheet. boxes: draw those of the masks' components."""
        notes = {title: one.note for title, one in self.masked.items()}
        if self.probability is not None:
            notes[""] = f"probability {self.probability:.2f}"
        if self.scores is not None:
            notes["CAM"] = f"insertion {self.scores[0]:.2f}, deletion {self.scores[1]:.2f}"
        return GalleryRow(
            self.title,
            self.photograph.shown,
            normalise_relevance(self.relevance.flatten()[None]).view_as(self.relevance),
            {title: (one.mask, one.shown) for title, one in self.masked.items()},
            notes,
            {title: [tuple(box[:4]) for box in one.boxes] for title, one in self.masked.items()} if boxes else {},
        )

    def as_json(self) -> dict[str, Any]:
        """The numbers of the row. Boxes are left, top, right and bottom in pixels of the photograph; the peak is the column and
        the row of the map's highest patch."""
        grid, one = len(self.relevance), self.photograph
        window = centre_window(one.width, one.height, one.seen.shape[0])
        masks = {
            title: {
                "masked": int(made.mask.sum()),
                "patches": made.mask.numel(),
                "boxes": [list(box.in_window(window, grid)) for box in made.boxes],
            }
            for title, made in self.masked.items()
        }
        row, column = divmod(int(self.relevance.argmax()), grid)
        scores = {} if self.scores is None else {"insertion": self.scores[0], "deletion": self.scores[1]}
        return {
            "image": str(one.path), "prompt": self.prompt, "probability": self.probability, **scores, "grid": grid,
            "peak": [column, row], "masks": masks,
        }  # fmt: skip


def shown_size(grid: int) -> int:
    """Pixels per side of a picture on a sheet: a multiple of the grid."""
    return grid * -(-CELL_PIXELS // grid)


class Pool(NamedTuple):
    """Photographs to mask, and what they are filled from."""

    images: Sequence[Photograph]
    """The photographs, then others."""
    masked: int
    """How many of the images are masked."""
    given: int = 0
    """How many of the last images fill alone; 0: all of them do."""


def rows_of(look: Look, pool: Pool, settings: MaskSettings) -> Iterator[MaskRow]:
    """The rows of some photographs, prompt by prompt.

    Args:
        look: the model and its rows.
        pool: the photographs, 1 or more.
        settings: how maps and masks are made.

    Yields:
        A row per photograph and prompt.

    Raises:
        ValueError: the map is not finite.
    """
    photographs, grid = pool.images[: pool.masked], look.model.visual.config.grid
    seen = torch.stack([one.seen for one in photographs])
    logits = look.logits(seen)
    probabilities = logits.softmax(1)
    strategies, cut = settings.strategies
    for row in look.rows:
        labels = logits.argmax(1) if row is None else torch.full((len(seen),), row)
        relevance = look.maps(seen, labels, settings.cam, settings.cam_start_layer, settings.cam_contrast)
        if not relevance.isfinite().all():
            raise ValueError(f"the CAM of {photographs[0].path.name!r} is not finite: the weights are damaged")
        selected = relevance if cut is None else object_patches(relevance, cut).float()
        masked = {title_of(strategy, cut): _masked(strategy, selected, pool, grid, settings) for strategy in strategies}
        scores = look.scores(seen, labels, relevance).tolist() if settings.scores else None
        for i, one in enumerate(photographs):
            label = int(labels[i])
            yield MaskRow(
                photograph=one,
                prompt=look.names[label],
                probability=float(probabilities[i, label]) if len(look.names) > 1 else None,
                relevance=relevance[i].view(grid, grid),
                masked={title: found[i] for title, found in masked.items()},
                scores=None if scores is None else (scores[i][0], scores[i][1]),
            )


def _masked(strategy: Strategy, relevance: Tensor, pool: Pool, grid: int, settings: MaskSettings) -> list[Masked]:
    """What a strategy does to each photograph. relevance: float (N, P)."""
    generator = torch.Generator().manual_seed(settings.seed)
    draws = other_donors(strategy, len(pool.images), grid * grid, generator, given=pool.given)
    shown = torch.stack([one.shown for one in pool.images])
    masks, pictures = filled(strategy, shown, pool.masked, relevance, draws, grid=grid)
    seen: Sequence[Tensor | None] = [None] * pool.masked
    if settings.pixels:
        seen = list(
            filled(strategy, torch.stack([one.seen for one in pool.images]), pool.masked, relevance, draws, grid=grid)[1]
        )
    donors = _donors(draws, masks)
    return [Masked(*one, component_boxes(one[0])) for one in zip(masks, donors, pictures, seen, strict=True)]


def _donors(draws: MaskRandomness, masks: Tensor) -> Tensor:
    """int64 (N, G, G) as in `Masked`. masks: bool (N, G, G)."""
    if draws.donors is None:
        return torch.full(masks.shape, -1)
    donors = draws.donors[: len(masks)]
    whole = donors[:, None, None] if donors.ndim == 1 else donors.view(masks.shape)
    return torch.where(masks, whole, -1)


def title_of(strategy: Strategy, cut: Cut | None) -> str:
    """What a strategy does, in words."""
    fill = {"none": "removed", "single": "filled from one image", "multi": "filled from many"}[strategy.fill]
    return f"{strategy.selection} mask{f' ({cut})' if cut else ''}, {fill}"

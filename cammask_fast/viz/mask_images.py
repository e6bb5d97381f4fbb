"""`cammask mask`: CAM, masks and counterfactuals of given photographs for any text prompt.

The class score is the prompt's own logit, exp(logit_scale) * cos(image, text), as in training, where the CAM differentiates the
logit of the true label alone: other prompts do not enter, so one prompt is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cammask_fast.cam import relevance_of
from cammask_fast.data.datasets.texture_digits import BACKGROUNDS, CLASS_NAMES, TEMPLATES
from cammask_fast.data.files import images_in
from cammask_fast.data.loaders.torch_loader import UNREADABLE, error_reason
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import MaskRandomness, Strategy, counterfactual, parse_strategy, sample_mask_randomness
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.model.tiny_clip import tokenizer
from cammask_fast.viz.plots import GalleryRow, gallery

PAPER_STRATEGIES = ("ObjMaskSingleFill(0.3)", "CtxMaskSingleFill(0.5)")
REMOVED = 255
MAX_DONORS = 64


def photograph(path: Path, size: int) -> Tensor:
    """One image file as uint8 (size, size, 3), see `decode`. Raises ValueError naming a file that cannot be read."""
    try:
        return decode(path.read_bytes(), Transform(size=size))
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path} ({error_reason(error)}): remove or replace it") from None


def mask_photographs(
    photographs: Sequence[Path],
    prompts: Sequence[str],
    *,
    out: Path,
    arch: str,
    pretrained: str,
    donors: Path | None = None,
    masking: str = "",
    cam: str = "mm-cam",
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write a PNG with a row per photograph and prompt: the image, its CAM, and each strategy's mask and counterfactual.

    masking: one strategy under the paper's name; empty: object and context with the paper's single-fill. donors: a folder with
    images to fill from; None: the other photographs. Images are resized and cropped as for the model. Raises ValueError on
    images that cannot be read, prompts that the tiny model never saw, a missing donor, and a CAM that is zero everywhere.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a .png file, got {out}")
    strategies = [parse_strategy(name) for name in ([masking] if masking else PAPER_STRATEGIES)]
    if arch == "tiny":
        refuse_unknown_words(prompts)
    clip = load_pretrained(arch, pretrained)
    model = clip.classifier(prompts, ("{}",)).to(device)
    size, grid = model.visual.config.image_size, model.visual.config.grid
    images = torch.stack([photograph(path, size) for path in photographs])
    pool = images
    if donors is not None:
        pool = torch.cat([images, *(photograph(path, size)[None] for path in images_in(donors)[:MAX_DONORS])])
    elif len(images) < 2 and any(strategy.fill != "none" for strategy in strategies):
        raise ValueError(
            "one photograph has nothing to fill from: give --donors FOLDER, more photographs, or a NoFill --masking"
        )
    rows = []
    for label, prompt in enumerate(prompts):
        labels = torch.full((len(images),), label, device=device)
        relevance = relevance_of(model, images.to(device), labels, cam).cpu()
        if not relevance.isfinite().all():
            raise ValueError(f"the CAM for {prompt!r} is not finite: the weights are damaged")
        dark = [path.name for path, row in zip(photographs, relevance, strict=True) if not row.any()]
        if dark:
            raise ValueError(f"the CAM of {dark[0]} is zero everywhere: nothing in the picture raised the score of {prompt!r}")
        columns = {}
        for strategy in strategies:
            generator = torch.Generator().manual_seed(seed)
            columns[_title(strategy)] = apply(strategy, pool, len(images), relevance, generator, grid=grid)
        for i, path in enumerate(photographs):
            made = {name: (mask[i], filled[i]) for name, (mask, filled) in columns.items()}
            shown = normalise_relevance(relevance)[i].view(grid, grid)
            rows.append(GalleryRow(f"{path.name}\n{prompt}", images[i], shown, made))
    out.parent.mkdir(parents=True, exist_ok=True)
    gallery(out, rows, cell=2.4)


def apply(
    strategy: Strategy, pool: Tensor, count: int, relevance: Tensor, generator: torch.Generator, *, grid: int
) -> tuple[Tensor, Tensor]:
    """Mask, bool (count, grid, grid), and counterfactual, uint8 (count, H, W, 3), of the first `count` images of the pool.

    Donors come from the whole pool and are never the image itself. Removed patches of a no-fill are white.
    """
    patches, images = grid * grid, pool[:count]
    padded = torch.cat([relevance, relevance.new_zeros(len(pool) - count, patches)])
    made = counterfactual(pool, padded, strategy, other_donors(strategy, len(pool), patches, generator), grid=grid)
    squares = made.mask[:count].view(count, grid, grid)
    side = images.shape[1] // grid
    if strategy.fill != "none":
        return squares, made.images[:count]
    removed = squares.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
    return squares, images.masked_fill(removed, REMOVED)


def other_donors(strategy: Strategy, count: int, patches: int, generator: torch.Generator) -> MaskRandomness:
    """MaskRandomness in which no single-fill donor is the image itself: a picture without a change would show nothing."""
    draws = sample_mask_randomness(strategy, count=count, patches=patches, generator=generator)
    if strategy.fill == "single":
        shift = torch.randint(1, count, (count,), generator=generator)
        draws = draws._replace(donors=(torch.arange(count) + shift) % count)
    return draws


def refuse_unknown_words(prompts: Sequence[str]) -> None:
    """Raise ValueError for prompts with tokens that are in no caption of the tiny model's pre-training."""
    places = [caption for _, caption, _ in BACKGROUNDS.values()]
    captions = [template.format(name) for template in TEMPLATES for name in CLASS_NAMES]
    known = set(tokenizer()([*captions, *(f"on {place}" for place in places), "a sketch of the number"]).flatten().tolist())
    for prompt in prompts:
        if not set(tokenizer()([prompt]).flatten().tolist()) <= known:
            raise ValueError(
                f"the tiny model never saw some word of {prompt!r}; it knows the digits {', '.join(CLASS_NAMES)} in prompts "
                f"such as 'a photo of the number seven.' or 'a sketch of the number two.', and on {', '.join(places)}"
            )


def _title(strategy: Strategy) -> str:
    fill = {"none": "removed", "single": "filled from one image", "multi": "filled from many"}[strategy.fill]
    return f"{strategy.selection} mask, {fill}"

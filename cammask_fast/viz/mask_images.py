"""`cammask mask`: CAM, masks and counterfactuals of given photographs for any text prompt.

The class score is the prompt's own logit, exp(logit_scale) * cos(image, text), as in training, where the CAM differentiates the
logit of the true label alone: other prompts do not enter, so one prompt is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast.cam import relevance_of
from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.heads import Classes, matching_rows
from cammask_fast.data.class_names import some
from cammask_fast.data.datasets.texture_digits import BACKGROUNDS, CLASS_NAMES, TEMPLATES
from cammask_fast.data.files import images_in
from cammask_fast.data.loaders.torch_loader import UNREADABLE, error_reason
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import MaskRandomness, Strategy, counterfactual, parse_strategy, sample_mask_randomness
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.model.tiny_clip import tokenizer
from cammask_fast.runtime.notices import notice
from cammask_fast.viz.plots import GalleryRow, gallery

PAPER_STRATEGIES = ("ObjMaskSingleFill(0.3)", "CtxMaskSingleFill(0.5)")
REMOVED = 255
MAX_DONORS = 64
CHUNK = 64
"""Photographs in memory at a time."""
TOKENS_OF_A_GRAPH = 4096
"""Tokens whose activations the graph of a map holds at a time: 81 images of ViT-B/32, 7 of ViT-L/14 at 336 pixels."""
ROWS_OF_A_PAGE = 32
MOST_CLASSES = 6
"""A checkpoint with more classes gets one row per photograph unless classes are named."""


def photograph(path: Path, size: int) -> Tensor:
    """One image file as uint8 (size, size, 3), see `decode`. Raises ValueError naming a file that cannot be read."""
    try:
        return decode(path.read_bytes(), Transform(size=size))
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path} ({error_reason(error)}): remove or replace it") from None


class Look(NamedTuple):
    """A model and the rows that each photograph gets."""

    model: Classifier
    names: tuple[str, ...]
    """What the logits stand for."""
    rows: tuple[int | None, ...]
    """A logit per row; None: that of the class for which the model takes the photograph."""

    def labels(self, images: Tensor, row: int | None) -> Tensor:
        """int64 (N,), the logit of every image of a row. images: uint8 (N, S, S, 3)."""
        if row is not None:
            return torch.full((len(images),), row)
        with torch.no_grad():
            device = self.model.head.weight.device
            return torch.cat([self.model(normalise(part.to(device))).logits.argmax(1).cpu() for part in self.parts(images)])

    def maps(self, images: Tensor, labels: Tensor, cam: str, start_layer: int, contrast: str = "none") -> Tensor:
        """Maps of images, computed a few images at a time.

        Args:
            images: uint8 (N, H, W, 3).
            labels: int64 (N,), the logits that are explained.
            cam: name of the map.
            start_layer: first layer that it takes in.
            contrast: what is subtracted from its class score.

        Returns:
            float32 (N, P) on the CPU, not normalised.
        """
        device = self.model.head.weight.device
        pairs = zip(self.parts(images), self.parts(labels), strict=True)
        options: dict[str, Any] = {"start_layer": start_layer, "contrast": contrast}
        return torch.cat([relevance_of(self.model, i.to(device), n.to(device), cam, **options).cpu() for i, n in pairs])

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Pieces of about `TOKENS_OF_A_GRAPH` tokens."""
        return tensor.split(max(1, TOKENS_OF_A_GRAPH // (self.model.visual.config.patches + 1)))


def look_with_prompts(arch: str, pretrained: str, prompts: Sequence[str], device: str) -> Look:
    """A pre-trained model and any text.

    Args:
        arch: name of the architecture.
        pretrained: weights; empty: the architecture's own.
        prompts: a row each, 1 or more.
        device: of the model.

    Returns:
        The model, whose logits are the prompts'.

    Raises:
        ValueError: no prompt, or prompts that the tiny model never saw.
    """
    if not prompts:
        raise ValueError("--class PROMPT: needed with a pre-trained model; a run or checkpoint has classes of its own")
    if arch == "tiny":
        refuse_unknown_words(prompts)
    model = load_pretrained(arch, pretrained).classifier(prompts, ("{}",), device=device)
    return Look(model, tuple(prompts), tuple(range(len(prompts))))


def look_with_checkpoint(checkpoint: Path, prompts: Sequence[str], device: str) -> Look:
    """A checkpoint of `cammask train` and its own classes.

    Args:
        checkpoint: the file.
        prompts: class names, a row each; none: all classes, or with many of them the predicted one.
        device: of the model.

    Returns:
        The model and its rows.

    Raises:
        ValueError: a prompt is none of its classes.
    """
    model, description = load_classifier(checkpoint)
    classes = Classes.of(description)
    if prompts:
        rows = matching_rows(Classes(tuple(prompts), tuple(prompts)), classes)
        unknown = [prompt for prompt, row in zip(prompts, rows, strict=True) if row is None]
        if unknown:
            raise ValueError(
                f"--class {unknown[0]!r}: {checkpoint} has maps of its own classes only, {some(classes.names)}; a pre-trained "
                "model (--arch) takes any text"
            )
        return Look(model.to(device), classes.names, tuple(rows))
    several = len(classes.names) > MOST_CLASSES
    return Look(model.to(device), classes.names, (None,) if several else tuple(range(len(classes.names))))


def mask_photographs(
    photographs: Sequence[Path],
    look: Look,
    *,
    out: Path,
    donors: Path | None = None,
    masking: str = "",
    cam: str = "mm-cam",
    cam_start_layer: int = 0,
    cam_contrast: str = "none",
    seed: int = 0,
) -> list[Path]:
    """Write a PNG with a row per photograph and prompt: the image, its CAM, and each strategy's mask and counterfactual.

    Photographs are read and drawn in chunks, so that memory does not grow with their number. Those that cannot be read, and
    maps that are zero everywhere, are left out with a notice.

    Args:
        photographs: files; resized and cropped as for the model.
        look: the model, and the rows of each photograph.
        out: the PNG; for more than `ROWS_OF_A_PAGE` rows several, with numbers before the suffix.
        donors: folder with images to fill from, of which `MAX_DONORS` are taken; None: the other photographs.
        masking: one strategy under the paper's name; empty: object and context with the paper's single-fill.
        cam: name of the map.
        cam_start_layer: first layer that it takes in.
        cam_contrast: what is subtracted from its class score.
        seed: of the donors.

    Returns:
        The files that were written.

    Raises:
        ValueError: nothing can be drawn, a missing donor, weights that are damaged.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a .png file, got {out}")
    strategies = [parse_strategy(name) for name in ([masking] if masking else PAPER_STRATEGIES)]
    size = look.model.visual.config.image_size
    if donors is None and len(photographs) < 2 and any(strategy.fill != "none" for strategy in strategies):
        photograph(photographs[0], size)
        raise ValueError(
            "one photograph has nothing to fill from: give --donors FOLDER, more photographs, or a NoFill --masking"
        )
    given = [] if donors is None else readable(images_in(donors)[:MAX_DONORS], size)
    if not any(image is not None for image in given) and donors is not None:
        raise ValueError(f"no image in {donors} can be read")
    pages, dark, unread = Pages(out, len(photographs) * len(look.rows)), list[str](), list[str]()
    for place in range(0, len(photographs), CHUNK):
        paths = list(photographs[place : place + CHUNK])
        others = [] if donors is not None or len(photographs) <= CHUNK else _away_from(place, photographs)
        found = list(zip(paths, readable(paths, size), strict=True))
        unread += [str(path) for path, image in found if image is None]
        decoded = [(path, image) for path, image in found if image is not None]
        if not decoded:
            continue
        more = [image for image in given or readable(others, size) if image is not None]
        images = torch.stack([image for _, image in decoded])
        pool = torch.cat([images, *(image[None] for image in more)])
        if len(pool) < 2 and any(strategy.fill != "none" for strategy in strategies):
            raise ValueError("only one photograph can be read, and nothing is there to fill from: give --donors FOLDER")
        for row in look.rows:
            labels = look.labels(images, row)
            titles = [f"{path.name}\n{look.names[label]}" for (path, _), label in zip(decoded, labels.tolist(), strict=True)]
            for line in _rows(look, titles, images, pool, labels, strategies, (cam, cam_start_layer, cam_contrast, seed)):
                if line.cam.any():
                    pages.add(line)
                else:
                    dark.append(line.title.replace("\n", " for "))
    if unread and len(unread) == len(photographs):
        photograph(photographs[0], size)  # says why
    if dark and not pages.drawn:
        raise ValueError(f"the CAM of {dark[0]!r} is zero everywhere: nothing in the picture raised the score")
    if unread:
        notice(f"photographs that cannot be read and were left out: {len(unread)}, {some(unread, 3)}")
    if dark:
        notice(f"maps that are zero everywhere and were left out: {len(dark)}, {some(dark, 3)}")
    return pages.finish()


def readable(paths: Sequence[Path], size: int) -> list[Tensor | None]:
    """The photographs, None for those that cannot be read."""
    found: list[Tensor | None] = []
    for path in paths:
        try:
            found.append(photograph(path, size))
        except ValueError:
            found.append(None)
    return found


def _away_from(place: int, photographs: Sequence[Path]) -> list[Path]:
    """Some photographs outside the chunk that begins at `place`, to fill from."""
    outside = [*photographs[:place], *photographs[place + CHUNK :]]
    return outside[:: -(-len(outside) // MAX_DONORS)]


def _rows(
    look: Look, titles: Sequence[str], images: Tensor, pool: Tensor, labels: Tensor, strategies: Sequence[Strategy],
    options: tuple[str, int, str, int],
) -> Iterator[GalleryRow]:  # fmt: skip
    """The rows of a chunk. images: uint8 (N, S, S, 3), the first of the pool. options: CAM, its first layer, contrast, seed."""
    (cam, start_layer, contrast, seed), grid = options, look.model.visual.config.grid
    relevance = look.maps(images, labels, cam, start_layer, contrast)
    if not relevance.isfinite().all():
        raise ValueError(f"the CAM of {titles[0]!r} is not finite: the weights are damaged")
    columns = {}
    for strategy in strategies:
        generator = torch.Generator().manual_seed(seed)
        columns[_title(strategy)] = apply(strategy, pool, len(images), relevance, generator, grid=grid)
    for i, title in enumerate(titles):
        made = {name: (mask[i], filled[i]) for name, (mask, filled) in columns.items()}
        yield GalleryRow(title, images[i], normalise_relevance(relevance)[i].view(grid, grid), made)


class Pages:
    """Rows as one picture, or as numbered ones of `ROWS_OF_A_PAGE` rows each."""

    def __init__(self, out: Path, most: int):
        """most: rows that may come."""
        self.out, self.count = out, -(-most // ROWS_OF_A_PAGE)
        self.rows: list[GalleryRow] = []
        self.written: list[Path] = []

    @property
    def drawn(self) -> bool:
        """Whether there is anything to write or already written."""
        return bool(self.rows or self.written)

    def add(self, row: GalleryRow) -> None:
        """Add a row; writes a page that is full."""
        self.rows.append(row)
        if len(self.rows) == ROWS_OF_A_PAGE:
            self._write()

    def finish(self) -> list[Path]:
        """Write what is left; returns all files."""
        if self.rows:
            self._write()
        return self.written

    def _write(self) -> None:
        number = f"-{len(self.written) + 1:0{len(str(self.count))}d}" if self.count > 1 else ""
        path = self.out.with_stem(self.out.stem + number)
        path.parent.mkdir(parents=True, exist_ok=True)
        gallery(path, self.rows, cell=2.4)
        self.rows = []
        self.written.append(path)


def apply(
    strategy: Strategy, pool: Tensor, count: int, relevance: Tensor, generator: torch.Generator, *, grid: int
) -> tuple[Tensor, Tensor]:
    """Mask and fill the first images of a pool. Donors come from the whole pool and are never the image itself.

    Args:
        strategy: which patches are masked and how they are filled.
        pool: uint8 (M, H, W, 3).
        count: images to mask, N.
        relevance: float (N, P), not normalised.
        generator: advances.
        grid: patches per side, G.

    Returns:
        Masks, bool (N, G, G), and counterfactuals, uint8 (N, H, W, 3); removed patches of a no-fill are white.
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
    """Draw so that no single-fill donor is the image itself: a picture without a change would show nothing.

    Args:
        strategy: decides what is drawn.
        count: images, N.
        patches: patches per image, P.
        generator: advances.

    Returns:
        The draws.
    """
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

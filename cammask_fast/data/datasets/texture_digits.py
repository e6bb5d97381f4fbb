"""Texture digits: handwritten digits (scikit-learn's scans) on photographs (scikit-image's), with a spurious background.

A benchmark in the tradition of Waterbirds and Colored-MNIST, generated offline. Downstream, digits 0-4 stand on grass and
5-9 on gravel with a given correlation; the test sets break that correlation or change the style. Every image is a function
of its row of random draws; draws come from one PCG64 stream per split, so they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

IMAGE_SIZE = 48
PATCH_SIZE = 8
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the number {}.", "the digit {}.", "a picture of a handwritten {}.", "a {}.")
# background -> (loader in skimage.data, words of the caption, tint of greyscale scans)
BACKGROUNDS: dict[str, tuple[str, str, tuple[float, float, float]]] = {
    "grass": ("grass", "grass", (0.55, 0.95, 0.40)),
    "gravel": ("gravel", "gravel", (1.0, 0.86, 0.72)),
    "brick": ("brick", "a brick wall", (1.0, 0.55, 0.45)),
    "chelsea": ("chelsea", "a cat", (1.0, 1.0, 1.0)),
    "coffee": ("coffee", "a cup of coffee", (1.0, 1.0, 1.0)),
    "rocket": ("rocket", "a rocket", (1.0, 1.0, 1.0)),
    "stars": ("hubble_deep_field", "the stars", (1.0, 1.0, 1.0)),
    "astronaut": ("astronaut", "an astronaut", (1.0, 1.0, 1.0)),
    "tissue": ("immunohistochemistry", "stained tissue", (1.0, 1.0, 1.0)),
    "retina": ("retina", "a retina", (1.0, 1.0, 1.0)),
    "coins": ("coins", "old coins", (0.95, 0.85, 0.6)),
    "moon": ("moon", "the moon", (0.85, 0.9, 1.0)),
}
DOWNSTREAM_BACKGROUNDS = ("grass", "gravel")
GROUPS = (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
"""For each class the background, of `DOWNSTREAM_BACKGROUNDS`, on which it stands downstream."""
SCAN_SHARES = {"web": 0.55, "train": 0.20, "val": 0.10, "test": 0.15}
NAMED_SHARE = 0.15  # web captions that name the background
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is drawn for one split; the random stream depends on `name` and `seed` alone."""

    name: str
    images: int
    seed: int
    scans: str
    """Which disjoint share of the digit scans: web, train, val or test."""
    placement: str
    """Background rule: `any` (uniform over all), `grouped` (own group's background with probability `correlation`),
    `flipped` (always the other group's), `unseen` (uniform over those never used downstream)."""
    correlation: float = 1.0
    outlined: float = 0.0
    """Share of images whose strokes are half-transparent outlines (the downstream look; rare on the web)."""
    sketched: float = 0.0
    """Share of images drawn as pencil sketches."""
    corrupted: bool = False
    """Blur and noise on every image."""

    def __post_init__(self) -> None:
        if self.scans not in SCAN_SHARES:
            raise ValueError(f"scans: expected one of {', '.join(SCAN_SHARES)}, got {self.scans!r}")
        if self.placement not in ("any", "grouped", "flipped", "unseen"):
            raise ValueError(f"placement: expected any, grouped, flipped or unseen, got {self.placement!r}")
        for name in ("correlation", "outlined", "sketched"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if self.images < 1:
            raise ValueError(f"images: expected at least 1, got {self.images}")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """The draws of M images: everything that determines their pixels, as arrays of length M."""

    labels: NDArray[np.int64]
    scans: NDArray[np.int64]
    """Index into scikit-learn's 1 797 digit scans."""
    backgrounds: NDArray[np.int64]
    """Index into BACKGROUNDS."""
    crop_yx: NDArray[np.float64]
    """(M, 2) in [0, 1): crop position in the photograph."""
    mirrored: NDArray[np.bool_]
    height: NDArray[np.float64]
    """Digit height in pixels."""
    centre_yx: NDArray[np.float64]
    """(M, 2) digit centre in pixels."""
    angle: NDArray[np.float64]
    """Rotation in radians."""
    colour: NDArray[np.float64]
    """(M, 3) stroke colour, RGB in [0, 1]."""
    opacity: NDArray[np.float64]
    outlined: NDArray[np.bool_]
    sketched: NDArray[np.bool_]
    corrupted: NDArray[np.bool_]
    wording: NDArray[np.float64]
    """(M, 2) in [0, 1): which template the caption uses and whether it names the background."""
    noise_seed: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> Scenes:
        arrays: dict[str, Any] = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "noise_seed"}
        return replace(self, **arrays)

    def digest(self) -> str:
        """Hash of the discrete draws: labels, scans, backgrounds, placements in 1/1000 pixel and style flags."""
        h = hashlib.sha256()
        for array in (self.labels, self.scans, self.backgrounds, np.round(self.centre_yx * 1000), np.round(self.height * 1000)):
            h.update(array.astype("<i8").tobytes())
        for flags in (self.mirrored, self.outlined, self.sketched, self.corrupted):
            h.update(flags.astype(np.uint8).tobytes())
        return h.hexdigest()


@cache
def digit_scans() -> tuple[Tensor, NDArray[np.int64]]:
    """The scans, float32 (1797, 8, 8) in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images.astype(np.float32) / 16.0), digits.target.astype(np.int64)


@cache
def scans_of(share: str, label: int) -> NDArray[np.int64]:
    """Scan indices of one class that belong to `share`; the shares are disjoint."""
    of_label = np.flatnonzero(digit_scans()[1] == label)
    of_label = of_label[np.argsort(np.random.Generator(np.random.PCG64(7 + label)).random(len(of_label)))]
    edges = np.round(np.cumsum([0.0, *SCAN_SHARES.values()]) * len(of_label)).astype(int)
    index = list(SCAN_SHARES).index(share)
    return np.sort(of_label[edges[index] : edges[index + 1]])


@cache
def photographs() -> tuple[NDArray[np.uint8], ...]:
    """The background photographs as uint8 (h, w, 3), shrunk so that a 48-pixel crop shows texture, greyscale ones tinted."""
    import skimage.data

    shrunk = []
    for loader, _, tint in BACKGROUNDS.values():
        photo = np.asarray(getattr(skimage.data, loader)())
        photo = np.repeat(photo[..., None], 3, axis=2) if photo.ndim == 2 else photo[..., :3]
        pixels = torch.from_numpy(photo.astype(np.float32)).permute(2, 0, 1)[None] * torch.tensor(tint).view(1, 3, 1, 1)
        pixels = F.interpolate(pixels, scale_factor=176 / min(photo.shape[:2]), mode="area")
        shrunk.append(pixels[0].permute(1, 2, 0).round().to(torch.uint8).numpy())
    return tuple(shrunk)


def sample_scenes(split: Split) -> Scenes:
    """Draw the scenes of a split. Only uniform doubles of PCG64 are used: the same on every machine and NumPy version."""
    rng = np.random.Generator(np.random.PCG64([split.seed, zlib.crc32(split.name.encode())]))
    u = rng.random((split.images, 20))
    count = split.images
    labels = (np.arange(count) % 10)[np.argsort(rng.random(count), kind="stable")].astype(np.int64)
    scans = np.empty(count, np.int64)
    for label in range(10):
        mine = labels == label
        pool = scans_of(split.scans, label)
        scans[mine] = pool[(u[mine, 0] * len(pool)).astype(np.int64)]
    names = list(BACKGROUNDS)
    group = (labels >= 5).astype(np.int64)
    downstream = np.array([names.index(name) for name in DOWNSTREAM_BACKGROUNDS])
    if split.placement in ("any", "unseen"):
        pool = np.array([i for i, n in enumerate(names) if split.placement == "any" or n not in DOWNSTREAM_BACKGROUNDS])
        backgrounds = pool[(u[:, 1] * len(pool)).astype(np.int64)]
    else:
        own = u[:, 1] < split.correlation if split.placement == "grouped" else np.zeros(count, bool)
        backgrounds = downstream[np.where(own, group, 1 - group)]
    height = IMAGE_SIZE * (0.65 + 0.25 * u[:, 2])
    slack = np.maximum(IMAGE_SIZE - height, 0.0)
    outlined = u[:, 3] < split.outlined
    return Scenes(
        labels=labels,
        scans=scans,
        backgrounds=backgrounds.astype(np.int64),
        crop_yx=u[:, 4:6],
        mirrored=u[:, 6] < 0.5,
        height=height,
        centre_yx=IMAGE_SIZE / 2 + (u[:, 7:9] - 0.5) * slack[:, None],
        angle=np.deg2rad(15.0) * (2 * u[:, 9] - 1),
        colour=_bright_colours(u[:, 10:13]),
        opacity=np.where(outlined, 0.75 + 0.25 * u[:, 13], 0.85 + 0.15 * u[:, 13]),
        outlined=outlined,
        sketched=u[:, 14] < split.sketched,
        corrupted=np.full(count, split.corrupted),
        wording=u[:, 15:17],
        noise_seed=int(split.seed) ^ zlib.crc32(split.name.encode()),
    )


def _bright_colours(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M, 3) uniforms -> RGB colours with value in [0.85, 1] and any hue (HSV with saturation up to 0.8)."""
    hue, saturation, value = u[:, 0] * 6, 0.8 * u[:, 1], 0.85 + 0.15 * u[:, 2]
    distance = np.abs((hue[:, None] + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return value[:, None] * (1 - saturation[:, None] * (1 - np.clip(distance, 0, 1)))


def stroke_coverage(scenes: Scenes) -> Tensor:
    """Share of each pixel covered by the digit's strokes, float32 (M, 48, 48); outlines count as the filled stroke."""
    fine = F.interpolate(digit_scans()[0][:, None], scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    scans = fine[torch.from_numpy(scenes.scans)]
    cos, sin = np.cos(scenes.angle), np.sin(scenes.angle)
    zoom = IMAGE_SIZE / scenes.height
    shift_y, shift_x = (2 * scenes.centre_yx / IMAGE_SIZE - 1).T
    theta = np.stack([cos, sin, -cos * shift_x - sin * shift_y, -sin, cos, sin * shift_x - cos * shift_y], 1) * zoom[:, None]
    grid = F.affine_grid(
        torch.from_numpy(theta.astype(np.float32)).view(-1, 2, 3), [len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    ink = F.grid_sample(scans, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    return ((ink - 0.15) / 0.5).clamp(0, 1)


def _background_crops(scenes: Scenes) -> Tensor:
    """Background crops, float32 (M, 3, 48, 48) in [0, 1]."""
    crops = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    photos = photographs()
    for i, (which, (u, v), mirrored) in enumerate(zip(scenes.backgrounds, scenes.crop_yx, scenes.mirrored, strict=True)):
        photo = photos[which]
        y = int(u * (photo.shape[0] - IMAGE_SIZE + 1))
        x = int(v * (photo.shape[1] - IMAGE_SIZE + 1))
        crop = photo[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
        crops[i] = crop[:, ::-1] if mirrored else crop
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float().div_(255)


def render(scenes: Scenes) -> Tensor:
    """Scenes to pixels: uint8 (M, 48, 48, 3)."""
    images = torch.empty(len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[slice(start, start + CHUNK)]
        pixels = _compose(chunk)
        if chunk.corrupted.any():
            pixels = _corrupt(pixels, chunk.noise_seed + start)
        images[start : start + CHUNK] = (pixels * 255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return images


def _column(values: NDArray[np.float64] | NDArray[np.bool_], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(len(values), -1, 1, 1)


def _compose(scenes: Scenes) -> Tensor:
    """Strokes over background, float32 (M, 3, 48, 48) in [0, 1]."""
    stroke = stroke_coverage(scenes)[:, None]
    grown = F.max_pool2d(stroke, 3, 1, 1)
    ring = grown - 0.9 * (1 - F.max_pool2d(1 - stroke, 3, 1, 1))
    outlined, sketched = _column(scenes.outlined, torch.bool), _column(scenes.sketched, torch.bool)
    ink = torch.where(outlined, ring, stroke) * _column(scenes.opacity)
    halo = F.avg_pool2d(F.max_pool2d(grown, 3, 1, 1), 3, 1, 1) * torch.where(outlined, 0.4, 0.6)
    background = _background_crops(scenes)
    pixels = torch.lerp(background * (1 - halo), _column(scenes.colour), ink)
    if scenes.sketched.any():
        grey = F.pad(background.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
        edges = (grey[..., :-1, 1:] - grey[..., :-1, :-1]).abs() + (grey[..., 1:, :-1] - grey[..., :-1, :-1]).abs()
        paper = (0.97 - 0.8 * edges).clamp(0.3, 1)
        pixels = torch.where(sketched, torch.lerp(paper, torch.tensor(0.15), 0.9 * stroke), pixels)
    return pixels


def _corrupt(pixels: Tensor, seed: int) -> Tensor:
    """Blur (3 x 3 box) and zero-mean uniform noise of standard deviation 0.1."""
    noise = np.random.Generator(np.random.PCG64(seed)).random(pixels.shape, dtype=np.float32)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (blurred + (torch.from_numpy(noise) - 0.5) * (0.1 * 12**0.5)).clamp(0, 1)


def captions(scenes: Scenes) -> list[str]:
    """One web caption per scene, naming the digit and sometimes the background."""
    words = [caption for _, caption, _ in BACKGROUNDS.values()]
    texts = []
    for label, background, sketched, (which, named) in zip(
        scenes.labels, scenes.backgrounds, scenes.sketched, scenes.wording, strict=True
    ):
        text = TEMPLATES[int(which * len(TEMPLATES))].format(CLASS_NAMES[label])
        if sketched:
            text = f"a sketch of the number {CLASS_NAMES[label]}."
        elif named < NAMED_SHARE:
            text = f"{text.removesuffix('.')} on {words[background]}."
        texts.append(text)
    return texts

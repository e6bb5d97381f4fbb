"""Generated JPEGs with the size of ImageNet's (about 110 KB at 500 x 375), for machines without photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDES = ((500, 375), (375, 500), (500, 333), (640, 480), (500, 500), (400, 300))
CLASSES = 4
QUALITY = 95


def generate(root: Path, count: int) -> Path:
    """`count` images in class folders below `root`."""
    for index in range(count):
        generate_one(root, index)
    return root


def generate_one(root: Path, index: int) -> None:
    """Image number `index`, always the same: noise with the falling spectrum of natural images."""
    random = np.random.default_rng(index)
    width, height = SIDES[index % len(SIDES)]
    pixels = np.zeros((height, width, 3))
    for octave in range(8):
        coarse = random.normal(size=(max(2, height >> (7 - octave)), max(2, width >> (7 - octave)), 3)) / (octave + 1)
        layers = [np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height))) for c in range(3)]
        pixels += np.stack(layers, 2)
    low, high = np.quantile(pixels, (0.01, 0.99))
    image = Image.fromarray((255 * ((pixels - low) / (high - low)).clip(0, 1)).astype(np.uint8))
    path = root / f"class{index % CLASSES}" / f"{index:05}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=QUALITY)


def mean_kilobytes(root: Path) -> float:
    """Of the files below a folder."""
    sizes = [path.stat().st_size for path in root.rglob("*.*")]
    return sum(sizes) / len(sizes) / 1e3

"""A map over its photograph, at the photograph's own size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cammask_fast.data.transforms import centre_window
from cammask_fast.masking.object_patches import Box
from cammask_fast.viz.mask_images import whole_photograph

COLOURS = "inferno"
SMALLEST_TEXT = 10
"""Pixels, of the numbers beside the colour bar."""


@dataclass(frozen=True, kw_only=True)
class OverlaySettings:
    """How overlays look."""

    size: int | None = None
    """Pixels of the photograph's long side; None: its own."""
    alpha: float = 0.6
    """Opacity of the colours, in [0, 1]."""
    bar: bool = True
    """Whether a bar beside the photograph says which colour is which value."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"--alpha: expected an opacity in [0, 1], got {self.alpha:g}")
        if self.size is not None and self.size < 16:
            raise ValueError(f"--size: expected 16 pixels or more, got {self.size}")


def overlay(path: Path, cam: Tensor, *, seen: int, boxes: Sequence[Box] = (), settings: OverlaySettings) -> Image.Image:
    """Draw a map over the whole photograph. What the model's centre crop leaves out stays as it is, outside a thin frame.

    Args:
        path: of the photograph.
        cam: float (G, G) in [0, 1].
        seen: pixels per side of what the model sees, S, which places the crop.
        boxes: drawn around patches.
        settings: size and look.

    Returns:
        The photograph under the colours, and on its right the bar.

    Raises:
        ValueError: the photograph cannot be read.
    """
    image = whole_photograph(path)
    width, height = image.size
    left, top, right, bottom = centre_window(width, height, seen)
    factor = 1.0 if settings.size is None else settings.size / max(width, height)
    if settings.size is not None:
        image = image.resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.LANCZOS)
    window = left * factor, top * factor, right * factor, bottom * factor
    x, y, x_end, y_end = (round(edge) for edge in window)
    x_end, y_end = min(x_end, image.width), min(y_end, image.height)
    smooth = Image.fromarray(cam.float().numpy()).resize((x_end - x, y_end - y), Image.Resampling.BICUBIC)
    colours = Image.fromarray(coloured(np.clip(np.asarray(smooth), 0, 1)))
    image.paste(Image.blend(image.crop((x, y, x_end, y_end)), colours, settings.alpha), (x, y))
    draw, line = ImageDraw.Draw(image), max(1, round(max(image.size) / 400))
    if (x, y, x_end, y_end) != (0, 0, *image.size):
        draw.rectangle((x, y, x_end - 1, y_end - 1), outline="white", width=line)
    for box in boxes:
        a, b, c, d = box.in_window(window, len(cam))
        draw.rectangle((a, b, max(a, c - 1), max(b, d - 1)), outline="yellow", width=2 * line)
    return with_bar(image) if settings.bar else image


def coloured(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values in [0, 1], (H, W), as colours, uint8 (H, W, 3)."""
    colours: NDArray[np.uint8] = mpl.colormaps[COLOURS](values, bytes=True)[..., :3]
    return np.ascontiguousarray(colours)


def with_bar(image: Image.Image) -> Image.Image:
    """The image with a colour bar on its right: the map divided by its maximum, from 0 to 1."""
    text = max(SMALLEST_TEXT, image.height // 36)
    font, bar, gap = ImageFont.load_default(text), max(6, text), max(3, text // 3)
    room = gap + bar + gap + round(font.getlength("0.5")) + gap
    whole = Image.new("RGB", (image.width + room, image.height), "white")
    whole.paste(image, (0, 0))
    ramp = np.linspace(1, 0, image.height, dtype=np.float32)[:, None].repeat(bar, 1)
    whole.paste(Image.fromarray(coloured(ramp)), (image.width + gap, 0))
    draw = ImageDraw.Draw(whole)
    at = image.width + 2 * gap + bar
    for value, anchor in ((1, "la"), (0.5, "lm"), (0, "ls")):
        y = {1: gap // 2, 0.5: image.height // 2, 0: image.height - gap // 2}[value]
        draw.text((at, y), f"{value:g}", fill="black", font=font, anchor=anchor)
    return whole

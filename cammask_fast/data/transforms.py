"""From an encoded image to uint8 pixels: the paper's transform and the augmentations, drawn per sample."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cammask_fast.data.augment import RAND_AUGMENT_BINS, Augment
from cammask_fast.data.bit_depth import keep_deep, to_eight_bits
from cammask_fast.data.files import kind_of
from cammask_fast.data.warn import warn_once

LONGEST = 16
"""Images more than this many times as long as wide are first cut to it about their centre, so that memory stays bounded."""
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is turned upright, by its EXIF orientation."""
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats of animations; several pages of a TIFF or views of a camera's JPEG are none."""
EXACT_MODES = ("RGB", "L")
RGB_COMPONENTS = [ord("R"), ord("G"), ord("B")]
_UNKNOWN = "cannot identify image file"  # PIL's words


@dataclass(frozen=True, kw_only=True)
class Transform:
    """size: side of the square output in pixels. border: pixels cut off on every side first. seed: of the augmentations."""

    size: int
    border: int = 0
    augment: Augment = field(default_factory=Augment)
    seed: int = 0

    def sample_params(self, epoch: int, sample_id: int, width: int, height: int) -> AugmentParams:
        """Draw the augmentation of one sample, from (seed, epoch, sample_id) and its size alone: a resumed run and every loader
        draw the same.

        Args:
            epoch: 0 for the first one.
            sample_id: index in the source.
            width: of the image, pixels.
            height: of the image, pixels.

        Returns:
            Window, flip, jitter and RandAugment's numbers.
        """
        augment = self.augment
        if augment == Augment():
            return AugmentParams(centre_window(width, height, self.size), centred=True)
        random = np.random.default_rng((self.seed, epoch, sample_id))
        window = random_window(width, height, augment.random_crop, random) if augment.random_crop else None
        operations = augment.rand_augment[0]
        return AugmentParams(
            window=window or centre_window(width, height, self.size),
            centred=window is None,
            flip=bool(random.random() < 0.5) and augment.flip,
            jitter=tuple(1 + augment.color_jitter * (2 * random.random(3) - 1)) if augment.color_jitter else (1.0, 1.0, 1.0),
            operations=tuple(random.random(operations).tolist()),
            signs=tuple(random.integers(0, 2, operations).tolist()),
            seed=int(random.integers(2**31)),
        )


class AugmentParams(NamedTuple):
    """What happens to one sample. window: left, top, right, bottom in pixels of the image, scaled to the whole output.
    centred: the window is the centre crop. jitter: factors of brightness, contrast and saturation. operations: a number in
    [0, 1) that chooses each operation of RandAugment; signs: whether its magnitude is negated; seed: for torchvision's."""

    window: tuple[float, float, float, float]
    centred: bool
    flip: bool = False
    jitter: tuple[float, ...] = (1.0, 1.0, 1.0)
    operations: tuple[float, ...] = ()
    signs: tuple[int, ...] = ()
    seed: int = 0


def resized(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Resize and centre crop as numbers, rounded as in torchvision's Resize and CenterCrop.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        size: of the short side and of the crop, pixels.

    Returns:
        Width and height after resizing, left and top of the crop.
    """
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    return width, height, round((width - size) / 2.0), round((height - size) / 2.0)


def centre_window(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The part of an image that `resized` and its centre crop show.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        size: of the short side and of the crop, pixels.

    Returns:
        Left, top, right and bottom in pixels of the image.
    """
    new_width, new_height, left, top = resized(width, height, size)
    across, down = width / new_width, height / new_height
    return left * across, top * down, (left + size) * across, (top + size) * down


def random_window(
    width: int, height: int, smallest: float, random: np.random.Generator
) -> tuple[float, float, float, float] | None:
    """Draw a window of the image with an aspect of 3/4 to 4/3.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        smallest: least share of the area, 0 to 1.
        random: generator, which advances.

    Returns:
        Left, top, right and bottom in pixels; None where ten tries find no window that fits.
    """
    for _ in range(10):
        area = width * height * random.uniform(smallest, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(random.integers(width - across + 1)), int(random.integers(height - down + 1))
            return float(left), float(top), float(left + across), float(top + down)
    return None


def opened(data: bytes) -> Image.Image:
    """The image behind encoded bytes, its header read and its pixels not. Raises ValueError on bytes that are no image."""
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings(action="ignore"):  # large images and odd metadata
            image = Image.open(io.BytesIO(data))
            if image.format == "PNG":
                keep_deep(image, data)
            return image
    except Exception as error:  # damaged files raise anything from struct.error to DecompressionBombError
        raise ValueError(kind_of(data) if _UNKNOWN in str(error) and kind_of(data) else _reason(error)) from None


def encoded_simply(image: Image.Image) -> bool:
    """Whether an image is a JPEG in grey or YCbCr, whose colours every decoder agrees on. CMYK is not, nor is RGB without a
    conversion, which Adobe's marker or the names of the components tell."""
    if image.format != "JPEG" or image.mode not in EXACT_MODES:
        return False
    components = [component[0] for component in getattr(image, "layer", [])]
    return image.mode == "L" or (image.info.get("adobe_transform", 1) == 1 and components != RGB_COMPONENTS)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 where it has none, or one that cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"):
            found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block raises anything from SyntaxError to struct.error; the pixels do not depend on it
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def to_rgb(image: Image.Image, *, border: int = 0, note: Callable[[str], None] = warn_once) -> Image.Image:
    """Pixels in RGB: turned by EXIF, the first frame of an animation, without transparency, cut to `LONGEST`.

    Args:
        image: opened, perhaps not decoded yet.
        border: pixels to cut off on every side.
        note: is told where the number of bits had to be guessed to scale more than 8 to 8.

    Returns:
        An RGB image.

    Raises:
        ValueError: the pixels cannot be decoded, or the border leaves none.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            if image.format in ANIMATED and getattr(image, "is_animated", False):
                note("an animation, of which the first frame is used")
            image.load()  # before its EXIF is read, which may lie behind the pixels
            turn = TURNS.get(orientation(image))
            image = to_eight_bits(image, note)
            if turn is not None:
                image = image.transpose(turn)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("RGB")
    except Exception as error:  # as in `opened`
        raise ValueError(_reason(error)) from None
    width, height = image.size
    if border:
        if min(width, height) <= 2 * border:
            raise ValueError(f"{width} x {height} pixels and a border of {border}")
        image = image.crop((border, border, width - border, height - border))
        width, height = image.size
    longest = LONGEST * min(width, height)
    if max(width, height) > longest:
        note(f"more than {LONGEST} times as long as wide, cut to that about its centre")
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        image = image.crop((left, top, min(width, left + longest), min(height, top + longest)))
    return image


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (H, W, 3)."""
    return torch.from_numpy(np.array(image))


def placed(pixels: Tensor, draw: AugmentParams, size: int) -> Tensor:
    """Cut the window out of an image and resize it, bicubic with antialiasing.

    PyTorch resizes uint8 tensors with the CPU's vector instructions, as torchvision does, three times as fast as PIL and within
    2 of 255 of it.

    Args:
        pixels: uint8 (H, W, 3).
        draw: has the window.
        size: pixels per side of the result.

    Returns:
        uint8 (size, size, 3).
    """
    image, (height, width) = pixels.permute(2, 0, 1), pixels.shape[:2]
    if draw.centred:
        width, height, left, top = resized(width, height, size)
        return _resize(image, height, width)[:, top : top + size, left : left + size].permute(1, 2, 0)
    left, top, right, bottom = (round(edge) for edge in draw.window)
    return _resize(image[:, top:bottom, left:right], size, size).permute(1, 2, 0)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def decode(
    data: bytes, transform: Transform, *, epoch: int = 0, sample_id: int = 0, note: Callable[[str], None] = warn_once
) -> Tensor:
    """Decode one image, resize its short side (bicubic), crop its centre or a random window, and augment.

    Sizes are rounded as in torchvision's Resize and CenterCrop.

    Args:
        data: the encoded image.
        transform: size, border and augmentations.
        epoch: of the random numbers.
        sample_id: of the random numbers.
        note: is told what had to be guessed.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        ValueError: with the reason, for data that cannot be decoded.
    """
    image = to_rgb(opened(data), border=transform.border, note=note)
    draw = transform.sample_params(epoch, sample_id, *image.size)
    return augmented(placed(to_pixels(image), draw, transform.size), draw, transform.augment)


def augmented(pixels: Tensor, draw: AugmentParams, augment: Augment) -> Tensor:
    """Flip, jitter and RandAugment, which follow the crop, with torchvision.

    Args:
        pixels: uint8 (H, W, 3).
        draw: the sample's random numbers.
        augment: what to apply.

    Returns:
        uint8 (H, W, 3).
    """
    image = pixels.permute(2, 0, 1)
    if draw.flip:
        image = image.flip(2)
    if not augment.color_jitter and not augment.rand_augment[0]:
        return image.permute(1, 2, 0)
    from torchvision.transforms import v2  # takes seconds: only where it is needed

    if augment.color_jitter:
        brightness, contrast, saturation = draw.jitter
        image = v2.functional.adjust_brightness(image, brightness)
        image = v2.functional.adjust_contrast(image, contrast)
        image = v2.functional.adjust_saturation(image, saturation)
    operations, magnitude = augment.rand_augment
    if operations:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.seed)
            image = v2.RandAugment(operations, magnitude, RAND_AUGMENT_BINS)(image)
    return image.permute(1, 2, 0)


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    if _UNKNOWN in text:
        return "not an image in a known format"
    return text or type(error).__name__

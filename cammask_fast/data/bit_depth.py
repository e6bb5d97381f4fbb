"""Images of more than 8 bits per channel as 8 bits, by the number of bits that their values use.

Cameras and scanners of 10 to 14 bits write PNGs of 16, whose values may stay in the lower bits: taken as 16 bits such an image
is all but black.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

DEEP = "cammask_png"
"""Key of `Image.info` under which a PNG of 16 bits keeps its bytes: PIL reads the upper half of its colours only."""
DEPTHS = (8, 10, 12, 14, 16)
HEADER = 8  # bytes of a PNG before its first chunk
BIT_DEPTH = 24  # offset in a PNG of its bits per channel


def keep_deep(image: Image.Image, data: bytes) -> None:
    """Keep the bytes of a PNG that has 16 bits per channel with its image."""
    if data[BIT_DEPTH] == 16:
        image.info[DEEP] = data


def to_eight_bits(image: Image.Image, note: Callable[[str], None]) -> Image.Image:
    """A loaded image whose channels have 8 bits; one that has is returned as it is. `note` is told when values of 16 bits turn
    out to use fewer. Transparency is dropped where they do."""
    data = image.info.get(DEEP)
    if image.mode.startswith("I"):
        values: NDArray[Any] = np.asarray(image)
    elif data is not None and _highest_colour(image) < 1 << 6:  # the upper bytes: 14 bits or fewer are used
        from torchvision.io import ImageReadMode, decode_png  # takes seconds: only where it is needed

        deep = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()
        values = deep[0] if len(deep) < 3 else np.ascontiguousarray(deep[:3].transpose(1, 2, 0))
    else:
        return image
    highest = int(values.max())
    declared = None if data is None else significant_bits(data)
    bits = bits_used(highest, declared)
    if bits < 16 and highest:
        source = "its sBIT chunk says so" if bits == declared else f"no value is above {(1 << bits) - 1}"
        note(f"a 16-bit image is read as one of {bits} bits ({source}): if it is only dark, save it with 8 bits")
    scaled = (values.clip(0).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(scaled)


def _highest_colour(image: Image.Image) -> int:
    """The largest value of a colour channel; alpha does not count."""
    extrema: Any = image.getextrema()
    channels = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return max(highest for name, (_, highest) in zip(image.getbands(), channels, strict=True) if name != "A")


def bits_used(highest: int, declared: int | None) -> int:
    """The number of bits, 8 or more, that values up to `highest` fill: `declared` if that holds them, else the smallest usual
    number that does.

    A PNG whose `declared` 12 bits lie in the upper ones of 16, as the standard has it, uses all 16.
    """
    if declared is not None and declared >= 8 and highest < 1 << declared:
        return declared
    return next((bits for bits in DEPTHS if highest < 1 << bits), highest.bit_length())


def significant_bits(png: bytes) -> int | None:
    """What the sBIT chunk of a PNG says of its first channel; None without one."""
    offset = HEADER
    while offset + 9 <= len(png):
        kind = png[offset + 4 : offset + 8]
        if kind == b"sBIT":
            return png[offset + 8]
        if kind in (b"IDAT", b"IEND"):
            break
        offset += 12 + int.from_bytes(png[offset : offset + 4], "big")
    return None

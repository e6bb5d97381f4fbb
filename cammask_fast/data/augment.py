"""Which augmentations a run has, in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass

RAND_AUGMENT_BINS = 31
"""Magnitudes of RandAugment."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentations of training images; the paper uses none, which is the default. Applied in the order of the fields."""

    random_crop: float = 0.0
    """Smallest share of the image's area in a random resized crop (aspect 3/4 to 4/3); 0: the centre crop."""
    flip: bool = False
    """Mirror half of the images."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are scaled by factors in [1 - s, 1 + s]."""
    rand_augment: tuple[int, int] = (0, 0)
    """RandAugment's number of operations and magnitude (0 to 30); 0 operations: off."""

    def __post_init__(self) -> None:
        if not 0 <= self.random_crop <= 1:
            raise ValueError(f"random-crop: expected the smallest share of the area, 0 to 1, got {self.random_crop}")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"color-jitter: expected a strength from 0 to below 1, got {self.color_jitter}")
        operations, magnitude = self.rand_augment
        if operations < 0 or not 0 <= magnitude < RAND_AUGMENT_BINS:
            raise ValueError(
                f"rand-augment: expected OPERATIONS,MAGNITUDE with a magnitude of 0 to 30, got {self.rand_augment}"
            )

    @property
    def moves_pixels(self) -> bool:
        """Whether an image's contents lie elsewhere from epoch to epoch."""
        return self.random_crop > 0 or self.flip or self.rand_augment[0] > 0

    @classmethod
    def parse(cls, words: list[str] | tuple[str, ...]) -> Augment:
        """From words such as `random-crop=0.08 flip color-jitter=0.4 rand-augment=2,9`. Raises ValueError on others."""
        known = {"random-crop": "0.08", "flip": "", "color-jitter": "0.4", "rand-augment": "2,9"}
        values: dict[str, str] = {}
        for word in words:
            name, given, value = word.partition("=")
            if name not in known or (name == "flip" and given):
                raise ValueError(
                    f"unknown augmentation {word!r}; known: {', '.join(f'{k}={v}' if v else k for k, v in known.items())}"
                )
            values[name] = value if given else known[name]
        try:
            operations, magnitude = (int(part) for part in values.get("rand-augment", "0,0").split(","))
            return cls(
                random_crop=float(values.get("random-crop", 0)),
                flip="flip" in values,
                color_jitter=float(values.get("color-jitter", 0)),
                rand_augment=(operations, magnitude),
            )
        except ValueError as error:
            raise ValueError(f"--augment {' '.join(words)}: {error}") from None

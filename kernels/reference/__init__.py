"""The kernels in plain PyTorch, in the order of the formulas, for any dtype: the oracle of the tests and the CPU path."""

from .cls_relevance import cls_relevance
from .masked_fill import fill_pixels, masked_fill, normalise, upsample_bilinear
from .patch_select import PatchSelection, normalise_relevance, patch_select

__all__ = [
    "PatchSelection",
    "cls_relevance",
    "fill_pixels",
    "masked_fill",
    "normalise",
    "normalise_relevance",
    "patch_select",
    "upsample_bilinear",
]

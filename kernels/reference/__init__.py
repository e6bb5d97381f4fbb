"""The kernels in plain PyTorch, in the order of the formulas, for any dtype: the reference of the tests and the CPU path."""

from .cls_relevance import cls_relevance
from .counterfactual_batch import counterfactual_batch, top_pixels, upsample_bilinear, upsample_nearest
from .legrad import legrad
from .masked_fill import fill_pixels, masked_fill
from .normalise import normalise
from .patch_select import PatchSelection, normalise_relevance, patch_select

__all__ = [
    "PatchSelection",
    "cls_relevance",
    "counterfactual_batch",
    "fill_pixels",
    "legrad",
    "masked_fill",
    "normalise",
    "normalise_relevance",
    "patch_select",
    "top_pixels",
    "upsample_bilinear",
    "upsample_nearest",
]

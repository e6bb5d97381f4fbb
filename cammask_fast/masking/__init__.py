"""Masking strategies: names, random draws, and the counterfactual batch."""

from cammask_fast.masking.counterfactual import Counterfactual, MaskedInput, counterfactual, masked_input
from cammask_fast.masking.randomness import MaskRandomness, sample_mask_randomness
from cammask_fast.masking.statistics import entropy, mask_share
from cammask_fast.strategy import Strategy, parse_strategy

__all__ = [
    "Counterfactual",
    "MaskRandomness",
    "MaskedInput",
    "Strategy",
    "counterfactual",
    "entropy",
    "mask_share",
    "masked_input",
    "parse_strategy",
    "sample_mask_randomness",
]

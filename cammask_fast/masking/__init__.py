"""Masking strategies: names, random draws, and the counterfactual batch."""

from cammask_fast.masking.counterfactual import Counterfactual, MaskedInput, counterfactual, masked_input
from cammask_fast.masking.draws import Draws, draw_masking
from cammask_fast.masking.strategy import Strategy, parse_strategy

__all__ = [
    "Counterfactual",
    "Draws",
    "MaskedInput",
    "Strategy",
    "counterfactual",
    "draw_masking",
    "masked_input",
    "parse_strategy",
]

"""Which part of the step a generated kernel belongs to, by what it touches and by the operators in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

KINDS = {
    "norm forward": "layer norm forward, residual sums",
    "norm backward": "layer norm backward, residual sums",
    "activation forward": "activation forward",
    "activation backward": "activation backward",
    "column sums": "column sums: bias gradients, norm gradients",
    "packing": "packing of dq, dk, dv and of tokens (cat)",
    "gradients": "gradients: sum of the passes, float32, one tensor",
    "gradient norm": "global gradient norm",
    "weight cast": "weights in the type of the products",
    "optimiser": "AdamW",
    "other": "losses, masks, head and the rest",
}
"""By name, what a kind of kernel does."""
FLAT = ("gradients", "gradient norm", "optimiser")
"""Kinds that update the weights."""
FEW = 0.05
"""Share of a kernel's loads below which its stores are sums."""


class Access(NamedTuple):
    """Elements of one buffer that a launch loads or stores. whole: of the buffer."""

    store: bool
    elements: int
    whole: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{'+' if self.store else '-'}{self.bytes / 1e6:.0f} MB {str(self.dtype).removeprefix('torch.')}"


def classify(accesses: Sequence[Access], ops: Collection[str], reductions: Collection[str], parameters: int) -> str:
    """The kind of a generated kernel.

    Args:
        accesses: its loads and stores.
        ops: names of the ATen operators in it.
        reductions: those of them whose reductions it computes.
        parameters: elements of the one tensor that holds all trained weights, of another size than every activation.

    Returns:
        The name of the kind.
    """
    loaded, stored = (sum(a.bytes for a in accesses if a.store is store) for store in (False, True))
    flat = [a for a in accesses if a.whole == parameters]
    if any(a.store and a.elements == parameters and a.dtype != torch.bfloat16 for a in flat):
        return "optimiser"
    if any(a.store and a.elements == parameters for a in flat):
        return "weight cast"
    if any(a.store for a in flat):
        return "gradients"
    if any(a.elements == parameters for a in flat):
        return "gradient norm" if reductions else "gradients"
    if any(name in ("var_mean", "welford_reduce", "welford_combine") for name in reductions):
        return "norm forward"
    if reductions and stored < FEW * loaded:
        return "column sums"
    if "rsqrt" in ops:
        return "norm backward" if "sum" in ops else "norm forward"
    if {"sigmoid", "erf", "exp"}.intersection(ops):
        backward = "sigmoid" in ops or {"erf", "exp"}.issubset(ops)
        return "activation backward" if backward else "activation forward"
    if "cat" in ops:
        return "packing"
    return "other"

"""What the relevance should take on a card, from the work of its launches: predicted, never measured.

A launch moves bytes, multiplies tiles on the matrix units (padding included), takes exponentials and does some vector
instructions per element of a tile. Each of the four would take a time of its own at the card's rates. If they overlapped
perfectly, the launch would take the longest of them; if not at all, their sum. What is expected lies half-way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from bench.kernels.static import plan, relevance_bytes
from bench.step.static.command import CARDS
from cammask_fast.kernels.cls_relevance import _cls_relevance_statistics_fwd_kernel
from cammask_fast.kernels.launch import Launch
from cammask_fast.viz.tables import markdown_table

LAYERS = 11
"""Of ViT-B/16; the twelfth has one query."""
PER_ELEMENT = {"statistics": 5, "lse": 5, "scratch": 6, "inside": 8}
"""Vector instructions per score: scaling, comparing, selecting, adding, multiplying; counted by hand in the kernels."""


class Units(NamedTuple):
    """cache: TB/s of the L2 cache. exponentials, vectors: operations per second."""

    cache: float
    exponentials: float
    vectors: float


UNITS = {
    "h100": Units(5.5, 132 * 16 * 1.755e9, 132 * 128 * 1.755e9),
    "h200": Units(5.5, 132 * 16 * 1.755e9, 132 * 128 * 1.755e9),
    "a100": Units(4.5, 108 * 16 * 1.41e9, 108 * 64 * 1.41e9),
}
"""Multiprocessors, operations of each per clock, and clock are those of the data sheets; the caches' rates are about what
public microbenchmarks report. None was measured here."""


class Work(NamedTuple):
    """Of some launches. memory: bytes of inputs and outputs, once. moved: bytes of every program's loads and stores."""

    launches: int
    memory: int
    moved: int
    flops: int
    exponentials: int
    vectors: int


class Milliseconds(NamedTuple):
    """overlapped: the longest term of each launch. added: all terms one after the other."""

    overlapped: float
    added: float

    @property
    def expected(self) -> float:
        """Half-way."""
        return (self.overlapped + self.added) / 2


def work_of(launch: Launch) -> Work:
    """The work of one launch over tiles."""
    given = launch.arguments
    is_statistics = launch.kernel is _cls_relevance_statistics_fwd_kernel
    outer, inner = ("BLOCK_Q", "BLOCK_K") if is_statistics else ("BLOCK_K", "BLOCK_Q")
    elements = launch.grid[0] * given[outer] * math.ceil(given["length"] / given[inner]) * given[inner]
    products = 1 if is_statistics else 2
    moved, memory = relevance_bytes(launch)
    vectors = PER_ELEMENT["statistics" if is_statistics else given["STATISTICS"]] * elements
    return Work(1, memory, moved, 2 * products * given["HEAD_DIM"] * elements, elements, vectors)


def variants() -> dict[str, list[Work]]:
    """The launches of one layer at ViT-B/16, bf16, batch 512, by variant. The first is that of version 0.1, which averaged the
    heads in a launch after each layer."""
    by_name = {
        name: [work_of(launch) for launch in plan("cls_relevance", f"ViT-B/16 bf16 {name}")]
        for name in ("tiles layer", "tiles lse layer", "layer", "lse layer")
    }
    (k,) = (launch.arguments["k_ptr"] for launch in plan("cls_relevance", "ViT-B/16 bf16 lse layer"))
    count, heads, length, _ = k.shape
    averaging = 4 * count * length * (heads + 2)
    heads_launch = Work(1, averaging, averaging, 0, 0, 0)
    return {
        "statistics, 64 keys a program, heads": [*by_name["tiles layer"], heads_launch],
        "logsumexp given, 64 keys a program, heads": [*by_name["tiles lse layer"], heads_launch],
        "logsumexp given, 64 keys a program": by_name["tiles lse layer"],
        "all keys a program, statistics inside": by_name["layer"],
        "all keys a program, logsumexp given": by_name["lse layer"],
    }


def predict(works: Sequence[Work], card: str) -> Milliseconds:
    """The time of launches that follow each other.

    Args:
        works: their work.
        card: one of `UNITS`.
    """
    rates, units = CARDS[card], UNITS[card]
    overlapped = added = 0.0
    for work in works:
        terms = [
            max(work.memory / rates.terabytes, work.moved / units.cache) / 1e12,
            work.flops / rates.teraflops / 1e12,
            work.exponentials / units.exponentials,
            work.vectors / units.vectors,
        ]
        overlapped, added = overlapped + max(terms), added + sum(terms)
    return Milliseconds(1e3 * overlapped, 1e3 * added)


def markdown() -> str:
    """A table of the variants, for 11 layers."""
    rows = []
    for name, works in variants().items():
        work = Work(*(LAYERS * sum(values) for values in zip(*works, strict=True)))
        cells = [str(work.launches), f"{work.memory / 1e9:.1f}", f"{work.moved / 1e9:.1f}", f"{work.flops / 1e12:.2f}"]
        cells.append(f"{work.exponentials / 1e9:.1f}")
        for card in UNITS:
            found = predict(works * LAYERS, card)
            cells.append(f"{found.expected:.1f} ({found.overlapped:.1f} to {found.added:.1f})")
        rows.append([name, *cells])
    header = ["relevance of 11 layers", "launches", "GB", "GB through L2", "TFLOP", "10^9 exp"]
    return markdown_table([*header, *(f"{card.upper()}, predicted ms" for card in UNITS)], rows)

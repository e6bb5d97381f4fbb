"""A masking strategy: which patches (object, context, random; by threshold or top-k) and what fills them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from cammask_fast.runtime.suggest import did_you_mean

SELECTIONS = {"Obj": "object", "Ctx": "context", "Rand": "random"}
FILLS = {"No": "none", "Single": "single", "Multi": "multi"}
_NAME = re.compile(r"(Obj|Ctx|Rand)Mask(No|Single|Multi)Fill\((?:(top)=)?([0-9.eE+-]+)(%?)\)")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Selection x fill. Exactly one of threshold (also the random mask's p), top_k and top_share is given."""

    selection: str
    """`object`, `context` or `random`."""
    fill: str
    """`none` (patches removed), `single` (one donor image) or `multi` (a donor per patch)."""
    threshold: float | None = None
    """Threshold on the normalised relevance, in [0, 1]; for `random` the masked share p."""
    top_k: int | None = None
    """Number of patches that count as the object."""
    top_share: float | None = None
    """The same as a share of the patches, rounded down."""
    upsample: str = "nearest"
    """`nearest`, or `bilinear`: the relevance is interpolated to pixels before the comparison (masks by a map, with a fill)."""

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS.values() or self.fill not in FILLS.values():
            raise ValueError(f"unknown strategy {self.selection} x {self.fill}; {known_strategies()}")
        if sum(x is not None for x in (self.threshold, self.top_k, self.top_share)) != 1:
            raise ValueError("a strategy needs exactly one of a threshold, top_k and top_share")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold: expected a value in [0, 1], got {self.threshold}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"k: expected 1..P patches, got {self.top_k}")
        if self.top_share is not None and not 0.0 < self.top_share <= 1.0:
            raise ValueError(f"top: expected a share in (0 %, 100 %], got {self.top_share:.0%}")
        if self.selection == "random" and self.threshold is None:
            raise ValueError("a random mask takes its share p, not top-k: write RandMaskSingleFill(0.5)")
        if self.upsample not in ("nearest", "bilinear"):
            raise ValueError(f"upsample: expected nearest or bilinear, got {self.upsample!r}")
        if self.upsample == "bilinear" and (self.fill == "none" or self.selection == "random"):
            raise ValueError("bilinear up-sampling needs an object or context mask and a fill; use nearest here")

    @property
    def needs_cam(self) -> bool:
        """Whether the mask depends on a relevance map."""
        return self.selection != "random"

    def k(self, patches: int) -> int:
        """The number of object patches of a top-k strategy. Raises ValueError outside 1..patches."""
        k = self.top_k if self.top_k is not None else int(patches * (self.top_share or 0.0))
        if not 1 <= k <= patches:
            raise ValueError(f"k: expected 1..{patches} patches on this model's grid, got {k}")
        return k

    def keep_count(self, patches: int) -> int:
        """Patches that a random no-fill keeps: int(P * (1 - p))."""
        assert self.threshold is not None
        return int(patches * (1 - self.threshold))


def known_strategies() -> str:
    """How strategies are spelled, for messages."""
    return "known: {Obj,Ctx,Rand}Mask{No,Single,Multi}Fill(VALUE), VALUE in [0, 1], or top=K or top=50% for Obj and Ctx"


def parse_strategy(name: str, *, upsample: str = "nearest") -> Strategy:
    """The authors' spelling, `ObjMaskSingleFill(0.3)`, or ours for top-k, `ObjMaskNoFill(top=98)`, `…(top=50%)`.

    Raises ValueError with the list of known strategies.
    """
    match = _NAME.fullmatch(name.replace(" ", "")) if isinstance(name, str) else None
    if match is None:
        kind, _, rest = name.partition("(") if isinstance(name, str) else ("", "", "")
        kinds = [f"{selected}Mask{filled}Fill" for selected in SELECTIONS for filled in FILLS]
        meant = did_you_mean(kind, kinds).removesuffix("?") if rest and kind not in kinds else ""
        raise ValueError(f"unknown masking strategy {name!r}; {known_strategies()}" + (f"{meant}({rest}?" if meant else ""))
    selection, fill, top, value, percent = match.groups()
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name!r}: {value!r} is not a number; {known_strategies()}") from None
    chosen = partial(Strategy, selection=SELECTIONS[selection], fill=FILLS[fill], upsample=upsample)
    if top and percent:
        return chosen(top_share=number / 100)
    if percent or (top and not number.is_integer()):
        raise ValueError(f"{name!r}: write a whole number of patches or top=50%; {known_strategies()}")
    if top:
        return chosen(top_k=int(number))
    return chosen(threshold=number)


_CUT = re.compile(r"(?:(otsu)|(p)([0-9.]+)|(top)=([0-9.]+)(%?)|([0-9.eE+-]+))")
CUTS = "known: a value in [0, 1] of the map divided by its maximum, p70 (a percentile of the map), otsu, top=12 or top=25%"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which patches of a map are the object, image by image."""

    rule: str
    """`value`, `percentile`, `otsu`, `top` (patches) or `share` (of the patches)."""
    number: float = 0.0

    def __post_init__(self) -> None:
        ranges = {"value": (0.0, 1.0), "percentile": (0.0, 100.0), "top": (1.0, float("inf")), "share": (0.0, 1.0)}
        low, high = ranges.get(self.rule, (0.0, 0.0))
        if not low <= self.number <= high or (self.rule == "share" and not self.number):
            raise ValueError(f"threshold: {self.number:g} is no {self.rule} in {low:g} to {high:g}; {CUTS}")

    def __str__(self) -> str:
        words = {"value": f"> {self.number:g}", "percentile": f"above percentile {self.number:g}", "otsu": "Otsu",
                 "top": f"top {self.number:g}", "share": f"top {100 * self.number:g} %"}  # fmt: skip
        return words[self.rule]


def parse_cut(text: str) -> Cut:
    """The rule of a text such as `0.3`, `p70`, `otsu`, `top=12` or `top=25%`. Raises ValueError with the known ones."""
    match = _CUT.fullmatch(text.replace(" ", "").lower())
    try:
        if match is None:
            raise ValueError
        if match[1]:
            return Cut(rule="otsu")
        number = float(match[3] or match[5] or match[7])
    except ValueError:
        raise ValueError(f"unknown threshold {text!r}; {CUTS}") from None
    if match[2]:
        return Cut(rule="percentile", number=number)
    if match[4] and match[6]:
        return Cut(rule="share", number=number / 100)
    if match[4] and not number.is_integer():
        raise ValueError(f"threshold {text!r}: write a whole number of patches, or a share such as top=25%")
    return Cut(rule="top" if match[4] else "value", number=number)


PAPER_STRATEGIES = ("ObjMaskSingleFill(0.3)", "CtxMaskSingleFill(0.5)")


def shown_strategies(masking: str, threshold: str) -> tuple[list[Strategy], Cut | None]:
    """The strategies that are shown of a photograph.

    Args:
        masking: one strategy under the paper's name; with a threshold its kind alone, `ObjMaskNoFill`; empty: the paper's
            single-fill of object and context.
        threshold: a `Cut` instead of the strategies' own thresholds; empty: their own.

    Returns:
        The strategies, and the cut. With one, they take a map of 0 and 1.

    Raises:
        ValueError: for an unknown name or cut, and where the threshold is given twice or there is no map to cut.
    """
    if not threshold:
        return [parse_strategy(name) for name in ([masking] if masking else PAPER_STRATEGIES)], None
    cut = parse_cut(threshold)
    if "(" in masking:
        kind = masking.partition("(")[0]
        raise ValueError(f"--masking {masking} has a threshold of its own: leave out --threshold, or write --masking {kind}")
    kinds = [masking] if masking else [name.partition("(")[0] for name in PAPER_STRATEGIES]
    strategies = [parse_strategy(f"{kind}(0.5)") for kind in kinds]
    if not strategies[0].needs_cam:
        raise ValueError(
            f"--threshold {threshold}: a random mask has no map to cut: write --masking {masking}(0.5) for a share"
        )
    return strategies, cut

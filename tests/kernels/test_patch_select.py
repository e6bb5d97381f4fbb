"""patch_select against loops over patches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cammask_fast.kernels.reference import normalise_relevance, patch_select

VALUES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])  # few values: many ties


def by_loops(row: list[float], *, context: bool, threshold: float | None, top_k: int | None) -> list[bool]:
    """The mask of one image, patch by patch, from the normalised relevance."""
    if threshold is not None:
        chosen = [value > threshold for value in row]
    else:
        assert top_k is not None
        ranks = [sum(other > value or (other == value and j < i) for j, other in enumerate(row)) for i, value in enumerate(row)]
        chosen = [rank < top_k for rank in ranks]
    return [not c for c in chosen] if context else chosen


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 3), patches=st.integers(1, 9), context=st.booleans(), by_rank=st.booleans())
def test_equals_loops_over_patches(data: st.DataObject, count: int, patches: int, context: bool, by_rank: bool) -> None:
    rows = data.draw(st.lists(st.lists(VALUES, min_size=patches, max_size=patches), min_size=count, max_size=count))
    relevance = torch.tensor(rows, dtype=torch.float64)
    threshold = None if by_rank else data.draw(st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]))
    top_k = data.draw(st.integers(1, patches)) if by_rank else None
    selection = patch_select(relevance, context=context, threshold=threshold, top_k=top_k)
    for row, normalised, mask, masked in zip(
        rows, selection.normalised.tolist(), selection.mask, selection.counts, strict=True
    ):
        assert normalised == [value / (max(row) + 1e-8) for value in row]
        assert mask.tolist() == by_loops(normalised, context=context, threshold=threshold, top_k=top_k)
        assert masked == sum(mask)
    if top_k is None:
        assert selection.kept_tokens is None
    else:
        assert selection.kept_tokens is not None
        assert selection.kept_tokens.dtype == torch.int64
        assert selection.kept_tokens.tolist() == [
            [0, *(p + 1 for p in range(patches) if not m[p])] for m in selection.mask.tolist()
        ]


@pytest.mark.parametrize("side", [6, 7, 8, 14])
def test_random_maps_on_real_grids(side: int) -> None:
    relevance = torch.rand(3, side * side, generator=torch.Generator().manual_seed(side))
    k = side * side // 2
    obj, ctx = patch_select(relevance, top_k=k), patch_select(relevance, context=True, top_k=k)
    assert torch.equal(obj.mask, ~ctx.mask)
    assert obj.counts.tolist() == [k] * 3
    assert obj.kept_tokens is not None
    assert ctx.kept_tokens is not None
    kept = torch.cat([obj.kept_tokens[:, 1:], ctx.kept_tokens[:, 1:]], 1)
    assert torch.equal(kept.sort(1).values, torch.arange(1, side * side + 1).expand(3, -1))
    lowest_chosen = obj.normalised.masked_fill(~obj.mask, math.inf).amin(1)
    assert (lowest_chosen > obj.normalised.masked_fill(obj.mask, -math.inf).amax(1)).all()


def test_a_value_at_the_threshold_is_not_masked() -> None:
    relevance = torch.tensor([[1.0, 0.5, 0.25, 0.0]])
    at = normalise_relevance(relevance)[0, 1].item()
    assert patch_select(relevance, threshold=at).mask.tolist() == [[True, False, False, False]]
    assert patch_select(relevance, context=True, threshold=at).mask.tolist() == [[False, True, True, True]]


def test_thresholds_0_and_1() -> None:
    relevance = torch.tensor([[2.0, 0.0, 1.0, 2.0]])
    assert patch_select(relevance, threshold=0.0).mask.tolist() == [[True, False, True, True]]
    assert not patch_select(relevance, threshold=1.0).mask.any()
    assert patch_select(relevance, context=True, threshold=1.0).mask.all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_an_all_zero_map_has_no_object_and_is_all_context(threshold: float) -> None:
    zero = torch.zeros(2, 9)
    selection = patch_select(zero, threshold=threshold)
    assert torch.equal(selection.normalised, zero)
    assert selection.counts.tolist() == [0, 0]
    assert patch_select(zero, context=True, threshold=threshold).counts.tolist() == [9, 9]


def test_ties_of_top_k_go_to_the_lower_index() -> None:
    relevance = torch.tensor([[0.5, 1.0, 0.5, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert patch_select(relevance, top_k=3).mask.tolist() == [
        [True, True, False, True, False],
        [True, True, True, False, False],
    ]


@pytest.mark.parametrize(("k", "masked"), [(1, 1), (9, 9)])
def test_k_1_and_k_p(k: int, masked: int) -> None:
    relevance = torch.rand(2, 9)
    obj, ctx = patch_select(relevance, top_k=k), patch_select(relevance, context=True, top_k=k)
    assert obj.counts.tolist() == [masked] * 2
    assert ctx.counts.tolist() == [9 - masked] * 2
    assert obj.kept_tokens is not None
    assert ctx.kept_tokens is not None
    assert (obj.kept_tokens.shape, ctx.kept_tokens.shape) == ((2, 10 - masked), (2, masked + 1))


def test_strides_do_not_matter() -> None:
    relevance = torch.rand(9, 4).T
    assert not relevance.is_contiguous()
    for by in ({"threshold": 0.4}, {"top_k": 3}):
        ours, expected = patch_select(relevance, **by), patch_select(relevance.contiguous(), **by)
        assert torch.equal(ours.mask, expected.mask)


@pytest.mark.parametrize(
    ("relevance", "arguments", "message"),
    [
        (torch.zeros(2, 3, 3), {"threshold": 0.5}, r"^relevance: expected \(N, P\)"),
        (torch.zeros(2, 9), {"threshold": 1.5}, "^threshold: expected"),
        (torch.zeros(2, 9), {"threshold": -0.1}, "^threshold: expected"),
        (torch.zeros(2, 9), {"threshold": math.nan}, "^threshold: expected"),
        (torch.zeros(2, 9), {"top_k": 0}, r"^k: expected 1\.\.9"),
        (torch.zeros(2, 9), {"top_k": 10}, r"^k: expected 1\.\.9"),
        (torch.zeros(2, 9), {}, "exactly one of threshold and top_k"),
        (torch.zeros(2, 9), {"threshold": 0.5, "top_k": 3}, "exactly one of threshold and top_k"),
    ],
)
def test_bad_arguments_are_named(relevance: Tensor, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_select(relevance, **arguments)  # type: ignore[arg-type]

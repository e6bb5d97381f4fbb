"""patch_select: the reference against loops over patches; then the op and the kernel against the reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from cammask_fast.kernels.backend import INTERPRETED
from cammask_fast.kernels.patch_select import patch_select as kernel_patch_select
from cammask_fast.kernels.patch_select import patch_select_ineligible, plan_patch_select
from cammask_fast.kernels.reference import PatchSelection, normalise_relevance, patch_select

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_equals_a_stable_descending_sort(dtype: torch.dtype) -> None:
    for name, relevance in extreme_maps(49).items():
        ranked = patch_select(relevance.to(dtype), top_k=20)
        order = torch.argsort(ranked.normalised, dim=1, descending=True, stable=True)
        expected = torch.zeros_like(ranked.mask).scatter_(1, order[:, :20], True)
        assert torch.equal(ranked.mask, expected), name
        assert ranked.kept_tokens is not None
        assert torch.equal(ranked.kept_tokens[:, 1:], order[:, 20:].sort(1).values + 1), name


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
        (torch.zeros(2, 3, 3), {"threshold": 0.5}, r"^relevance: expected float32 \(N, P\)"),
        (torch.zeros(2, 9, dtype=torch.int64), {"threshold": 0.5}, "^relevance: expected float32"),
        (torch.zeros(2, 9, dtype=torch.bfloat16), {"threshold": 0.5}, "^relevance: expected float32"),
        (torch.zeros(2, 0), {"threshold": 0.5}, "^relevance: expected float32"),
        (torch.zeros(2, 9), {"threshold": 1.5}, "^threshold: expected"),
        (torch.zeros(2, 9), {"threshold": -0.1}, "^threshold: expected"),
        (torch.zeros(2, 9), {"threshold": math.nan}, "^threshold: expected"),
        (torch.zeros(2, 9), {"top_k": 0}, r"^top_k: expected 1\.\.9"),
        (torch.zeros(2, 9), {"top_k": 10}, r"^top_k: expected 1\.\.9"),
        (torch.zeros(2, 9), {}, "^threshold, top_k: give exactly one"),
        (torch.zeros(2, 9), {"threshold": 0.5, "top_k": 3}, "^threshold, top_k: give exactly one"),
    ],
)
def test_bad_arguments_are_named(relevance: Tensor, arguments: dict[str, float], message: str) -> None:
    for function in (patch_select, kernel_patch_select):
        with pytest.raises(ValueError, match=message):
            function(relevance, **arguments)  # type: ignore[arg-type]


GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*-seed?.npz"))
CHOICES: list[dict[str, Any]] = [
    {"threshold": 0.3},
    {"threshold": 0.0},
    {"threshold": 1.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": "P"},
]


def assert_same(ours: PatchSelection, expected: PatchSelection) -> None:
    """Every field bit for bit; NaN equals NaN."""
    for name, mine, theirs in zip(PatchSelection._fields, ours, expected, strict=True):
        if mine is None or theirs is None:
            assert mine is theirs, name
        else:
            assert mine.dtype == theirs.dtype, name
            assert torch.equal(mine.cpu().nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0)), name


def assert_kernel_equals_reference(relevance: Tensor, device: torch.device, choices: list[dict[str, Any]] = CHOICES) -> None:
    for choice in choices:
        options = {name: relevance.shape[1] if value == "P" else value for name, value in choice.items()}
        if options.get("top_k", 1) <= relevance.shape[1]:
            for context in (False, True):
                ours = kernel_patch_select(relevance.to(device), context=context, **options)
                assert_same(ours, patch_select(relevance, context=context, **options))


def extreme_maps(patches: int) -> dict[str, Tensor]:
    values = torch.rand(2, patches, generator=torch.Generator().manual_seed(patches))
    spike, broken, signed = torch.zeros(2, patches), values.clone(), torch.zeros(2, patches)
    signed[:, ::2] = -0.0
    spike[1, -1] = 3.0
    broken[0, patches // 2] = math.nan
    infinite = values.clone()
    infinite[1, 0] = math.inf
    return {
        "random": values,
        "ties": (values * 4).round() / 4,
        "zero": torch.zeros(2, patches),
        "negative zero": -torch.zeros(2, patches),
        "signed zeros": signed,
        "constant": torch.full((2, patches), 0.25),
        "spike": spike,
        "negative": values - 0.5,
        "huge": values * 1e38,
        "tiny": values * 1e-38,
        "below epsilon": values * 1e-9,
        "NaN": broken,
        "infinite": infinite,
        "both infinities": torch.where(values < 0.3, -math.inf, infinite),
        "minus infinity": torch.full((2, patches), -math.inf),
        "divisor of zero": torch.where(values < 0.5, -1e-8, -2e-8),
        "overflow to infinity": -values * 1e38 - 1e-7,
    }


@pytest.mark.triton
@pytest.mark.parametrize("name", extreme_maps(1))
def test_kernel_equals_the_reference_bit_for_bit_on_extreme_maps(triton_backend: torch.device, name: str) -> None:
    for patches in (1, 9, 49):
        assert_kernel_equals_reference(extreme_maps(patches)[name], triton_backend)


@pytest.mark.triton
@pytest.mark.parametrize("patches", [36, 49, 64, 196, 256, 576])
def test_kernel_on_the_grids_of_real_models(triton_backend: torch.device, patches: int) -> None:
    relevance = torch.rand(3, patches, generator=torch.Generator().manual_seed(0))
    assert_kernel_equals_reference(relevance, triton_backend, [{"threshold": 0.3}, {"top_k": patches // 2}])


@pytest.mark.triton
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 4), patches=st.integers(1, 70), levels=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_kernel_on_any_shape_with_many_ties(
    triton_backend: torch.device, count: int, patches: int, levels: int, seed: int, data: st.DataObject
) -> None:
    relevance = torch.randint(0, levels, (count, patches), generator=torch.Generator().manual_seed(seed)).float() / levels
    assert_kernel_equals_reference(
        relevance, triton_backend, [{"threshold": 0.5}, {"top_k": data.draw(st.integers(1, patches))}]
    )


@pytest.mark.triton
def test_kernel_compares_with_the_threshold_to_the_last_bit(triton_backend: torch.device) -> None:
    for threshold in (0.3, 0.1, 0.7, 1 / 3):
        at = torch.tensor(threshold, dtype=torch.float32)
        around = torch.stack([torch.nextafter(at, at * 0), at, torch.nextafter(at, at * 2), torch.tensor(1.0)])
        assert_kernel_equals_reference(around[None], triton_backend, [{"threshold": threshold}])
        assert_kernel_equals_reference(around[None] * 0.37, triton_backend, [{"threshold": threshold}])


@pytest.mark.triton
def test_kernel_takes_strided_maps(triton_backend: torch.device) -> None:
    wide = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    for view in (wide[:, 1:], wide[:, ::2], wide.T, wide.expand(2, 3, 50)[1]):
        assert_kernel_equals_reference(view, triton_backend, [{"threshold": 0.3}, {"top_k": 2}])


@pytest.mark.triton
def test_kernel_takes_an_empty_batch(triton_backend: torch.device) -> None:
    assert_kernel_equals_reference(torch.empty(0, 9), triton_backend, [{"threshold": 0.3}, {"top_k": 2}])


@pytest.mark.triton
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_kernel_gives_the_authors_masks_bit_for_bit(triton_backend: torch.device, path: Path) -> None:
    arrays = np.load(path)
    for prefix, cam in (("", "cam/mmcam"), ("gradcam_", "cam/gradcam")):
        relevance = torch.from_numpy(arrays[cam]).to(triton_backend)
        for threshold in arrays["mask/thresholds"].tolist():
            obj = kernel_patch_select(relevance, threshold=threshold).mask.cpu()
            assert torch.equal(obj, torch.from_numpy(arrays[f"mask/{prefix}obj_{threshold:g}"]))
            if not prefix:
                ctx = kernel_patch_select(relevance, context=True, threshold=threshold).mask.cpu()
                assert torch.equal(ctx, torch.from_numpy(arrays[f"mask/ctx_{threshold:g}"]))


def test_one_launch() -> None:
    relevance = torch.empty(5, 49, device="meta")
    outputs = (torch.empty(5, 49, device="meta"), torch.empty(5, 49, dtype=torch.bool, device="meta"))
    columns = torch.empty(5, 26, dtype=torch.int64, device="meta")
    counts = torch.empty(5, dtype=torch.int64, device="meta")
    assert len(plan_patch_select(*outputs, counts, columns, relevance, top_k=24)) == 1


@pytest.mark.parametrize("arguments", [(0.3, None, False), (None, 4, True), (None, 9, False)])
def test_the_op_is_registered_as_torch_wants_it(arguments: tuple[Any, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for relevance in (torch.rand(3, 9, generator=generator), torch.rand(9, 3, generator=generator).T, torch.zeros(0, 9)):
        torch.library.opcheck(torch.ops.cammask.patch_select.default, (relevance, *arguments))


def test_compiles_once_for_every_batch_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def both(relevance: Tensor) -> tuple[Tensor, Tensor]:
        kept = kernel_patch_select(relevance * 2, top_k=4).kept_tokens
        assert kept is not None
        return kernel_patch_select(relevance * 2, threshold=0.3).mask.float(), kept + 1

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    for count in (2, 3, 7):
        relevance = torch.rand(count, 9, generator=torch.Generator().manual_seed(count))
        for ours, expected in zip(compiled(relevance), both(relevance), strict=True):
            assert torch.equal(ours, expected)
    assert counter.frame_count == 1


def test_no_matrix_product_is_counted_as_in_the_reference() -> None:
    for function in (patch_select, kernel_patch_select):
        with FlopCounterMode(display=False) as counter:
            function(torch.rand(3, 9), top_k=4)
        assert counter.get_total_flops() == 0


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there Triton can run")
def test_asking_for_triton_without_a_gpu_says_why(triton_backend: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^patch_select: backend 'triton' needs CUDA tensors, got cpu"):
        kernel_patch_select(torch.rand(2, 9), threshold=0.3)


def test_ineligible_inputs() -> None:
    assert patch_select_ineligible(torch.rand(2, 576)) is None
    assert "577 patches" in str(patch_select_ineligible(torch.rand(2, 577)))
    assert "float64" in str(patch_select_ineligible(torch.rand(2, 9, dtype=torch.float64)))

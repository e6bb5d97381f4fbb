"""counterfactual_batch: select, fill and normalise in one launch, against its parts, the reference and the golden fills."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.op_by_op import counterfactual_op_by_op
from cammask_fast.kernels.backend import INTERPRETED
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch, plan_counterfactual_batch
from cammask_fast.kernels.launch import Launch
from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import top_pixels
from cammask_fast.kernels.reference.counterfactual_batch import counterfactual_batch as reference
from cammask_fast.kernels.reference.masked_fill import normalised_fill
from cammask_fast.kernels.reference.patch_select import normalise_relevance, patch_select
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from tests.kernels.test_masked_fill import (
    DTYPES,
    PAIRS,
    SETTINGS,
    SINGLE,
    WORDS,
    Setting,
    as_floats,
    assert_compiles_once,
    assert_twice_as_good,
    batch,
    drawn,
)

kernel = importlib.import_module("cammask_fast.kernels.counterfactual_batch")
GOLDEN = Path(__file__).parent.parent / "golden"
FILLS = {
    "ObjMaskSingleFill": 0.3,
    "CtxMaskSingleFill": 0.5,
    "ObjMaskMultiFill": 0.6,
    "CtxMaskMultiFill": 0.3,
    "RandMaskSingleFill": 0.5,
    "RandMaskMultiFill": 0.5,
}


def relevance_of(setting: Setting, device: torch.device, *, seed: int = 0) -> Tensor:
    """float32 (N, P) in steps of 1/8, so that there are ties; strided where the setting is."""
    shape = ((setting.side // setting.patch) ** 2, setting.count)
    steps = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)) / 8
    return (steps.T if setting.strided else steps.T.contiguous()).to(device)


@pytest.mark.triton
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("choice", [{"threshold": 0.5}, {"top_k": 2}])
@pytest.mark.parametrize("context", [False, True])
def test_kernel_selects_as_patch_select_and_fills(
    triton_backend: torch.device, setting: Setting, choice: dict[str, Any], context: bool
) -> None:
    images, _, single, multi = drawn(setting, triton_backend)
    relevance = relevance_of(setting, triton_backend)
    choice = {"top_k": min(2, relevance.shape[1])} if "top_k" in choice else choice
    mask = patch_select(relevance, context=context, **choice).mask
    for donors, pixels, dtype, layout in (
        (single, images, torch.float32, "nchw"),
        (multi, images, torch.float16, "patches"),
        (None, images, torch.float32, "patches"),
        (single, as_floats(images, torch.float32), torch.float32, "nchw"),
    ):
        gold, pytorch = (normalised_fill(pixels, mask, donors, dtype=kind, layout=layout) for kind in (torch.float64, dtype))
        ours = counterfactual_batch(pixels, relevance, donors, context=context, dtype=dtype, layout=layout, **choice)
        assert_twice_as_good(ours, pytorch, gold)


@pytest.mark.triton
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    setting=st.builds(
        lambda grid, patch, count, strided: Setting(grid * patch, patch, count, strided),
        st.integers(1, 4),
        st.sampled_from([1, 3, 4, 16]),
        st.integers(1, 3),
        st.booleans(),
    ),
    share=st.floats(0, 1),
    by_rank=st.booleans(),
    context=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_selects_on_any_shape(
    triton_backend: torch.device, setting: Setting, share: float, by_rank: bool, context: bool, seed: int
) -> None:
    images, _, single, _ = drawn(setting, triton_backend, seed=seed)
    relevance = relevance_of(setting, triton_backend, seed=seed)
    choice: dict[str, Any] = {"top_k": 1 + int(share * (relevance.shape[1] - 1))} if by_rank else {"threshold": share}
    mask = patch_select(relevance, context=context, **choice).mask
    ours = counterfactual_batch(images, relevance, single, context=context, layout="patches", **choice)
    assert torch.equal(ours, masked_fill(images, mask, single, layout="patches"))


MAPS = {
    "zero": [0.0] * 9,
    "spike": [0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0],
    "equal": [0.25] * 9,
    "signed zeros": [0.0, -0.0, 0.0, -0.0, 1.0, -0.0, 0.0, -0.0, 0.0],
    "negative": [-1.0, -3.0, -0.5, 2.0, -2.0, -0.5, 1.0, -1.0, 0.0],
    "tiny": [1e-30, 2e-30, 0.0, 1e-38, 1e-45, 3e-30, 0.0, 1e-30, 2e-30],
    "huge": [1e38, 2e38, 0.0, 3e38, 1.0, 3e38, 1e-38, 1e38, 2e38],
    "infinite": [math.inf, 1.0, 2.0, math.inf, 0.0, -math.inf, 1.0, 1.0, 1.0],
    "nan": [1.0, math.nan, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 3.0],
}


def assert_selects_as_patch_select(relevance: Tensor, **choice: Any) -> None:
    """On white images of one pixel per patch: masked patches are 0, the others are not. relevance: (1, P)."""
    side = math.isqrt(relevance.shape[1])
    white = torch.full((1, side, side, 3), 255, dtype=torch.uint8, device=relevance.device)
    ours = counterfactual_batch(white, relevance, None, layout="patches", **choice)
    mask = patch_select(relevance, **choice).mask
    assert torch.equal((ours == 0).all(2), mask), choice
    assert torch.equal((ours > 0).all(2), ~mask), choice


@pytest.mark.triton
@pytest.mark.parametrize("name", MAPS)
def test_kernel_selects_as_the_reference_on_extreme_maps(triton_backend: torch.device, name: str) -> None:
    relevance = torch.tensor([MAPS[name]], device=triton_backend)
    choices: list[dict[str, Any]] = [{"threshold": t} for t in (0.0, 0.3, 1.0)] + [{"top_k": k} for k in (1, 4, 9)]
    for choice in choices:
        for context in (False, True):
            assert_selects_as_patch_select(relevance, context=context, **choice)


@pytest.mark.triton
def test_kernel_compares_with_the_threshold_as_pytorch_to_the_last_bit(triton_backend: torch.device) -> None:
    relevance = torch.tensor([[1.0, 0.3, 0.1, 0.7, 0.6, 0.5, 0.2, 0.9, 0.05]], device=triton_backend)
    for value in normalise_relevance(relevance)[0].tolist():
        below = float(np.nextafter(np.float32(value), np.float32(0)))
        for threshold in (value, math.nextafter(value, 0), below):
            assert_selects_as_patch_select(relevance, threshold=min(threshold, 1.0))


@pytest.mark.triton
@pytest.mark.parametrize("grid", [23, 32])
def test_kernel_ranks_large_grids(triton_backend: torch.device, grid: int) -> None:
    steps = torch.randint(0, 50, (1, grid * grid), generator=torch.Generator().manual_seed(0))
    assert_selects_as_patch_select((steps / 8).to(triton_backend), top_k=grid * grid // 2)


@pytest.mark.triton
@pytest.mark.parametrize("setting", [Setting(32, 16), Setting(21, 7), Setting(28, 14), Setting(8, 8, count=1)])
@pytest.mark.parametrize("context", [False, True])
def test_kernel_interpolates_the_map_to_pixels(triton_backend: torch.device, setting: Setting, context: bool) -> None:
    images, _, single, multi = drawn(setting, triton_backend)
    grid, threshold = setting.side // setting.patch, 0.43
    generator = torch.Generator().manual_seed(1)
    relevance = torch.rand(setting.count, grid * grid, generator=generator).to(triton_backend)
    maps = [normalise_relevance(relevance.to(kind)).view(-1, 1, grid, grid) for kind in (torch.float32, torch.float64)]
    pytorch, exact = (torch.nn.functional.interpolate(m, scale_factor=setting.patch, mode="bilinear") for m in maps)
    certain = ((exact - threshold).abs() > 2 * (pytorch - exact).abs().max()).expand(-1, 3, -1, -1)
    assert certain.double().mean() > 0.99
    mask = ((exact > threshold) ^ context)[:, 0]
    for donors in (single, multi, None):
        gold, same = (
            normalised_fill(images, mask, donors, dtype=kind, patch_size=setting.patch)
            for kind in (torch.float64, torch.float32)
        )
        ours = counterfactual_batch(images, relevance, donors, threshold=threshold, context=context, upsample="bilinear")
        assert_twice_as_good(ours[certain], same[certain], gold[certain])
    patches = counterfactual_batch(
        images, relevance, None, threshold=threshold, context=context, upsample="bilinear", layout="patches"
    )
    unfolded = torch.nn.functional.unfold(ours, setting.patch, stride=setting.patch).mT
    assert torch.equal(patches, unfolded)  # of the last, donors None


def by_a_stable_sort(relevance: Tensor, top_k: int, *, grid: int, patch: int) -> Tensor:
    """bool (N, H, W): pixel by pixel between its four patches, then a sort that leaves ties in their order."""

    def between(pixel: int) -> tuple[int, int, np.float32]:
        centre = pixel // patch
        position = (np.float32(pixel % patch) + np.float32(0.5)) / np.float32(patch)
        first, weight = (
            (centre - 1, position + np.float32(0.5))
            if 2 * (pixel % patch) + 1 < patch
            else (centre, position - np.float32(0.5))
        )
        return max(first, 0), min(first + 1, grid - 1), weight

    def mixed(a: Any, b: Any, w: np.float32) -> Any:
        return a + w * (b - a)

    masks, places = [], [between(pixel) for pixel in range(grid * patch)]
    for image in relevance.view(-1, grid, grid).cpu().numpy():
        values = [
            mixed(mixed(image[t, e], image[t, r], w), mixed(image[b, e], image[b, r], w), v)
            for t, b, v in places
            for e, r, w in places
        ]
        c = np.array(values, np.float32) / (image.max() + np.float32(1e-8))
        order = np.argsort(-c, kind="stable")
        masks.append(np.isin(np.arange(len(c)), order[: top_k * patch**2]).reshape(grid * patch, grid * patch))
    return torch.from_numpy(np.stack(masks))


TOP_MAPS = {
    "random": lambda grid: torch.rand(3, grid * grid, generator=torch.Generator().manual_seed(2)),
    "ties": lambda grid: torch.randint(0, 3, (3, grid * grid), generator=torch.Generator().manual_seed(3)).float(),
    "even": lambda grid: torch.ones(3, grid * grid),
    "zero": lambda grid: torch.zeros(3, grid * grid),
    "signs": lambda grid: torch.randn(3, grid * grid, generator=torch.Generator().manual_seed(4)),
}


@pytest.mark.parametrize("name", TOP_MAPS)
@pytest.mark.parametrize(("grid", "patch"), [(3, 5), (2, 8), (1, 4)])
def test_top_pixels_are_the_highest_with_ties_to_the_lower_index(name: str, grid: int, patch: int) -> None:
    relevance = TOP_MAPS[name](grid)
    for top_k in {1, (grid * grid + 1) // 2, grid * grid}:
        mask = top_pixels(relevance, top_k, grid=grid, patch_size=patch)
        assert torch.equal(mask, by_a_stable_sort(relevance, top_k, grid=grid, patch=patch))
        assert mask.flatten(1).sum(1).tolist() == [top_k * patch**2] * 3
    nan = relevance.clone()
    nan[1, 0] = torch.nan
    mask = top_pixels(nan, 1, grid=grid, patch_size=patch)[1].flatten()
    assert mask.nonzero()[:, 0].tolist() == list(range(patch**2)), "all tie"


@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "setting", "top_k", "context", "fill", "layout"),
    [
        ("random", Setting(48, 16, count=1), 4, False, "constant", "nchw"),
        ("ties", Setting(15, 5, count=3), 5, True, "multi", "patches"),
        ("signs", Setting(14, 7, count=1), 2, False, "constant", "patches"),
        ("even", Setting(8, 4, count=2), 3, True, "single", "nchw"),
        ("zero", Setting(4, 4, count=1), 1, False, "constant", "nchw"),
    ],
)
def test_kernel_takes_the_top_pixels_of_the_reference_bit_for_bit(
    triton_backend: torch.device, name: str, setting: Setting, top_k: int, context: bool, fill: str, layout: str
) -> None:
    """More pixels than a block; where there are three images, the map of one has a NaN. The interpreter takes its time."""
    images, _, single, multi = drawn(setting, triton_backend)
    grid = setting.side // setting.patch
    relevance = TOP_MAPS[name](grid)[: setting.count].to(triton_backend)
    relevance[2:, -1] = torch.nan
    spread, donors = torch.stack([relevance, relevance], -1)[..., 0], {"single": single, "multi": multi, "constant": None}[fill]
    if name == "signs":
        images = images.permute(0, 3, 1, 2).float() / 255
    ours = counterfactual_batch(images, spread, donors, top_k=top_k, context=context, upsample="bilinear", layout=layout)
    mask = top_pixels(relevance, top_k, grid=grid, patch_size=setting.patch) ^ context
    expected = normalised_fill(images, mask, donors, layout=layout, patch_size=setting.patch)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.triton
def test_top_pixels_of_a_donor_outside_the_batch_are_nan_and_rows_may_begin_later(triton_backend: torch.device) -> None:
    setting = Setting(8, 4, count=3)
    images, _, single, _ = drawn(setting, triton_backend)
    relevance, first = TOP_MAPS["random"](2)[:1].to(triton_backend), torch.tensor(2, device=triton_backend)
    options: dict[str, Any] = {"top_k": 1, "upsample": "bilinear", "first": first}
    filled = counterfactual_batch(images, relevance, single[:1] * 0 + 3, **options)
    mask = top_pixels(relevance, 1, grid=2, patch_size=4)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(filled.isnan(), mask)
    torch.testing.assert_close(filled[~mask], normalise(images)[2:][~mask])


@pytest.mark.triton
def test_kernel_bilinear_at_thresholds_0_and_1(triton_backend: torch.device) -> None:
    images, _, single, _ = drawn(Setting(21, 7), triton_backend)
    relevance = relevance_of(Setting(21, 7), triton_backend) + 0.5
    clean = normalise(images)
    nothing = counterfactual_batch(images, relevance, single, threshold=1.0, upsample="bilinear")
    assert torch.equal(nothing, clean)
    everything = counterfactual_batch(images, relevance, single, threshold=0.0, upsample="bilinear")
    assert torch.equal(everything, clean[single])
    assert torch.equal(counterfactual_batch(images, 0 * relevance, single, threshold=0.0, upsample="bilinear"), clean)


@pytest.mark.triton
def test_kernel_writes_nan_for_a_donor_outside_the_batch(triton_backend: torch.device) -> None:
    for setting in (WORDS, PAIRS, SINGLE):
        images, _, single, _ = drawn(setting, triton_backend)
        relevance = relevance_of(setting, triton_backend)
        for outside, upsample in ((-1, "nearest"), (3, "bilinear")):
            filled = counterfactual_batch(images, relevance, single * 0 + outside, threshold=0.5, upsample=upsample)
            constant = counterfactual_batch(images, relevance, None, threshold=0.5, upsample=upsample)
            clean = normalise(images)
            masked = filled.isnan()
            assert torch.equal(filled[~masked], clean[~masked])
            assert torch.equal(masked & (clean != 0), (constant != clean) & (clean != 0))


@pytest.mark.triton
@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("name", ["tiny-seed0", "mid-seed0"])
def test_golden_fills_bit_for_bit(triton_backend: torch.device, name: str, kind: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith((f"fill/{kind}/", "cam/"))}
        images = torch.from_numpy(arrays["images_u8"]).permute(0, 2, 3, 1).contiguous().to(triton_backend)
    count, fill = len(images), f"fill/{kind}"
    if "Single" in kind:
        donors = golden[f"{fill}/idx"].to(triton_backend)
    else:
        shift = golden[f"{fill}/idx_shift"].view(count, -1)
        donors = ((torch.arange(count)[:, None] + shift) % count).to(triton_backend)
    if "Rand" in kind:
        uniform = golden[f"{fill}/p"].view(count, -1).to(triton_backend)
        filled = masked_fill(images, uniform < FILLS[kind], donors)
    else:
        cam = golden["cam/mmcam"].to(triton_backend)
        filled = counterfactual_batch(images, cam, donors, threshold=FILLS[kind], context=kind.startswith("Ctx"))
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    pixels = ((filled.cpu() * std + mean) * 255).round().to(torch.uint8)
    assert torch.equal(pixels, golden[f"{fill}/images_u8"])


@pytest.mark.triton
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.5},
        {"top_k": 2, "context": True},
        {"threshold": 0.5, "upsample": "bilinear"},
    ],
)
def test_everything_is_one_launch(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    launched: list[Launch] = []
    run = kernel.run

    def counting(launches: list[Launch]) -> None:
        launched.extend(launches)
        run(launches)

    monkeypatch.setattr(kernel, "run", counting)
    images, _, single, _ = drawn(PAIRS, triton_backend)
    counterfactual_batch(images, relevance_of(PAIRS, triton_backend), single, **options)
    assert len(launched) == 1


def test_top_pixels_are_one_launch_of_a_program_per_image() -> None:
    images, relevance = torch.empty(8, 224, 224, 3, dtype=torch.uint8, device="meta"), torch.empty(4, 49, device="meta")
    out = torch.empty(4, 3, 224, 224, device="meta")
    (launch,) = plan_counterfactual_batch(out, images, relevance, None, top_k=10, upsample="bilinear", context=True)
    assert launch.grid == (4,)
    assert set(launch.arguments) == set(launch.kernel.arg_names)
    given = {name: launch.arguments[name] for name in ("chosen", "context", "count", "GRID", "PATCH")}
    assert given == {"chosen": 10 * 32 * 32, "context": 1, "count": 8, "GRID": 7, "PATCH": 32}
    assert 2 ** launch.arguments["STEPS"] >= 224 * 224


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize("patch", [14, 16])
def test_the_plan_needs_no_memory_and_is_one_launch(side: int, patch: int) -> None:
    count, patches = 512, (side // patch) ** 2
    images = torch.empty(count, side, side, 3, dtype=torch.uint8, device="meta")
    relevance = torch.empty(count, patches, device="meta")
    donors = torch.empty(count, dtype=torch.int64, device="meta")
    out = torch.empty(count, patches, 3 * patch**2, dtype=torch.bfloat16, device="meta")
    (launch,) = plan_counterfactual_batch(out, images, relevance, donors, threshold=0.3, layout="patches")
    assert set(launch.arguments) == set(launch.kernel.arg_names)
    assert launch.arguments["PIXELS"] == ("words" if patch == 16 else "pairs")
    rows = launch.grid[0] / count
    assert rows * launch.arguments["BLOCK_Y"] >= side
    assert launch.arguments["BLOCK_X"] * launch.arguments["BLOCK_G"] * launch.arguments["GROUP"] >= side


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.5}, {"top_k": 3}, {"threshold": 0.5, "upsample": "bilinear"}, {"top_k": 3, "upsample": "bilinear"}],
)
@pytest.mark.parametrize("context", [False, True])
def test_the_op_on_a_cpu_is_the_reference_bit_for_bit(options: dict[str, Any], context: bool) -> None:
    images, _, single, multi = drawn(PAIRS, torch.device("cpu"))
    relevance = relevance_of(PAIRS, torch.device("cpu"))
    for donors in (single, multi, None):
        for dtype in (*DTYPES, torch.float64):
            ours = counterfactual_batch(images, relevance, donors, context=context, dtype=dtype, layout="patches", **options)
            expected = reference(images, relevance, donors, context=context, dtype=dtype, layout="patches", **options)
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("patch", [16, 14, 7])
def test_the_reference_is_the_op_by_op_formulation_bit_for_bit(patch: int) -> None:
    setting = Setting(3 * patch, patch, count=5)
    images, _, single, _ = drawn(setting, torch.device("cpu"))
    relevance = relevance_of(setting, torch.device("cpu"))
    expected = counterfactual_op_by_op(images, relevance, single, 0.4)
    assert torch.equal(counterfactual_batch(images, relevance, single, threshold=0.4), expected)


def test_bilinear_differs_from_nearest_and_selects_smoothly() -> None:
    images, _, _, _ = drawn(Setting(16, 8, count=1), torch.device("cpu"))
    relevance = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    filled = counterfactual_batch(images, relevance, None, threshold=0.5, upsample="bilinear")
    nearest = counterfactual_batch(images, relevance, None, threshold=0.5)
    masked = (filled[0] == 0).all(0)
    assert 0 < masked.sum() < (nearest[0] == 0).all(0).sum() == 64
    assert masked[0, 0]
    assert not masked[7, 7]


IMAGES = batch(2, 8, floating=False)
RELEVANCE = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
DONORS = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "arguments",
    [
        (IMAGES, RELEVANCE, DONORS, 0.3, None, False, "nearest", torch.float32, "nchw", None),
        (IMAGES, RELEVANCE, DONORS, 0.3, None, True, "bilinear", torch.float16, "patches", None),
        (IMAGES, RELEVANCE, None, None, 5, True, "nearest", torch.bfloat16, "patches", [0.0, 0.5, 1.0]),
    ],
)
def test_the_op_is_registered_as_torch_wants_it(arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.cammask.counterfactual_batch.default, arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.5},
        {"top_k": 3, "context": True, "layout": "patches"},
        {"threshold": 0.5, "upsample": "bilinear", "dtype": torch.bfloat16},
    ],
)
def test_compiles_once_for_every_batch_size(options: dict[str, Any]) -> None:
    def inputs(count: int) -> tuple[Tensor, ...]:
        setting = Setting(32, 8, count)
        images, _, single, _ = drawn(setting, torch.device("cpu"))
        return images, relevance_of(setting, torch.device("cpu")), single

    assert_compiles_once(lambda images, relevance, donors: counterfactual_batch(images, relevance, donors, **options), inputs)


def test_no_matrix_product_is_counted_as_in_the_reference() -> None:
    for function in (counterfactual_batch, reference):
        with FlopCounterMode(display=False) as counter:
            function(IMAGES, RELEVANCE, DONORS, threshold=0.5)
        assert counter.get_total_flops() == 0


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there Triton can run")
def test_asking_for_triton_without_a_gpu_says_why(triton_backend: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^counterfactual_batch: backend 'triton' needs CUDA tensors, got cpu"):
        counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: counterfactual_batch(IMAGES[0], RELEVANCE, DONORS, threshold=0.5), "^images: expected uint8"),
        (lambda: counterfactual_batch(IMAGES[:, :4], RELEVANCE, DONORS, threshold=0.5), "^images: expected square"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE[0], DONORS, threshold=0.5), r"^relevance: expected float32 \(2, P\)"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE[:1], DONORS, threshold=0.5), r"^relevance: expected float32 \(2, P\)"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE.half(), DONORS, threshold=0.5), "^relevance: expected float32"),
        (
            lambda: counterfactual_batch(IMAGES, RELEVANCE[:, :15], DONORS, threshold=0.5),
            "^relevance: 15 patches are no square",
        ),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE[:, :9], DONORS, threshold=0.5), "^relevance: 9 patches are no square"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE.to("meta"), DONORS, threshold=0.5), "^relevance: expected the device"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS), "^threshold, top_k: give exactly one"),
        (
            lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=0.5, top_k=2),
            "^threshold, top_k: give exactly one",
        ),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=1.5), r"^threshold: expected a value in \[0, 1\]"),
        (
            lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=math.nan),
            r"^threshold: expected a value in \[0, 1\]",
        ),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, top_k=0), r"^top_k: expected 1\.\.16 patches"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, top_k=17), r"^top_k: expected 1\.\.16 patches"),
        (
            lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=0.5, upsample="cubic"),
            "^upsample: expected nearest",
        ),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=0.5, layout="chw"), "^layout: expected one of"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=0.5, dtype=torch.uint8), "^dtype: expected float32"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS[:1], threshold=0.5), r"^donors: expected int64 \(2,\)"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS.int(), threshold=0.5), r"^donors: expected int64 \(2,\)"),
        (lambda: counterfactual_batch(IMAGES, RELEVANCE, DONORS, threshold=0.5, constant=(0, 0, 0)), "^constant: give donors"),
        (
            lambda: counterfactual_batch(IMAGES, RELEVANCE, None, threshold=0.5, constant=(0, 0, 9)),
            "^constant: expected an RGB",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("patch", [16, 14, 3])
@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
def test_some_of_the_images_only_donate(patch: int, multi: bool, upsample: str) -> None:
    images, relevance, donors = pool_of(patch, multi=multi)
    assert_rows_of_the_whole(images, relevance, donors, upsample=upsample, threshold=0.4)


@pytest.mark.triton
@pytest.mark.parametrize("patch", [16, 14, 3])
@pytest.mark.parametrize("options", [{"threshold": 0.4}, {"threshold": 0.4, "upsample": "bilinear"}, {"top_k": 3}])
def test_kernel_with_images_that_only_donate(triton_backend: torch.device, patch: int, options: dict[str, Any]) -> None:
    images, relevance, donors = (tensor.to(triton_backend) for tensor in pool_of(patch, multi=True))
    assert_rows_of_the_whole(images, relevance, donors, **options)


def pool_of(patch: int, *, multi: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (7, 3 * patch, 3 * patch, 3), dtype=torch.uint8, generator=generator)
    donors = torch.randint(0, 7, (7, 9) if multi else (7,), generator=generator)
    return images, torch.rand(7, 9, generator=generator), donors


def assert_rows_of_the_whole(images: Tensor, relevance: Tensor, donors: Tensor, **options: Any) -> None:
    """Rows 2..5 of a batch of seven, whose donors are all over it, are what the whole batch has there."""
    first = torch.tensor(2, device=images.device)
    for layout in ("nchw", "patches"):
        whole = counterfactual_batch(images, relevance, donors, layout=layout, **options)
        part = counterfactual_batch(images, relevance[2:5], donors[2:5], first=first, layout=layout, **options)
        torch.testing.assert_close(part, whole[2:5], rtol=0, atol=0)
        mask = relevance > 0.5
        whole = masked_fill(images, mask, donors, layout=layout)
        torch.testing.assert_close(
            masked_fill(images, mask[2:5], donors[2:5], first=first, layout=layout), whole[2:5], rtol=0, atol=0
        )


def assert_constant_rows_of_the_whole(images: Tensor, relevance: Tensor) -> None:
    mask, first = relevance > 0.5, torch.tensor(2, device=images.device)
    part = masked_fill(images, mask[2:5], None, first=first, layout="patches")
    torch.testing.assert_close(part, masked_fill(images, mask, None, layout="patches")[2:5], rtol=0, atol=0)


def test_images_that_are_not_shown_with_a_colour() -> None:
    assert_constant_rows_of_the_whole(*pool_of(4, multi=False)[:2])


@pytest.mark.triton
def test_kernel_with_images_that_are_not_shown_and_a_colour(triton_backend: torch.device) -> None:
    assert_constant_rows_of_the_whole(*(tensor.to(triton_backend) for tensor in pool_of(4, multi=False)[:2]))


@pytest.mark.triton
@pytest.mark.parametrize("start", [-1, 5, 2**40])
@pytest.mark.parametrize("filled", ["donors", "constant"])
def test_kernel_writes_nan_where_the_own_image_is_none(triton_backend: torch.device, filled: str, start: int) -> None:
    """What is masked has its donor or colour; nothing is read outside the images."""
    images, relevance, donors = (tensor.to(triton_backend) for tensor in pool_of(4, multi=False))
    first, mask = torch.tensor(start, device=triton_backend), relevance[:3] > 0.5
    given = donors[:3] if filled == "donors" else None
    found = masked_fill(images, mask, given, first=first, layout="patches")
    outside = torch.arange(3, device=triton_backend)[:, None] + start
    lost = ((outside < 0) | (outside >= 7)) & ~mask
    assert lost.any()
    assert torch.equal(found.isnan().all(2), lost)
    assert torch.equal(found.isnan().any(2), lost)


@pytest.mark.parametrize("start", [-1, 5])
def test_a_first_image_outside_the_batch_is_refused(start: int) -> None:
    images, relevance, donors = pool_of(4, multi=False)
    first, inside = torch.tensor(start), torch.tensor(1)
    for wrong in (torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match=r"first: expected int64 \(\) on cpu"):
            masked_fill(images, relevance[:3] > 0.5, donors[:3], first=wrong)
    with pytest.raises(ValueError, match=r"first: expected 0\.\.4 for 3 of 7 images"):
        masked_fill(images, relevance[:3] > 0.5, None, first=first)
    with pytest.raises(ValueError, match=r"first: expected 0\.\.4 for 3 of 7 images"):
        counterfactual_batch(images, relevance[:3], donors[:3], threshold=0.5, first=first)
    with pytest.raises(ValueError, match=r"relevance: expected float32 \(7, P\)"):
        counterfactual_batch(images, relevance[:3], donors[:3], threshold=0.5)
    with pytest.raises(ValueError, match=r"donors: expected int64 \(3,\)"):
        counterfactual_batch(images, relevance[:3], donors, threshold=0.5, first=inside)
    with pytest.raises(ValueError, match=r"0\.\.6"):
        counterfactual_batch(images, relevance[:3], donors[:3] + 7, threshold=0.0, first=inside)

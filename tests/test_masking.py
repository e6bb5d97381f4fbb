"""Strategies, draws and the counterfactual batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import patch_select
from cammask_fast.masking import (
    MaskRandomness,
    Strategy,
    counterfactual,
    mask_share,
    masked_input,
    parse_strategy,
    sample_mask_randomness,
)

PAPER = {
    "RandMaskNoFill(0.75)": ("random", "none", 0.75),
    "RandMaskSingleFill(0.5)": ("random", "single", 0.5),
    "RandMaskMultiFill(0.5)": ("random", "multi", 0.5),
    "ObjMaskNoFill(0.3)": ("object", "none", 0.3),
    "ObjMaskSingleFill(0.3)": ("object", "single", 0.3),
    "ObjMaskMultiFill(0.6)": ("object", "multi", 0.6),
    "CtxMaskNoFill(0.6)": ("context", "none", 0.6),
    "CtxMaskSingleFill(0.5)": ("context", "single", 0.5),
    "CtxMaskMultiFill(0.3)": ("context", "multi", 0.3),
}
GRID, COUNT, PATCH = 3, 4, 2
KNOWN = r"known: \{Obj,Ctx,Rand\}Mask\{No,Single,Multi\}Fill\(VALUE\)"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> Tensor:
    side = GRID * PATCH
    return torch.randint(0, 256, (COUNT, side, side, 3), generator=seeded(), dtype=torch.uint8)


def relevance() -> Tensor:
    return torch.rand(COUNT, GRID * GRID, generator=seeded(1))


def draw(name: str, seed: int = 0, *, count: int = COUNT, patches: int = GRID * GRID) -> MaskRandomness:
    return sample_mask_randomness(parse_strategy(name), count=count, patches=patches, generator=seeded(seed))


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_names_parse(name: str) -> None:
    strategy = parse_strategy(name)
    assert (strategy.selection, strategy.fill, strategy.threshold) == PAPER[name]
    assert strategy.needs_cam == (not name.startswith("Rand"))
    assert parse_strategy(f" {name.replace('(', ' ( ')} ") == strategy
    assert Strategy(selection=strategy.selection, fill=strategy.fill, threshold=strategy.threshold) == strategy


@pytest.mark.parametrize(
    ("name", "patches", "k"),
    [
        ("ObjMaskNoFill(top=98)", 196, 98),
        ("ObjMaskNoFill(top=50%)", 49, 24),
        ("CtxMaskSingleFill(top=50%)", 196, 98),
        ("CtxMaskMultiFill(top=1)", 49, 1),
        ("ObjMaskSingleFill(top=100%)", 49, 49),
    ],
)
def test_top_k_counts_patches_or_takes_a_share_rounded_down(name: str, patches: int, k: int) -> None:
    assert parse_strategy(name).k(patches) == k


@pytest.mark.parametrize(("share", "patches", "kept"), [(0.6, 9, 3), (0.75, 49, 12), (0.5, 49, 24), (0.0, 9, 9), (1.0, 9, 0)])
def test_a_random_no_fill_keeps_a_share_rounded_down(share: float, patches: int, kept: int) -> None:
    assert parse_strategy(f"RandMaskNoFill({share})").keep_count(patches) == kept


@pytest.mark.parametrize(
    "name",
    [
        "", "none", "ObjMask", "ObjMaskSingleFill", "ObjMaskSingleFill()", "objmasksinglefill(0.3)", "ObjMaskDoubleFill(0.3)",
        "ObjMaskSingleFill(x)", "ObjMaskSingleFill(nan)", "ObjMaskSingleFill(.)", "ObjMaskSingleFill(1.2.3)",
        "ObjMaskSingleFill(0.3)x", "ObjMaskSingleFill(k=3)", "ObjMaskSingleFill(30%)", "ObjMaskNoFill(top=2.5)",
        "ObjMaskNoFill(top=1e400)",
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_list_of_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=KNOWN):
        parse_strategy(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ObjMaskSingleFill(1.5)", r"threshold: expected a value in \[0, 1\], got 1.5"),
        ("CtxMaskNoFill(-0.1)", "threshold: expected"),
        ("ObjMaskNoFill(top=0)", "k: expected 1..P"),
        ("ObjMaskNoFill(top=-3)", "k: expected 1..P"),
        ("ObjMaskNoFill(top=0%)", "top: expected a share"),
        ("ObjMaskNoFill(top=101%)", "top: expected a share"),
        ("RandMaskSingleFill(top=3)", "a random mask takes its share p"),
        ("RandMaskSingleFill(top=50%)", "a random mask takes its share p"),
    ],
)
def test_values_out_of_range_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_strategy(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": "cow", "fill": "none", "threshold": 0.3}, KNOWN),
        ({"selection": "object", "fill": "noise", "threshold": 0.3}, KNOWN),
        ({"selection": "object", "fill": "none"}, "exactly one of"),
        ({"selection": "object", "fill": "none", "threshold": 0.3, "top_k": 3}, "exactly one of"),
        ({"selection": "object", "fill": "none", "threshold": math.nan}, "threshold: expected"),
        ({"selection": "object", "fill": "single", "threshold": 0.3, "upsample": "cubic"}, "nearest or bilinear"),
    ],
)
def test_strategies_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Strategy(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ObjMaskNoFill(top=3)", "ObjMaskNoFill(0.3)", "RandMaskSingleFill(0.5)"])
def test_bilinear_is_refused_where_it_has_no_meaning(name: str) -> None:
    with pytest.raises(ValueError, match="bilinear up-sampling needs an object or context mask and a fill"):
        parse_strategy(name, upsample="bilinear")


def test_k_larger_than_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k: expected 1..49 patches on this model's grid, got 98"):
        parse_strategy("ObjMaskNoFill(top=98)").k(49)
    with pytest.raises(ValueError, match=r"k: expected 1..49 patches on this model's grid, got 0"):
        parse_strategy("ObjMaskNoFill(top=1%)").k(49)


@pytest.mark.parametrize("name", PAPER)
def test_the_same_seed_draws_the_same_and_another_seed_does_not(name: str) -> None:
    first, again, other = (draw(name, seed, count=8, patches=49) for seed in (3, 3, 4))
    present = [i for i, tensor in enumerate(first[:3]) if tensor is not None]
    for i in present:
        assert torch.equal(first[i], again[i])  # type: ignore[arg-type]
    assert not present or any(not torch.equal(first[i], other[i]) for i in present)  # type: ignore[arg-type]
    uses = {"random": {0}, "object": set(), "context": set()}[PAPER[name][0]]
    uses = {2} if name.startswith("RandMaskNo") else uses | ({1} if PAPER[name][1] != "none" else set())
    assert set(present) == uses


def test_the_generator_alone_decides_and_advances() -> None:
    torch.manual_seed(0)
    state, generator = torch.get_rng_state(), seeded()
    strategy = parse_strategy("RandMaskMultiFill(0.5)")
    first, second = (sample_mask_randomness(strategy, count=4, patches=9, generator=generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.uniform is not None
    assert second.uniform is not None
    assert not torch.equal(first.uniform, second.uniform)


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_donors_single_fill_is_a_permutation_and_multi_fill_never_the_image_itself(count: int) -> None:
    for seed in range(5):
        single, multi = draw("ObjMaskSingleFill(0.3)", seed, count=count), draw("ObjMaskMultiFill(0.3)", seed, count=count)
        assert single.donors is not None
        assert single.donors.sort().values.tolist() == list(range(count))
        assert multi.donors is not None
        assert multi.donors.shape == (count, 9)
        assert ((multi.donors >= 0) & (multi.donors < count)).all()
        assert (multi.donors != torch.arange(count)[:, None]).all()


def test_multi_fill_uses_every_other_image_equally_often() -> None:
    donors = draw("ObjMaskMultiFill(0.3)", count=5, patches=4000).donors
    assert donors is not None
    for n in range(5):
        shares = donors[n].bincount(minlength=5) / 4000
        assert shares[n] == 0
        assert (shares[[m for m in range(5) if m != n]] - 0.25).abs().max() < 0.03


def test_random_no_fill_keeps_a_random_set_in_ascending_order() -> None:
    kept = draw("RandMaskNoFill(0.75)", count=400, patches=49).kept_tokens
    assert kept is not None
    assert kept.shape == (400, 13)
    assert not kept[:, 0].any(), "CLS first"
    kept = kept[:, 1:] - 1
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert (kept.flatten().bincount(minlength=49) / 400 - 12 / 49).abs().max() < 0.09


@pytest.mark.parametrize("fill", ["Single", "Multi"])
def test_a_batch_of_one_has_no_donor(fill: str) -> None:
    with pytest.raises(ValueError, match=f"{fill.lower()}-fill takes patches from other images: the batch needs at least 2"):
        draw(f"ObjMask{fill}Fill(0.3)", count=1)
    assert draw("RandMaskNoFill(0.5)", count=1).kept_tokens is not None


@pytest.mark.parametrize("name", ["ObjMaskSingleFill(0.4)", "CtxMaskMultiFill(0.4)", "RandMaskSingleFill(0.5)"])
def test_every_pixel_comes_from_the_image_or_from_its_donor(name: str) -> None:
    strategy, draws, pixels = parse_strategy(name), draw(name), images()
    cam = relevance() if strategy.needs_cam else None
    result = counterfactual(pixels, cam, strategy, draws, grid=GRID)
    assert draws.donors is not None
    assert 0 < result.mask.sum() < result.mask.numel()
    for n in range(COUNT):
        for p in range(GRID * GRID):
            donor = draws.donors[n] if draws.donors.ndim == 1 else draws.donors[n, p]
            rows, columns = (
                slice(p // GRID * PATCH, p // GRID * PATCH + PATCH),
                slice(p % GRID * PATCH, p % GRID * PATCH + PATCH),
            )
            source = pixels[donor if result.mask[n, p] else n, rows, columns]
            assert torch.equal(result.images[n, rows, columns], source)


def test_object_and_context_masks_are_complements() -> None:
    for value in ("0.4", "top=4", "top=50%"):
        obj, ctx = (
            counterfactual(images(), relevance(), parse_strategy(f"{s}MaskNoFill({value})"), MaskRandomness(), grid=GRID).mask
            for s in ("Obj", "Ctx")
        )
        assert obj is not None
        assert ctx is not None
        assert torch.equal(obj, ~ctx)


def test_no_fill_leaves_the_images_and_names_what_to_drop() -> None:
    pixels, cam = images(), relevance()
    by_threshold = parse_strategy("ObjMaskNoFill(0.4)")
    threshold = masked_input(pixels, cam, by_threshold, MaskRandomness(), grid=GRID)
    assert threshold.pixels is None
    assert threshold.kept_tokens is not None
    assert threshold.key_mask is not None
    shown = counterfactual(pixels, cam, by_threshold, MaskRandomness(), grid=GRID)
    assert shown.images is pixels
    for tokens, hidden, mask in zip(threshold.kept_tokens, threshold.key_mask, shown.mask, strict=True):
        kept = (~mask).nonzero()[:, 0] + 1
        assert tokens[: len(kept) + 1].tolist() == [0, *kept.tolist()], "CLS, then the kept patches in their order"
        assert sorted(tokens.tolist()) == list(range(GRID * GRID + 1))
        assert hidden.tolist() == [i >= len(kept) for i in range(GRID * GRID)]
    ranked = masked_input(pixels, cam, parse_strategy("ObjMaskNoFill(top=4)"), MaskRandomness(), grid=GRID)
    assert ranked.key_mask is None
    assert ranked.kept_tokens is not None
    assert ranked.kept_tokens.shape == (COUNT, 6)
    draws = draw("RandMaskNoFill(0.75)")
    at_random = parse_strategy("RandMaskNoFill(0.75)")
    dropped = masked_input(pixels, None, at_random, draws, grid=GRID)
    assert dropped.pixels is None
    assert dropped.kept_tokens is draws.kept_tokens
    assert draws.kept_tokens is not None
    mask = counterfactual(pixels, None, at_random, draws, grid=GRID).mask
    assert not mask.gather(1, draws.kept_tokens[:, 1:] - 1).any()
    assert mask.sum() == mask.numel() - draws.kept_tokens[:, 1:].numel()


@pytest.mark.parametrize(
    "name",
    ["ObjMaskSingleFill(0.4)", "CtxMaskMultiFill(0.4)", "RandMaskSingleFill(0.5)", "RandMaskMultiFill(0.5)",
     "CtxMaskSingleFill(top=4)", "ObjMaskMultiFill(top=50%)"],
)  # fmt: skip
def test_the_fused_fill_is_the_normalised_counterfactual(name: str) -> None:
    strategy, draws, pixels = parse_strategy(name), draw(name), images()
    cam = relevance() if strategy.needs_cam else None
    fused = masked_input(pixels, cam, strategy, draws, grid=GRID)
    assert fused.pixels is not None
    assert torch.equal(fused.pixels, normalise(counterfactual(pixels, cam, strategy, draws, grid=GRID).images))
    assert (fused.kept_tokens, fused.key_mask) == (None, None)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("ObjMaskSingleFill(0.3)", "donors"), ("RandMaskMultiFill(0.5)", "donors"), ("RandMaskNoFill(0.5)", "kept_tokens")],
)
def test_draws_that_do_not_fit_the_strategy_are_refused(name: str, missing: str) -> None:
    strategy = parse_strategy(name)
    cam = relevance() if strategy.needs_cam else None
    for function in (masked_input, counterfactual):
        with pytest.raises(ValueError, match=f"^draws: .* needs {missing}; use sample_mask_randomness"):
            function(images(), cam, strategy, MaskRandomness(), grid=GRID)


def test_bilinear_masks_pixels_by_interpolated_relevance() -> None:
    pixels, cam, draws = images(), relevance(), draw("ObjMaskSingleFill(0.4)")
    obj = counterfactual(pixels, cam, parse_strategy("ObjMaskSingleFill(0.4)", upsample="bilinear"), draws, grid=GRID)
    ctx = counterfactual(pixels, cam, parse_strategy("CtxMaskSingleFill(0.4)", upsample="bilinear"), draws, grid=GRID)
    normalised = (cam / (cam.amax(1, keepdim=True) + 1e-8)).view(COUNT, 1, GRID, GRID)
    smooth = torch.nn.functional.interpolate(normalised, scale_factor=PATCH, mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(obj.mask, smooth > 0.4)
    assert torch.equal(ctx.mask, ~obj.mask)
    assert draws.donors is not None
    assert torch.equal(obj.images, torch.where(obj.mask[..., None], pixels[draws.donors], pixels))


def test_bilinear_and_top_k_mask_the_pixels_of_the_highest_interpolated_relevance() -> None:
    pixels, cam, draws = images(), relevance(), draw("ObjMaskSingleFill(top=3)")
    obj, ctx = (parse_strategy(f"{name}MaskSingleFill(top=3)", upsample="bilinear") for name in ("Obj", "Ctx"))
    found = counterfactual(pixels, cam, obj, draws, grid=GRID)
    smooth = torch.nn.functional.interpolate(cam.double().view(COUNT, 1, GRID, GRID), scale_factor=PATCH, mode="bilinear")
    cut = smooth.flatten(1).sort(descending=True).values[:, 3 * PATCH**2 - 1].view(-1, 1, 1)
    certain = (smooth[:, 0] - cut).abs() > 1e-6
    assert certain.double().mean() > 0.9
    assert torch.equal(found.mask[certain], (smooth[:, 0] > cut)[certain])
    assert found.mask.flatten(1).sum(1).tolist() == [3 * PATCH**2] * COUNT
    assert torch.equal(counterfactual(pixels, cam, ctx, draws, grid=GRID).mask, ~found.mask)
    for strategy, mask in ((obj, found.mask), (ctx, ~found.mask)):
        made = masked_input(pixels, cam, strategy, draws, grid=GRID).pixels
        assert made is not None
        assert draws.donors is not None
        filled = torch.where(mask[..., None], pixels[draws.donors], pixels)
        torch.testing.assert_close(made, normalise(filled))
    share = mask_share(cam, obj, draws, patches=GRID**2)
    assert share.item() == pytest.approx(found.mask.float().mean().item())


def test_an_all_zero_map_masks_no_object_and_the_whole_context() -> None:
    zero, pixels = torch.zeros(COUNT, GRID * GRID), images()
    for upsample in ("nearest", "bilinear"):
        draws = draw("ObjMaskSingleFill(0.3)")
        obj = counterfactual(pixels, zero, parse_strategy("ObjMaskSingleFill(0.3)", upsample=upsample), draws, grid=GRID)
        ctx = counterfactual(pixels, zero, parse_strategy("CtxMaskSingleFill(0.3)", upsample=upsample), draws, grid=GRID)
        assert torch.equal(obj.images, pixels)
        assert torch.equal(ctx.images, pixels[draws.donors])


def test_nan_shows_in_the_normalised_relevance_of_its_image_and_of_no_other() -> None:
    cam = relevance()
    cam[1, 3] = math.nan
    for by in ({"threshold": 0.3}, {"top_k": 4}):
        selection = patch_select(cam, **by)
        assert selection.normalised.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("cam", [None, torch.zeros(COUNT, 8), torch.zeros(COUNT - 1, 9), torch.zeros(COUNT, GRID, GRID)])
def test_relevance_that_does_not_fit_is_refused(cam: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"relevance: expected \(4, 9\) for the object mask"):
        counterfactual(images(), cam, parse_strategy("ObjMaskSingleFill(0.3)"), draw("ObjMaskSingleFill(0.3)"), grid=GRID)

"""masked_fill, normalise and the up-samplings against loops over pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cammask_fast.kernels.reference import masked_fill, normalise, upsample_bilinear
from cammask_fast.kernels.reference.masked_fill import CLIP_MEAN, CLIP_STD, upsample_nearest


def batch(count: int, side: int, *, floating: bool, seed: int = 0) -> Tensor:
    """uint8 (N, H, W, 3), or float32 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return (images.permute(0, 3, 1, 2).float() / 255).contiguous() if floating else images


def by_loops(images: Tensor, mask: Tensor, donors: Tensor) -> Tensor:
    """Pixel by pixel; mask over patches or pixels, donors per image or per patch."""
    floating = images.is_floating_point()
    pixels = images.permute(0, 2, 3, 1) if floating else images
    filled, (count, side, _, _) = pixels.clone(), pixels.shape
    for n in range(count):
        for y in range(side):
            for x in range(side):

                def patch(patches: int, row: int = y, column: int = x) -> int:
                    grid = math.isqrt(patches)
                    return (row * grid // side) * grid + column * grid // side

                masked = mask[n, y, x] if mask.ndim == 3 else mask[n, patch(mask.shape[1])]
                if masked:
                    donor = donors[n] if donors.ndim == 1 else donors[n, patch(donors.shape[1])]
                    filled[n, y, x] = pixels[donor, y, x]
    return filled.permute(0, 3, 1, 2) if floating else filled


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    grid=st.integers(1, 4),
    patch=st.integers(1, 3),
    floating=st.booleans(),
    multi=st.booleans(),
    over_pixels=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_loops_over_pixels(
    count: int, grid: int, patch: int, floating: bool, multi: bool, over_pixels: bool, seed: int
) -> None:
    generator, side = torch.Generator().manual_seed(seed), grid * patch
    images = batch(count, side, floating=floating, seed=seed)
    mask = torch.rand(count, *((side, side) if over_pixels else (grid * grid,)), generator=generator) < 0.5
    donors = torch.randint(0, count, (count, grid * grid) if multi else (count,), generator=generator)
    filled = masked_fill(images, mask, donors)
    assert filled.dtype == images.dtype
    assert torch.equal(filled, by_loops(images, mask, donors))


@pytest.mark.parametrize(("side", "patch"), [(42, 6), (48, 8), (56, 4)])
def test_uint8_and_float_images_are_filled_alike(side: int, patch: int) -> None:
    patches = (side // patch) ** 2
    bytes_NHWC, mask = batch(3, side, floating=False), torch.rand(3, patches) < 0.5
    floats = bytes_NHWC.permute(0, 3, 1, 2).float() / 255
    for donors in (torch.tensor([2, 0, 1]), torch.randint(0, 3, (3, patches))):
        filled = masked_fill(bytes_NHWC, mask, donors)
        assert torch.equal(masked_fill(floats, mask, donors), filled.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("floating", [True, False])
def test_empty_mask_full_mask_and_identity_donors(floating: bool) -> None:
    images, donors = batch(3, 8, floating=floating), torch.tensor([1, 2, 0])
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    assert torch.equal(masked_fill(images, nothing, donors), images)
    assert torch.equal(masked_fill(images, ~nothing, donors), images[donors])
    assert torch.equal(masked_fill(images, ~nothing, torch.arange(3)), images)


@pytest.mark.parametrize("multi", [True, False])
def test_strides_do_not_matter_and_inputs_stay_as_they_are(multi: bool) -> None:
    mask, donors = torch.rand(16, 3).T < 0.5, torch.randint(0, 3, (16, 3)).T if multi else torch.tensor([1, 9, 2, 9, 0])[::2]
    bytes_NHWC = batch(3, 8, floating=False).transpose(1, 2)
    floats = batch(3, 8, floating=True).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for images in (bytes_NHWC, floats):
        assert not images.is_contiguous()
        before = images.clone()
        expected = masked_fill(images.contiguous(), mask.contiguous(), donors.contiguous())
        assert torch.equal(masked_fill(images, mask, donors), expected)
        assert torch.equal(images, before)


def test_the_fill_carries_gradients_to_image_and_donor() -> None:
    images = batch(2, 4, floating=True).requires_grad_()
    mask = torch.tensor([[True, False, False, False], [False] * 4])
    masked_fill(images, mask, torch.tensor([1, 0])).sum().backward()
    assert images.grad is not None
    assert images.grad[:, 0].tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]] + [[1] * 4] * 2, [[2, 2, 1, 1]] * 2 + [[1] * 4] * 2]


def test_normalise_takes_bytes_and_floats() -> None:
    images = batch(2, 5, floating=False)
    expected = torch.empty(2, 3, 5, 5, dtype=torch.float64)
    for channel in range(3):
        expected[:, channel] = (images[..., channel].double() / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
    assert torch.allclose(normalise(images, dtype=torch.float64), expected, rtol=0, atol=1e-14)
    floats = images.permute(0, 3, 1, 2).float() / 255
    assert torch.equal(normalise(images), normalise(floats))
    assert normalise(images).is_contiguous()
    assert normalise(images).dtype == torch.float32
    assert torch.allclose(normalise(images).double(), expected, rtol=0, atol=1e-6)


def test_nearest_repeats_every_patch_value() -> None:
    values = torch.arange(9.0).view(1, 9)
    pixels = upsample_nearest(values, grid=3, patch_size=2)
    assert pixels.tolist() == [[[3.0 * (y // 2) + x // 2 for x in range(6)] for y in range(6)]]


@pytest.mark.parametrize(("grid", "patch"), [(1, 4), (3, 2), (7, 3)])
def test_bilinear_weighs_the_four_nearest_patch_centres_with_clamped_edges(grid: int, patch: int) -> None:
    values = torch.rand(2, grid * grid, dtype=torch.float64)
    pixels = upsample_bilinear(values, grid=grid, patch_size=patch)

    def weights(pixel: int) -> list[tuple[int, float]]:
        centre = min(max((pixel + 0.5) / patch - 0.5, 0), grid - 1)
        low = int(centre)
        return [(low, 1 - (centre - low)), (min(low + 1, grid - 1), centre - low)]

    for n in range(2):
        for y in range(grid * patch):
            for x in range(grid * patch):
                expected = sum(a * b * values[n, i * grid + j] for i, a in weights(y) for j, b in weights(x))
                assert math.isclose(pixels[n, y, x], expected, abs_tol=1e-12)


IMAGES, MASK, DONORS = batch(2, 8, floating=False), torch.zeros(2, 16, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_fill(IMAGES[0], MASK, DONORS), r"^images: expected uint8 \(N, H, W, 3\)"),
        (lambda: masked_fill(IMAGES.float(), MASK, DONORS), r"^images: expected float \(N, 3, H, W\)"),
        (lambda: masked_fill(IMAGES, MASK.int(), DONORS), "^mask: expected bool"),
        (lambda: masked_fill(IMAGES, MASK[:1], DONORS), "^mask: expected bool with 2 rows"),
        (lambda: masked_fill(IMAGES, torch.zeros(2, 4, 4, dtype=torch.bool), DONORS), "^mask: expected"),
        (lambda: masked_fill(IMAGES, MASK[:, :15], DONORS), "^15 patches are no square grid"),
        (lambda: masked_fill(IMAGES, MASK[:, :9], DONORS), "^9 patches are no square grid that divides"),
        (lambda: masked_fill(IMAGES, MASK, DONORS.int()), "^donors: expected int64"),
        (lambda: masked_fill(IMAGES, MASK, DONORS[:1]), "^donors: expected int64"),
        (lambda: masked_fill(IMAGES, MASK, DONORS.view(2, 1, 1)), "^donors: expected int64"),
        (lambda: normalise(IMAGES.permute(0, 3, 1, 2)), "^images: expected uint8"),
        (lambda: normalise(IMAGES.float()), "^images: expected float"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

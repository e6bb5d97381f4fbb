"""The reference of masked_fill and normalise against loops over pixels; then their ops and kernel against the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from cammask_fast.kernels.backend import INTERPRETED
from cammask_fast.kernels.masked_fill import masked_fill as kernel_masked_fill
from cammask_fast.kernels.masked_fill import plan_masked_fill
from cammask_fast.kernels.normalise import normalise as kernel_normalise
from cammask_fast.kernels.normalise import plan_normalise
from cammask_fast.kernels.pixels import pixels_ineligible
from cammask_fast.kernels.reference.counterfactual_batch import upsample_bilinear, upsample_nearest
from cammask_fast.kernels.reference.masked_fill import fill_pixels as masked_fill
from cammask_fast.kernels.reference.masked_fill import normalised_fill
from cammask_fast.kernels.reference.normalise import normalise
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD


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


@dataclass(frozen=True)
class Setting:
    """Sizes of a small batch. strided: images and selection are views that skip elements."""

    side: int
    patch: int
    count: int = 3
    strided: bool = False


WORDS, PAIRS, SINGLE = Setting(48, 16), Setting(42, 14), Setting(21, 7)
SETTINGS = (WORDS, Setting(32, 32, count=1), PAIRS, SINGLE, Setting(32, 16, strided=True))
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if torch.cuda.is_available() else ())


def drawn(setting: Setting, device: torch.device, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images, a random mask (N, P), single donors (N,) and multi donors (N, P)."""
    count, patches = setting.count, (setting.side // setting.patch) ** 2
    generator = torch.Generator().manual_seed(seed)
    step = 2 if setting.strided else 1
    images = batch(step * count, setting.side, floating=False, seed=seed)[::step]
    mask = (torch.rand(count, step * patches, generator=generator) < 0.5)[:, ::step]
    single = torch.randint(0, count, (step * count,), generator=generator)[::step]
    multi = torch.randint(0, count, (patches, count), generator=generator).T
    if setting.strided:
        images = images.transpose(1, 2)
    return images.to(device), mask.to(device), single.to(device), multi.to(device)


def as_floats(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [0, 1], channels last in memory."""
    return (images.float() / 255).to(dtype).permute(0, 3, 1, 2)


def assert_twice_as_good(ours: Tensor, pytorch: Tensor, gold: Tensor, *, usual: float = 0.0) -> None:
    """The largest error is at most twice that of PyTorch in the same dtype. usual: PyTorch's on more values than these."""
    assert ours.dtype == pytorch.dtype
    assert ours.shape == gold.shape
    allowed = 2 * max((pytorch.double() - gold).abs().max().item(), usual) + torch.finfo(ours.dtype).tiny
    assert (ours.double() - gold).abs().max().item() <= allowed  # false for NaN


def every_byte(device: torch.device) -> Tensor:
    """uint8 (1, 16, 16, 3): each value once per channel."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()


def usual_error(device: torch.device) -> float:
    """PyTorch's largest error in float32 over every byte: a few pixels may be those that it happens to round well."""
    images = every_byte(device)
    return (normalise(images).double() - normalise(images, dtype=torch.float64)).abs().max().item()


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["nchw", "patches"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_kernel_normalise_is_as_exact_as_pytorch(triton_backend: torch.device, setting: Setting, layout: str) -> None:
    images = drawn(setting, triton_backend)[0]
    where: dict[str, Any] = {"layout": layout, "patch_size": setting.patch}
    for pixels in (images, as_floats(images, torch.float32).contiguous(), *(as_floats(images, dtype) for dtype in DTYPES)):
        gold = normalise(pixels, dtype=torch.float64, **where)
        for dtype in DTYPES:
            ours = kernel_normalise(pixels, dtype=dtype, **where)
            assert ours.is_contiguous()
            assert_twice_as_good(ours, normalise(pixels, dtype=dtype, **where), gold)


@pytest.mark.triton
@pytest.mark.parametrize(("height", "width"), [(3, 32), (5, 7), (9, 10), (1, 1)])
def test_kernel_normalise_takes_any_size(triton_backend: torch.device, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, height, width, 3), generator=generator, dtype=torch.uint8).to(triton_backend)
    for pixels in (images, as_floats(images, torch.float32)):
        ours, gold = kernel_normalise(pixels), normalise(pixels, dtype=torch.float64)
        assert_twice_as_good(ours, normalise(pixels), gold, usual=usual_error(triton_backend))


@pytest.mark.triton
def test_kernel_normalise_of_every_byte(triton_backend: torch.device) -> None:
    images = every_byte(triton_backend)
    gold = normalise(images, dtype=torch.float64)
    for channel in range(3):
        for dtype in DTYPES:
            ours, pytorch = kernel_normalise(images, dtype=dtype), normalise(images, dtype=dtype)
            assert_twice_as_good(ours[:, channel], pytorch[:, channel], gold[:, channel])


@pytest.mark.triton
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layout", ["nchw", "patches"])
def test_kernel_fills_as_the_reference(triton_backend: torch.device, setting: Setting, layout: str) -> None:
    images, mask, single, multi = drawn(setting, triton_backend)
    colour = (1.0, 0.25, 0.0)
    for pixels, dtype in ((images, torch.float32), (images, torch.float16), (as_floats(images, torch.float32), torch.float32)):
        for donors, constant in ((single, None), (multi, None), (None, None), (None, colour)):
            gold, pytorch = (
                normalised_fill(pixels, mask, donors, dtype=precision, layout=layout, constant=constant)
                for precision in (torch.float64, dtype)
            )
            ours = kernel_masked_fill(pixels, mask, donors, dtype=dtype, layout=layout, constant=constant)
            assert_twice_as_good(ours, pytorch, gold)


@pytest.mark.triton
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    setting=st.builds(
        lambda grid, patch, count, strided: Setting(grid * patch, patch, count, strided),
        st.integers(1, 3),
        st.sampled_from([1, 3, 4, 6, 16]),
        st.integers(1, 3),
        st.booleans(),
    ),
    layout=st.sampled_from(["nchw", "patches"]),
    many=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_fills_any_shape(triton_backend: torch.device, setting: Setting, layout: str, many: bool, seed: int) -> None:
    images, mask, single, multi = drawn(setting, triton_backend, seed=seed)
    donors = multi if many else single
    gold = normalised_fill(images, mask, donors, dtype=torch.float64, layout=layout)
    ours = kernel_masked_fill(images, mask, donors, layout=layout)
    pytorch = normalised_fill(images, mask, donors, layout=layout)
    assert_twice_as_good(ours, pytorch, gold, usual=usual_error(triton_backend))


@pytest.mark.triton
@pytest.mark.parametrize("setting", [WORDS, PAIRS, SINGLE])
def test_kernel_empty_and_full_masks(triton_backend: torch.device, setting: Setting) -> None:
    images, mask, single, multi = drawn(setting, triton_backend)
    nothing, everything = torch.zeros_like(mask), torch.ones_like(mask)
    clean = kernel_normalise(images)
    for donors in (single, multi, None):
        assert torch.equal(kernel_masked_fill(images, nothing, donors), clean)
    assert torch.equal(kernel_masked_fill(images, everything, single), clean[single])
    assert torch.equal(kernel_masked_fill(images, everything, None), torch.zeros_like(clean))


@pytest.mark.triton
@pytest.mark.parametrize("setting", [WORDS, PAIRS, SINGLE])
def test_a_donor_outside_the_batch_is_nan_in_the_masked_patches_only(triton_backend: torch.device, setting: Setting) -> None:
    images, mask, single, multi = drawn(setting, triton_backend)
    filled = kernel_masked_fill(images, mask, multi, layout="patches")
    for outside in (-1, 3, 2**40):
        wrong = single.clone()
        wrong[1] = outside
        ours = kernel_masked_fill(images, mask, wrong, layout="patches")
        assert ours[1].isnan().all(1).tolist() == mask[1].tolist()
        assert torch.equal(ours[1, ~mask[1]], filled[1, ~mask[1]])
        assert not ours[0].isnan().any()
        wrong = multi.clone()
        wrong[1] = outside
        assert kernel_masked_fill(images, mask, wrong, layout="patches")[1].isnan().all(1).tolist() == mask[1].tolist()


@pytest.mark.parametrize("outside", [-1, 3])
def test_a_donor_outside_the_batch_raises_on_a_cpu(outside: int) -> None:
    images, mask, single, _ = drawn(WORDS, torch.device("cpu"))
    single[1] = outside
    with pytest.raises(ValueError, match=r"^donors: expected indices in 0\.\.2"):
        kernel_masked_fill(images, mask, single)


@pytest.mark.parametrize("setting", [WORDS, PAIRS, SINGLE])
def test_the_op_on_a_cpu_is_fill_then_normalise_bit_for_bit(setting: Setting) -> None:
    images, mask, single, multi = drawn(setting, torch.device("cpu"))
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    for pixels in (images, as_floats(images, torch.float32)):
        for donors in (single, multi):
            filled = by_loops(pixels, mask, donors)
            planes = filled.permute(0, 3, 1, 2).float() / 255 if filled.dtype == torch.uint8 else filled
            assert torch.equal(kernel_masked_fill(pixels, mask, donors), (planes - mean) / std)


@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("patch", [4, 7])
def test_patches_are_what_a_patch_embedding_multiplies(floating: bool, patch: int) -> None:
    images, width = batch(2, 3 * patch, floating=floating), 5
    weight = torch.randn(width, 3, patch, patch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = kernel_normalise(images, dtype=torch.float64, layout="patches", patch_size=patch)
    planes = kernel_normalise(images, dtype=torch.float64)
    assert torch.equal(patches, F.unfold(planes, patch, stride=patch).mT)
    embedded = F.conv2d(planes, weight, stride=patch).flatten(2).mT
    assert torch.allclose(patches @ weight.flatten(1).T, embedded, rtol=0, atol=1e-12)


def test_a_constant_colour_fills_masked_patches() -> None:
    images, mask, _, _ = drawn(PAIRS, torch.device("cpu"))
    pixels = upsample_nearest(mask, grid=3, patch_size=14).unsqueeze(3)
    coloured = torch.where(pixels, torch.tensor([255, 0, 51], dtype=torch.uint8), images)
    for layout in ("nchw", "patches"):
        ours = kernel_masked_fill(images, mask, None, layout=layout, constant=(1.0, 0.0, 0.2))
        assert torch.allclose(ours, normalise(coloured, layout=layout, patch_size=14), rtol=0, atol=1e-6)
        assert (kernel_masked_fill(images, mask, None, layout=layout) == 0).any()
    assert (kernel_masked_fill(images, mask, None).permute(0, 2, 3, 1)[pixels[..., 0]] == 0).all()


OPS = (
    (torch.ops.cammask.normalise.default, (IMAGES, torch.float16, "patches", 4)),
    (torch.ops.cammask.normalise.default, (IMAGES, torch.float32, "nchw", None)),
    (torch.ops.cammask.masked_fill.default, (IMAGES, ~MASK, DONORS, torch.float32, "nchw", None)),
    (torch.ops.cammask.masked_fill.default, (IMAGES, ~MASK, None, torch.bfloat16, "patches", [0.0, 0.5, 1.0])),
)


@pytest.mark.parametrize(("op", "arguments"), OPS)
def test_ops_are_registered_as_torch_wants_them(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    "function",
    [
        lambda images, mask, donors: kernel_normalise(images, layout="patches", patch_size=8),
        lambda images, mask, donors: kernel_normalise(images, dtype=torch.bfloat16),
        lambda images, mask, donors: kernel_masked_fill(images, mask, donors),
        lambda images, mask, donors: kernel_masked_fill(images, mask, None, layout="patches", constant=(0.0, 1.0, 0.5)),
    ],
)
def test_compiles_once_for_every_batch_size(function: Callable[..., Tensor]) -> None:
    assert_compiles_once(function, lambda count: drawn(Setting(32, 8, count), torch.device("cpu"))[:3])


def assert_compiles_once(function: Callable[..., Tensor], inputs: Callable[[int], tuple[Tensor, ...]]) -> None:
    """A whole graph, the eager result, and no compilation after the first batch, of 2, 3 and 5 images.

    A symbolic float (the threshold under dynamic=True) makes PyTorch start the first compilation anew."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    compilations = []
    for count in (2, 3, 5):
        arguments = inputs(count)
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        assert torch.equal(compiled(*arguments), function(*arguments))
        compilations.append(backend.frame_count)
    assert compilations == [compilations[0]] * 3


def test_no_matrix_product_is_counted_as_in_the_reference() -> None:
    for function in (kernel_masked_fill, normalised_fill):
        with FlopCounterMode(display=False) as counter:
            function(IMAGES, MASK, DONORS)
            kernel_normalise(IMAGES)
        assert counter.get_total_flops() == 0


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there Triton can run")
def test_asking_for_triton_without_a_gpu_says_why(triton_backend: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^normalise: backend 'triton' needs CUDA tensors, got cpu"):
        kernel_normalise(IMAGES)
    with pytest.raises(ValueError, match=r"^masked_fill: backend 'triton' needs CUDA tensors, got cpu"):
        kernel_masked_fill(IMAGES, MASK, DONORS)


@pytest.mark.parametrize(
    ("images", "dtype", "selector", "ineligible"),
    [
        (IMAGES, torch.float32, None, None),
        (IMAGES, torch.bfloat16, MASK, None),
        (IMAGES, torch.float64, None, "dtype is torch.float64"),
        (IMAGES.permute(0, 3, 1, 2).double(), torch.float32, None, "images are torch.float64"),
        (torch.empty(1, 1, 5000, 3, dtype=torch.uint8, device="meta"), torch.float32, None, "larger than 4096"),
        (torch.empty(2, 4096, 4096, 3, dtype=torch.uint8, device="meta")[:, ::2], torch.float32, None, None),
        (torch.empty_strided((2, 3, 9, 9), (0, 2**30, 9, 1), device="meta"), torch.float32, None, "2\\*\\*31"),
        (IMAGES, torch.float32, torch.zeros(2, 16, dtype=torch.float64), "relevance is torch.float64"),
        (IMAGES, torch.float32, torch.zeros(2, 1089), "1089 patches"),
    ],
)
def test_ineligible_inputs(images: Tensor, dtype: torch.dtype, selector: Tensor | None, ineligible: str | None) -> None:
    found = pixels_ineligible(images, dtype, selector)
    assert found is None if ineligible is None else re.search(ineligible, found or "")


@pytest.mark.parametrize(
    ("images", "patches", "pixels", "group"),
    [
        (torch.empty(4, 224, 224, 3, dtype=torch.uint8, device="meta"), 49, "words", 16),
        (torch.empty(4, 224, 224, 3, dtype=torch.uint8, device="meta"), 196, "words", 16),
        (torch.empty(4, 224, 224, 3, dtype=torch.uint8, device="meta"), 256, "pairs", 2),
        (torch.empty(4, 21, 21, 3, dtype=torch.uint8, device="meta"), 9, "single", 1),
        (torch.empty(4, 224, 224, 4, dtype=torch.uint8, device="meta")[..., :3], 196, "single", 1),
        (torch.empty(4, 224, 225, 3, dtype=torch.uint8, device="meta")[:, :, 1:], 196, "single", 1),
        (torch.empty(4, 224, 226, 3, dtype=torch.uint8, device="meta")[:, :, 2:], 196, "pairs", 2),
        (torch.empty(4, 3, 224, 224, device="meta"), 196, "single", 16),
    ],
)
def test_the_plan_reads_as_widely_as_patches_and_strides_allow(images: Tensor, patches: int, pixels: str, group: int) -> None:
    out = torch.empty(4, 3, images.shape[2], images.shape[2], device="meta")
    mask = torch.empty(4, patches, dtype=torch.bool, device="meta")
    (launch,) = plan_masked_fill(out, images, mask, None)
    assert (launch.arguments["PIXELS"], launch.arguments["GROUP"]) == (pixels, group)
    (clean,) = plan_normalise(out, images)
    assert clean.grid[0] > 0
    assert clean.arguments["select_ptr"] is None


FLOATS = as_floats(IMAGES, torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_normalise(IMAGES[0]), r"^images: expected uint8 \(N, H, W, 3\)"),
        (lambda: kernel_normalise(IMAGES.int()), r"^images: expected float \(N, 3, H, W\)"),
        (lambda: kernel_normalise(IMAGES, dtype=torch.int8), "^dtype: expected float32"),
        (lambda: kernel_normalise(IMAGES, layout="nhwc"), "^layout: expected one of nchw, patches"),
        (lambda: kernel_normalise(IMAGES, layout="patches"), "^patch_size: layout 'patches' needs it"),
        (
            lambda: kernel_normalise(IMAGES, layout="patches", patch_size=3),
            "^patch_size: expected a divisor of the image side 8",
        ),
        (lambda: kernel_normalise(IMAGES[:, :4], layout="patches", patch_size=4), "^images: expected square"),
        (lambda: kernel_masked_fill(IMAGES[:, :4], MASK, DONORS), "^images: expected square"),
        (lambda: kernel_masked_fill(IMAGES, MASK.int(), DONORS), r"^mask: expected bool \(2, P\)"),
        (lambda: kernel_masked_fill(IMAGES, MASK[:1], DONORS), r"^mask: expected bool \(2, P\)"),
        (lambda: kernel_masked_fill(IMAGES, MASK.view(2, 4, 4), DONORS), r"^mask: expected bool \(2, P\)"),
        (lambda: kernel_masked_fill(IMAGES, MASK[:, :15], DONORS), "^mask: 15 patches are no square grid"),
        (lambda: kernel_masked_fill(IMAGES, MASK[:, :9], DONORS), "^mask: 9 patches are no square grid that divides"),
        (lambda: kernel_masked_fill(IMAGES, MASK[:, :0], DONORS), "^mask: 0 patches are no square grid"),
        (lambda: kernel_masked_fill(IMAGES, MASK.to("meta"), DONORS), "^mask: expected the device of images, cpu, got meta"),
        (lambda: kernel_masked_fill(IMAGES, MASK, DONORS.int()), r"^donors: expected int64 \(2,\) or \(2, 16\)"),
        (lambda: kernel_masked_fill(IMAGES, MASK, DONORS[:1]), r"^donors: expected int64 \(2,\) or \(2, 16\)"),
        (lambda: kernel_masked_fill(IMAGES, MASK, DONORS[:, None]), r"^donors: expected int64 \(2,\) or \(2, 16\)"),
        (lambda: kernel_masked_fill(IMAGES, MASK, DONORS.to("meta")), "^donors: expected the device of images"),
        (lambda: kernel_masked_fill(IMAGES, MASK, DONORS, constant=(0.0, 0.0, 0.0)), "^constant: give donors or"),
        (lambda: kernel_masked_fill(FLOATS, MASK, None, constant=(0.0, 2.0, 0.0)), "^constant: expected an RGB colour"),
        (lambda: kernel_masked_fill(FLOATS, MASK, None, constant=(0.0, 1.0)), "^constant: expected an RGB colour"),
    ],
)
def test_bad_arguments_of_the_ops_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""The metrics of maps: hand-made maps whose figures are known exactly, and slow re-derivations in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cammask_fast.cam import perturbation
from cammask_fast.cam.imputation import impute
from cammask_fast.cam.localisation import (
    Overlap,
    energy_share,
    localisation,
    masked_share,
    overlap,
    pointing_game,
    to_pixels,
)
from cammask_fast.cam.perturbation import (
    PERCENTS,
    area_under,
    blur,
    insertion_deletion,
    percentiles_of,
    perturbed_accuracy,
    pixel_order,
    probability,
    road_changes,
)
from cammask_fast.kernels.normalise import normalise

Array = NDArray[np.float64]
SURE = 50.0
"""Logit of a model that is certain."""


def looks_at(pixels: Tensor, *where: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """A model that is sure of class 1 while all of some pixels (y, x) are as they were, and else of class 0."""
    before = torch.stack([pixels[:, :, y, x] for y, x in where])

    def logits_of(changed: Tensor) -> Tensor:
        now = torch.stack([changed[:, :, y, x] for y, x in where])
        same = ((now - before).abs() < 1e-6).all(2).all(0)
        return torch.stack([torch.zeros(len(changed)), torch.where(same, SURE, -SURE)], 1)

    return logits_of


def ramp(size: int, *, count: int = 1, rising: bool = True) -> Tensor:
    """Maps whose pixels are all different, in reading order."""
    values = torch.arange(float(size * size)) / (size * size)
    return (values if rising else values.flip(0)).view(1, size, size).expand(count, -1, -1)


def test_shares_on_the_object() -> None:
    relevance = torch.tensor([[4.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 3.0]])
    on = torch.tensor([[True, False, True, False], [True, True, True, False], [False, False, True, False]])
    assert energy_share(relevance, on).tolist() == [5 / 8, 3 / 4, 0.0]
    assert masked_share(relevance, on, threshold=0.3).tolist() == [1 / 2, 3 / 4, 0.0]
    assert masked_share(relevance, on, threshold=0.2).tolist() == [1 / 2, 3 / 4, 0.0]
    assert masked_share(relevance, on, threshold=0.6).tolist() == [1.0, 3 / 4, 0.0]
    found = localisation(relevance, on, threshold=0.3)
    assert found == pytest.approx((100 * (5 / 8 + 3 / 4) / 3, 100 * (1 / 2 + 3 / 4) / 3, 50.0))


def test_a_map_comes_to_pixels_normalised() -> None:
    relevance = torch.tensor([[0.0, 2.0, 4.0, 1.0]])
    nearest = to_pixels(relevance, 4, upsample="nearest")[0]
    assert nearest[0].tolist() == pytest.approx([0, 0, 0.5, 0.5])
    assert nearest[3].tolist() == pytest.approx([1, 1, 0.25, 0.25])
    smooth = to_pixels(relevance, 4)[0]
    assert smooth[0].tolist() == pytest.approx([0, 0.125, 0.375, 0.5]), "edges are clamped"
    assert to_pixels(torch.zeros(1, 4), 4).tolist() == [[[0.0] * 4] * 4]
    with pytest.raises(ValueError, match="square grid, got 5"):
        to_pixels(torch.zeros(1, 5), 4)
    with pytest.raises(ValueError, match="expected bilinear or nearest, got 'cubic'"):
        to_pixels(torch.zeros(1, 4), 4, upsample="cubic")


def test_the_pointing_game() -> None:
    """The highest pixel is (1, 4); the object is a pixel at (y, x), 3 rows and 4 columns away from it, or elsewhere."""
    maps = torch.zeros(5, 6, 6)
    maps[:, 1, 4] = 0.1
    objects = torch.zeros(5, 6, 6, dtype=torch.bool)
    for index, (y, x) in enumerate([(1, 4), (4, 0), (4, 0), (2, 4)]):
        objects[index, y, x] = True
    maps[2, 4, 0] = 0.05
    assert pointing_game(maps, objects, tolerance=0).tolist() == [True, False, False, False, False]
    assert pointing_game(maps, objects, tolerance=4.9).tolist() == [True, False, False, True, False]
    assert pointing_game(maps, objects, tolerance=5).tolist() == [True, True, True, True, False], "a distance, not a square"
    assert pointing_game(torch.zeros(1, 6, 6), objects[:1], tolerance=99).tolist() == [False], "a map of zeros points nowhere"


def test_pixels_above_thresholds() -> None:
    """Two images of 8 pixels; 3 are on the first object, 4 on the second."""
    values = torch.tensor([[[0.9, 0.5, 0.5, 0.1, 0.0, 0.0, 0.0, 0.0]], [[0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]])
    on = torch.tensor([[[1, 1, 0, 1, 0, 0, 0, 0]], [[1, 1, 1, 1, 0, 0, 0, 0]]]).bool()
    counted = overlap(values, on, torch.tensor([0.0, 0.3, 0.5]))
    assert counted.marked.tolist() == [[4, 3, 1], [4, 4, 0]], "strictly above"
    assert counted.hit.tolist() == [[3, 2, 1], [4, 4, 0]]
    assert counted.object.tolist() == [[3], [4]]
    assert counted.iou().tolist() == [[3 / 4, 2 / 4, 1 / 3], [1, 1, 0]]
    assert counted.pixel_accuracy().tolist() == [[7 / 8, 6 / 8, 6 / 8], [1, 1, 4 / 8]]
    object_iou, background_iou = [7 / 8, 6 / 8, 1 / 7], [8 / 9, 8 / 10, 9 / 15]
    assert counted.mean_iou().tolist() == pytest.approx([(a + b) / 2 for a, b in zip(object_iou, background_iou, strict=True)])


def test_a_map_and_a_mask_that_are_both_empty_agree() -> None:
    nothing = torch.zeros(1, 2, 2)
    counted = overlap(nothing, nothing.bool(), torch.tensor([0.5]))
    assert isinstance(counted, Overlap)
    assert counted.iou().tolist() == [[1.0]]
    assert counted.mean_iou().tolist() == [1.0]


def test_the_order_of_pixels() -> None:
    maps = torch.tensor([[[3.0, 1.0], [3.0, 2.0]]])
    assert pixel_order(maps).tolist() == [[[0, 3], [1, 2]]], "ties in the order of the pixels"
    assert pixel_order(maps, lowest_first=True).tolist() == [[[2, 0], [3, 1]]]


def test_the_area_under_a_curve() -> None:
    assert area_under(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])).tolist() == [1.0, 0.5, 0.5]


def test_insertion_and_deletion_of_one_pixel_that_counts() -> None:
    """16 pixels in 16 steps. The pixel that counts is the first of one map and the last of the other."""
    pixels = torch.randn(2, 3, 4, 4)
    maps = torch.cat([ramp(4, rising=False), ramp(4)])
    model, labels = looks_at(pixels, (0, 0)), torch.ones(2, dtype=torch.int64)
    curves = insertion_deletion(model, pixels, labels, maps, steps=16)
    assert curves.insertion.tolist() == pytest.approx(np.array([[0] + [1] * 16, [0] * 16 + [1]]))
    assert curves.deletion.tolist() == pytest.approx(np.array([[1] + [0] * 16, [1] * 16 + [0]]))
    assert area_under(curves.deletion).tolist() == pytest.approx([0.5 / 16, 15.5 / 16])
    coarse = insertion_deletion(model, pixels, labels, maps)
    assert coarse.deletion.shape == (2, 5), "a row of pixels per step"
    uneven = insertion_deletion(model, pixels, labels, maps, steps=3)
    assert uneven.deletion[1].tolist() == pytest.approx([1, 1, 1, 0]), "6, 6 and 4 pixels"
    with pytest.raises(ValueError, match="steps: expected 1 or more"):
        insertion_deletion(model, pixels, labels, maps, steps=-1)


def slow_rise(logits_of: Callable[[Tensor], Tensor], image: Tensor, label: int, order: list[int], *, insertion: bool) -> Array:
    """RISE's protocol for one image, pixel by pixel: the probability after each row's worth of pixels."""
    size = image.shape[-1]
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = gaussian_filter(impulse, 5)
    blurred = np.zeros(image.shape)
    padded = np.pad(image.numpy().astype(np.float64), ((0, 0), (5, 5), (5, 5)))
    for y in range(size):
        for x in range(size):
            blurred[:, y, x] = (padded[:, y : y + 11, x : x + 11] * kernel).sum((1, 2))
    now = torch.from_numpy(blurred).float() if insertion else image.clone()
    goal = image if insertion else torch.zeros_like(image)
    found = []
    for step in range(size + 1):
        if step:
            for index in order[(step - 1) * size : step * size]:
                now[:, index // size, index % size] = goal[:, index // size, index % size]
        found.append(logits_of(now[None]).softmax(1)[0, label].item())
    return np.array(found)


def linear_model(size: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(3 * size * size, 4) / size
    return lambda pixels: pixels.flatten(1) @ weight


def test_insertion_and_deletion_are_rises() -> None:
    size = 7
    model, pixels, maps = linear_model(size), torch.randn(3, 3, size, size), torch.rand(3, size, size)
    labels = torch.tensor([0, 3, 1])
    curves = insertion_deletion(model, pixels, labels, maps)
    for n in range(3):
        order = np.argsort(-maps[n].flatten().numpy(), kind="stable").tolist()
        for curve, insertion in ((curves.deletion, False), (curves.insertion, True)):
            slow = slow_rise(model, pixels[n], int(labels[n]), order, insertion=insertion)
            assert curve[n].tolist() == pytest.approx(slow, abs=1e-5)


def test_the_blur_keeps_what_is_far_from_the_borders() -> None:
    assert blur(torch.ones(1, 3, 30, 30))[0, :, 15, 15].tolist() == pytest.approx([1, 1, 1])
    assert blur(torch.ones(1, 3, 30, 30))[0, 0, 0, 0] < 0.5


def test_positive_and_negative_perturbation() -> None:
    """The pixel that counts is the highest, with 25 pixels: 10 % are two, 90 % are 22."""
    images = torch.randint(1, 256, (2, 5, 5, 3), dtype=torch.uint8)
    pixels = normalise(images)
    maps, labels = torch.cat([ramp(5, rising=False)] * 2), torch.ones(2, dtype=torch.int64)
    model = looks_at(pixels, (0, 0))
    positive = perturbed_accuracy(model, pixels, labels, maps, lowest_first=False)
    assert positive.tolist() == [[False] * 9] * 2
    assert perturbed_accuracy(model, pixels, labels, maps, lowest_first=True).tolist() == [[True] * 9] * 2
    third = looks_at(pixels, (0, 2))
    assert perturbed_accuracy(third, pixels, labels, maps, lowest_first=False)[0].tolist() == [True] + [False] * 8
    last = perturbed_accuracy(looks_at(pixels, (0, 3)), pixels, labels, maps, lowest_first=True)
    assert last[0].tolist() == [True] * 8 + [False], "22 of 25 leave the three highest"
    assert perturbed_accuracy(model, pixels, 1 - labels, maps, lowest_first=True).tolist() == [[False] * 9] * 2


def test_perturbed_pixels_are_black() -> None:
    """Not of the mean colour: the model counts the values that black has after normalisation."""
    black = normalise(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))

    def counts(changed: Tensor) -> Tensor:
        return torch.stack([(changed == black).all(1).flatten(1).sum(1).float(), torch.full((len(changed),), 7.5)], 1)

    images = normalise(torch.full((1, 4, 4, 3), 200, dtype=torch.uint8))
    right = perturbed_accuracy(counts, images, torch.ones(1, dtype=torch.int64), ramp(4), lowest_first=False)
    assert right[0].tolist() == [percent * 16 // 100 < 8 for percent in PERCENTS]


def slow_imputation(image: Array, removed: NDArray[np.bool_]) -> Array:
    """The equations one by one, solved densely."""
    _, height, width = image.shape
    unknown = [(y, x) for y in range(height) for x in range(width) if removed[y, x]]
    place = {where: index for index, where in enumerate(unknown)}
    matrix, right = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), len(image)))
    for row, (y, x) in enumerate(unknown):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) == (0, 0) or not (0 <= y + dy < height and 0 <= x + dx < width):
                    continue
                weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
                matrix[row, row] += weight
                if (y + dy, x + dx) in place:
                    matrix[row, place[y + dy, x + dx]] -= weight
                else:
                    right[row] += weight * image[:, y + dy, x + dx]
    filled = image.copy()
    for (y, x), values in zip(unknown, np.linalg.solve(matrix, right), strict=True):
        filled[:, y, x] = values
    return filled


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_imputation_solves_the_equations(share: float) -> None:
    images = torch.randn(3, 2, 9, 13, dtype=torch.float64)
    removed = torch.rand(3, 9, 13) < share
    removed[:, 4, 6] = False
    removed[2] = False
    removed[2, :8] = True  # a block, far from what is known
    found = impute(images, removed)
    for n in range(3):
        slow = slow_imputation(images[n].numpy(), removed[n].numpy())
        assert np.abs(found[n].numpy() - slow).max() < 1e-6
    kept = ~removed[:, None].expand_as(images)
    assert torch.equal(found[kept], images[kept])


def test_imputation_by_hand() -> None:
    """A pixel in the middle and one in a corner; a plane comes back as it was; nothing known gives zero."""
    image = torch.arange(9.0).view(1, 1, 3, 3)
    for (y, x), expected in {(1, 1): 4.0, (0, 0): (1 / 6 + 3 / 6 + 4 / 12) / (5 / 12)}.items():
        removed = torch.zeros(1, 3, 3, dtype=torch.bool)
        removed[0, y, x] = True
        assert impute(image, removed)[0, 0, y, x].item() == pytest.approx(expected)
    plane = (2.0 * torch.arange(8)[:, None] - 3.0 * torch.arange(8)).view(1, 1, 8, 8)
    removed = torch.zeros(1, 8, 8, dtype=torch.bool)
    removed[0, 2:6, 1:7] = True
    assert torch.allclose(impute(plane, removed), plane, atol=1e-5)
    assert impute(plane, torch.ones(1, 8, 8, dtype=torch.bool)).tolist() == [[[[0.0] * 8] * 8]]
    assert impute(plane[:0], removed[:0]).shape == (0, 1, 8, 8)


def test_percentiles_are_numpys() -> None:
    maps = torch.rand(3, 5, 7)
    expected = np.percentile(maps.flatten(1).double().numpy(), [0, 10, 37.5, 90, 100], axis=1).T
    assert percentiles_of(maps, [0, 10, 37.5, 90, 100]).numpy() == pytest.approx(expected, abs=1e-12)


def slow_road(model: Callable[[Tensor], Tensor], image: Tensor, label: int, values: Array, noise: Tensor) -> list[float]:
    """For one image what pytorch-grad-cam 1.5.7 does: pixels below NumPy's percentile stay; differences of probabilities."""
    found = []
    for percentile in PERCENTS:
        removed = ~(values < np.percentile(values, percentile))
        filled = torch.from_numpy(slow_imputation(image.double().numpy(), removed)).float()
        filled = torch.where(torch.from_numpy(removed), filled + noise, image)
        after, before = (model(one[None]).softmax(1)[0, label].item() for one in (filled, image))
        found.append(after - before)
    return found


@pytest.mark.parametrize("lowest_first", [False, True])
def test_road_is_pytorch_grad_cams(lowest_first: bool) -> None:
    size = 8
    model, pixels, labels = linear_model(size), torch.randn(3, 3, size, size), torch.tensor([2, 0, 1])
    maps = torch.rand(3, size, size)
    maps[1] = (maps[1] * 4).floor() / 4  # ties, as a map of patches has them
    noise = 0.01 * torch.randn(pixels.shape)
    found = road_changes(model, pixels, labels, maps, lowest_first=lowest_first, noise=noise)
    for n in range(3):
        values = (1 - maps[n] if lowest_first else maps[n]).double().numpy()
        assert found[n].tolist() == pytest.approx(slow_road(model, pixels[n], int(labels[n]), values, noise[n]), abs=1e-5)


def test_road_of_one_pixel_that_counts() -> None:
    pixels, labels = torch.randn(1, 3, 10, 10), torch.ones(1, dtype=torch.int64)
    model, noise = looks_at(pixels, (9, 9)), torch.zeros(1, 3, 10, 10)

    def changes(**options: Any) -> list[float]:
        return road_changes(model, pixels, labels, ramp(10), noise=noise, **options)[0].tolist()

    assert changes(lowest_first=False) == pytest.approx([-1] * 9)
    assert changes(lowest_first=True) == pytest.approx([0] * 9)
    assert road_changes(model, pixels, labels, ramp(10, rising=False), lowest_first=True, noise=noise)[0, 0] == pytest.approx(
        -1
    )


def test_probabilities() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]])
    assert probability(logits, torch.tensor([0, 1])).tolist() == pytest.approx([0.5, 0.75])


def test_metrics_stay_on_the_device_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is pretended: an operation on tensors of two devices is an error there."""
    monkeypatch.setattr(perturbation, "impute", lambda images, removed: torch.where(removed[:, None], 0.0, images))
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels, maps = torch.randn(2, 3, 4, 4, device="cuda"), torch.rand(2, 4, 4, device="cuda")
        labels, weight = torch.zeros(2, dtype=torch.int64, device="cuda"), torch.randn(48, 5, device="cuda")
        relevance, inside = torch.rand(2, 16, device="cuda"), torch.zeros(2, 16, dtype=torch.bool, device="cuda")

        def model(images: Tensor) -> Tensor:
            return images.flatten(1) @ weight

        found = [
            *insertion_deletion(model, pixels, labels, maps),
            perturbed_accuracy(model, pixels, labels, maps, lowest_first=True),
            road_changes(model, pixels, labels, maps, lowest_first=True, noise=torch.zeros_like(pixels)),
            pointing_game(maps, inside.view(2, 4, 4), tolerance=1),
            energy_share(relevance, inside),
            masked_share(relevance, inside, threshold=0.3),
            to_pixels(relevance, 8),
        ]
        assert {one.device.type for one in found} == {"cuda"}

"""Cuts of a map, boxes around its components, and models at another resolution."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import resize_pos_embed
from skimage.filters import threshold_otsu
from torch import Tensor, nn

from cammask_fast.kernels.normalise import normalise
from cammask_fast.masking.object_patches import Box, component_boxes, object_patches, otsu
from cammask_fast.model.resolution import at_resolution, interpolated
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.strategy import Cut, parse_cut, shown_strategies


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3", [[0, 0, 1, 1], [0, 1, 1, 0]]),
        ("1", [[0, 0, 0, 0], [0, 0, 0, 0]]),
        ("p50", [[0, 0, 1, 1], [0, 1, 1, 0]]),
        ("P75", [[0, 0, 0, 1], [0, 1, 0, 0]]),
        ("otsu", [[0, 0, 0, 1], [0, 1, 1, 0]]),
        ("top=3", [[0, 1, 1, 1], [1, 1, 1, 0]]),
        ("top=25%", [[0, 0, 0, 1], [0, 1, 0, 0]]),
    ],
)
def test_each_image_is_cut_by_its_own_map(text: str, expected: list[list[int]]) -> None:
    """The second row ends in two equal patches: top-k takes the first of them."""
    relevance = rows([0.0, 1.0, 4.0, 10.0], [0.0, 0.9, 0.8, 0.0])
    assert object_patches(relevance, parse_cut(text)).int().tolist() == expected


def test_otsu_is_the_best_of_all_thresholds() -> None:
    values = torch.cat([torch.rand(20, 49), torch.rand(5, 49).round(decimals=1)])
    for row, found in zip(values.double(), otsu(values).double(), strict=True):
        between = {}
        for threshold in row.unique()[:-1].tolist():
            low, high = row[row <= threshold], row[row > threshold]
            between[threshold] = len(low) * len(high) * float(low.mean() - high.mean()) ** 2
        assert between[found.item()] == pytest.approx(max(between.values()))
    library = torch.tensor([threshold_otsu(row.numpy(), nbins=4096) for row in values])
    torch.testing.assert_close((values > library[:, None]).float().mean(1), (values > otsu(values)[:, None]).float().mean(1),
                               rtol=0, atol=1.5 / 49)  # fmt: skip
    assert not object_patches(torch.ones(1, 9), Cut(rule="otsu")).any()


@pytest.mark.parametrize("text", ["", "huge", "1.5", "-0.1", "p101", "top=0", "top=0%", "top=2.5", "top=101%", "p", "1.2.3"])
def test_unknown_cuts_name_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"otsu|whole number"):
        parse_cut(text)


def test_a_cut_takes_the_place_of_a_threshold() -> None:
    strategies, cut = shown_strategies("", "top=4")
    assert [(one.selection, one.fill, one.threshold) for one in strategies] == [
        ("object", "single", 0.5),
        ("context", "single", 0.5),
    ]
    assert cut == Cut(rule="top", number=4)
    (only,), cut = shown_strategies("CtxMaskNoFill", "otsu")
    assert (only.selection, only.fill) == ("context", "none")
    assert shown_strategies("ObjMaskMultiFill(0.6)", "") == ([shown_strategies("ObjMaskMultiFill(0.6)", "")[0][0]], None)
    with pytest.raises(ValueError, match="write --masking ObjMaskNoFill"):
        shown_strategies("ObjMaskNoFill(0.3)", "otsu")
    with pytest.raises(ValueError, match="no map to cut"):
        shown_strategies("RandMaskNoFill", "otsu")
    with pytest.raises(ValueError, match=r"k: expected 1\.\.4"):
        object_patches(torch.rand(1, 4), Cut(rule="top", number=5))


def test_boxes_of_components_that_share_an_edge() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]]).bool()
    assert component_boxes(mask) == [Box(2, 1, 3, 4, 3), Box(0, 0, 2, 1, 2), Box(0, 3, 1, 4, 1)]
    assert component_boxes(torch.zeros(3, 3).bool()) == []
    assert component_boxes(mask)[0].in_window((100, 0, 300, 400), 4) == (200, 100, 250, 400)


def test_embeddings_are_resized_as_in_open_clip() -> None:
    embedding = torch.randn(37, 8)
    for grid in (5, 12):
        state = {"visual.positional_embedding": embedding.clone()}
        clip = nn.Module()
        clip.visual = nn.Module()
        clip.visual.grid_size = (grid, grid)  # type: ignore[assignment]
        resize_pos_embed(state, clip)
        torch.testing.assert_close(interpolated(embedding, grid), state["visual.positional_embedding"], rtol=0, atol=0)


def test_a_model_at_another_resolution() -> None:
    model = tiny_classifier(("one", "two"))
    larger = at_resolution(model, 96)
    assert (larger.visual.config.grid, model.visual.config.grid) == (12, 6)
    assert larger(normalise(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))).logits.shape == (1, 2)
    assert not any(parameter.requires_grad for parameter in larger.parameters())
    assert at_resolution(model, 48) is model
    for size, advice in ((100, "such as 96 or 104"), (3, "such as 8 or 16")):
        with pytest.raises(ValueError, match=f"patches of 8 pixels, {advice}"):
            at_resolution(model, size)

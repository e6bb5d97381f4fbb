"""`cammask mask`: pictures of photographs, prompts and donors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.masking import parse_strategy
from cammask_fast.model.zero_shot import load_tiny_clip
from cammask_fast.viz.mask_images import PAPER_STRATEGIES, apply, mask_photographs, other_donors, refuse_unknown_words


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four pictures of the benchmark as PNG files in one folder."""
    folder = tmp_path_factory.mktemp("digits")
    scenes = sample_scenes(evaluation_specifications()["id"])[slice(0, 4)]
    paths = []
    for i, (label, image) in enumerate(zip(scenes.labels, render(scenes), strict=True)):
        paths.append(folder / f"{i}-{CLASS_NAMES[label]}.png")
        Image.fromarray(image.numpy()).save(paths[-1])
    return paths


def test_a_sheet_has_a_row_per_photograph_and_prompt(digits: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    prompts = ["a photo of the number seven.", "the digit two."]
    mask_photographs(digits[:2], prompts, out=out, arch="tiny", pretrained="tiny")
    width, height = Image.open(out).size
    assert width >= 6 * 224
    assert height >= 4 * 224


@pytest.mark.parametrize("masking", ["RandMaskNoFill(0.75)", "ObjMaskNoFill(top=50%)"])
def test_one_photograph_needs_no_donor_where_nothing_is_filled(digits: list[Path], tmp_path: Path, masking: str) -> None:
    mask_photographs(digits[:1], ["a seven."], out=tmp_path / "a.png", arch="tiny", pretrained="tiny", masking=masking)
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("name", [*PAPER_STRATEGIES, "ObjMaskMultiFill(0.6)", "CtxMaskNoFill(0.6)", "RandMaskNoFill(0.75)"])
def test_only_masked_patches_change_and_donors_are_other_images(name: str) -> None:
    torch.manual_seed(0)
    pool = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 48, 48, 3).contiguous()
    relevance = torch.rand(2, 36)
    mask, filled = apply(parse_strategy(name), pool, 2, relevance, torch.Generator().manual_seed(0), grid=6)
    pixels = torch.kron(mask, torch.ones(1, 8, 8, dtype=torch.bool))[..., None].expand(2, 48, 48, 3)
    assert mask.any()
    assert not mask.all()
    assert torch.equal(pixels, filled != pool[:2])


def test_a_single_fill_donor_is_never_the_image_itself() -> None:
    strategy = parse_strategy("ObjMaskSingleFill(0.3)")
    for seed in range(20):
        donors = other_donors(strategy, 3, 36, torch.Generator().manual_seed(seed)).donors
        assert donors is not None
        assert (donors != torch.arange(3)).all()


def test_the_tiny_model_says_which_prompts_it_knows() -> None:
    refuse_unknown_words(["a sketch of the number nine.", "a photo of the number one on gravel.", "A Seven on a cup of coffee"])
    with pytest.raises(ValueError, match="'a photo of a cow'; it knows the digits zero, one"):
        refuse_unknown_words(["the digit two.", "a photo of a cow"])


def test_missing_donors_and_other_mistakes(digits: list[Path], tmp_path: Path) -> None:
    def sheet(**options: object) -> None:
        settings = {"out": tmp_path / "a.png", "arch": "tiny", "pretrained": "tiny", **options}
        mask_photographs(digits[:1], ["a seven."], **settings)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="--donors FOLDER"):
        sheet()
    with pytest.raises(ValueError, match="no images in"):
        sheet(donors=tmp_path)
    with pytest.raises(ValueError, match=r"expected a \.png file"):
        sheet(out=tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"k: expected 1\.\.36 patches"):
        sheet(donors=digits[0].parent, masking="ObjMaskSingleFill(top=37)")


def test_an_all_zero_cam_is_one_clear_line(digits: list[Path], tmp_path: Path) -> None:
    weights = load_tiny_clip().state_dict()
    weights["visual.proj"] = torch.zeros_like(weights["visual.proj"])
    blind = tmp_path / "blind.safetensors"
    save_file(weights, blind)
    with pytest.raises(ValueError, match="zero everywhere: nothing in the picture raised the score of 'a seven"):
        mask_photographs(digits, ["a seven."], out=tmp_path / "a.png", arch="tiny", pretrained=str(blind))
    assert not (tmp_path / "a.png").exists()

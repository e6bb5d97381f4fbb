"""`cammask mask`: pictures of photographs, prompts and donors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cammask_fast.cam import relevance_of
from cammask_fast.checkpoint import Description, save_classifier
from cammask_fast.cli import main
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.kernels.normalise import normalise
from cammask_fast.masking import parse_strategy
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import load_tiny_clip, tiny_classifier
from cammask_fast.strategy import PAPER_STRATEGIES
from cammask_fast.viz import look as look_module
from cammask_fast.viz import mask_tool
from cammask_fast.viz.look import Look, look_with_checkpoint, look_with_prompts, refuse_unknown_words
from cammask_fast.viz.mask_images import apply, other_donors, photograph
from cammask_fast.viz.mask_rows import MaskSettings
from cammask_fast.viz.mask_tool import Drawn, Outputs, mask_photographs
from cammask_fast.viz.plots import GalleryRow


@cache
def tiny(*prompts: str) -> Look:
    return look_with_prompts("tiny", "tiny", prompts, "cpu")


def sheet(photographs: list[Path], look: Look, out: Path, *, donors: Path | None = None, **settings: Any) -> Drawn:
    return mask_photographs(photographs, look, MaskSettings(**settings), Outputs(out=out), donors=donors)


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
    assert sheet(digits[:2], tiny(*prompts), out).pages == [out]
    width, height = Image.open(out).size
    assert width >= 6 * 224
    assert height >= 4 * 224


@pytest.mark.parametrize("masking", ["RandMaskNoFill(0.75)", "ObjMaskNoFill(top=50%)"])
def test_one_photograph_needs_no_donor_where_nothing_is_filled(digits: list[Path], tmp_path: Path, masking: str) -> None:
    sheet(digits[:1], tiny("a seven."), tmp_path / "a.png", masking=masking)
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
    def one(**options: Any) -> None:
        sheet(digits[:1], tiny("a seven."), **{"out": tmp_path / "a.png", **options})

    with pytest.raises(ValueError, match="--donors FOLDER"):
        one()
    with pytest.raises(ValueError, match="no images in"):
        one(donors=tmp_path)
    with pytest.raises(ValueError, match=r"expected a \.png file"):
        one(out=tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"k: expected 1\.\.36 patches"):
        one(donors=digits[0].parent, masking="ObjMaskSingleFill(top=37)")


def test_an_all_zero_cam_is_one_clear_line(digits: list[Path], tmp_path: Path) -> None:
    weights = load_tiny_clip().state_dict()
    weights["visual.proj"] = torch.zeros_like(weights["visual.proj"])
    blind = tmp_path / "blind.safetensors"
    save_file(weights, blind)
    with pytest.raises(ValueError, match=r"a seven\.' is zero everywhere: nothing in the picture"):
        sheet(digits, look_with_prompts("tiny", str(blind), ["a seven."], "cpu"), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# one's own checkpoint, many photographs


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[GalleryRow]]]:
    """The pages that would be drawn."""
    pages: list[tuple[str, list[GalleryRow]]] = []
    monkeypatch.setattr(mask_tool, "gallery", lambda path, rows, cell: pages.append((path.name, list(rows))))
    return pages


def checkpoint(path: Path, names: tuple[str, ...]) -> Path:
    model = tiny_classifier(names)
    save_classifier(path, model, Description(arch="tiny", vit=model.visual.config, class_names=names))
    return path


Pages = list[tuple[str, list[GalleryRow]]]


def test_a_checkpoint_has_rows_of_its_classes(digits: list[Path], tmp_path: Path, drawn: Pages) -> None:
    own = checkpoint(tmp_path / "run" / "best.safetensors", ("one", "two", "seven"))
    argv = ["mask", *map(str, digits), "--out", str(tmp_path / "m.png")]
    assert main([*argv, "--checkpoint", str(own.parent)]) == 0
    titles = [row.title.split("\n")[1] for _, rows in drawn for row in rows]
    assert titles == ["one"] * 4 + ["two"] * 4 + ["seven"] * 4
    drawn.clear()
    assert main([*argv, "--pretrained", str(own), "--class", "Seven"]) == 0
    assert [row.title.split("\n")[1] for _, rows in drawn for row in rows] == ["seven"] * 4


def test_many_classes_get_the_predicted_one(digits: list[Path], tmp_path: Path, drawn: Pages) -> None:
    look = look_with_checkpoint(checkpoint(tmp_path / "best.safetensors", CLASS_NAMES), [], "cpu")
    sheet(digits, look, tmp_path / "m.png")
    shown = [row.title for _, rows in drawn for row in rows]
    images = torch.stack([photograph(path, 48) for path in digits])
    with torch.no_grad():
        best = look.model(normalise(images)).logits.argmax(1).tolist()
    assert shown == [f"{path.name}\n{CLASS_NAMES[label]}" for path, label in zip(digits, best, strict=True)]
    with pytest.raises(ValueError, match=r"'cow': .* has maps of its own classes only, zero, one"):
        look_with_checkpoint(tmp_path / "best.safetensors", ["cow"], "cpu")
    with pytest.raises(ValueError, match="needed with a pre-trained model"):
        look_with_prompts("tiny", "", [], "cpu")


def test_many_photographs_go_in_chunks(
    digits: list[Path], tmp_path: Path, drawn: Pages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same maps and masks, few images per graph and per chunk, numbered pages, one line for what cannot be read."""
    photographs = [*digits, *digits, digits[0]]
    sheet(photographs, tiny("a seven."), tmp_path / "m.png", masking="ObjMaskNoFill(0.3)")
    ((name, whole),) = drawn
    drawn.clear()
    for module, setting, value in (
        (mask_tool, "CHUNK", 2),
        (look_module, "TOKENS_OF_A_GRAPH", 37),
        (mask_tool, "ROWS_OF_A_PAGE", 4),
    ):
        monkeypatch.setattr(module, setting, value)
    graphs: list[int] = []

    def counted(model: Classifier, images: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        graphs.append(len(images))
        return relevance_of(model, images, *more, **options)

    monkeypatch.setattr("cammask_fast.viz.look.relevance_of", counted)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    written = sheet([*photographs, broken], tiny("a seven."), tmp_path / "m.png", masking="ObjMaskNoFill(0.3)").pages
    assert name == "m.png"
    assert [path.name for path in written] == ["m-1.png", "m-2.png", "m-3.png"] == [page for page, _ in drawn]
    rows = [row for _, page in drawn for row in page]
    assert set(graphs) == {1}
    assert [row.title for row in rows] == [row.title for row in whole]
    for ours, theirs in zip(rows, whole, strict=True):
        torch.testing.assert_close(ours.cam, theirs.cam, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.strategies["object mask, removed"][0], theirs.strategies["object mask, removed"][0])
    assert f"left out: 1, {broken}" in capsys.readouterr().err
    drawn.clear()
    monkeypatch.setattr(mask_tool, "CHUNK", 3)  # the last chunk has one photograph, which is filled from the others
    sheet(digits, tiny("a seven."), tmp_path / "m.png", masking="ObjMaskSingleFill(0.3)")
    assert len(drawn[0][1]) == 4
    assert all(
        (row.image != row.strategies["object mask, filled from one image"][1]).any() for _, page in drawn for row in page
    )
    with pytest.raises(ValueError, match=r"cannot read the image .*broken\.jpg"):
        sheet([broken], tiny("a seven."), tmp_path / "m.png", masking="ObjMaskNoFill(0.3)")


def test_the_first_layer_of_the_rollout(digits: list[Path], tmp_path: Path, drawn: Pages) -> None:
    argv = ["mask", *map(str, digits[:2]), "--class", "a seven.", "--out", str(tmp_path / "m.png")]
    for layer in ("0", "3"):
        assert main([*argv, "--cam-start-layer", layer]) == 0
    (_, all_layers), (_, last_layer) = drawn
    assert not torch.allclose(all_layers[0].cam, last_layer[0].cam, atol=0.05)
    assert main([*argv, "--cam-start-layer", "4"]) == 2
    drawn.clear()
    prompts = ["--class", "a three."]
    for contrast in ("none", "runner-up"):
        assert main([*argv, *prompts, "--cam", "legrad", "--cam-contrast", contrast]) == 0
    (_, plain), (_, contrasted) = drawn
    assert not torch.allclose(plain[0].cam, contrasted[0].cam, atol=0.05)
    assert main([*argv, "--cam-contrast", "mean"]) == 2, "one prompt has nothing to be compared with"

"""What `cammask mask` writes beside its sheet: overlays, arrays, numbers; nested donors, contrast, resolution."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from cammask_fast.cam.localisation import to_pixels
from cammask_fast.cam.perturbation import area_under, insertion_deletion
from cammask_fast.cli import main
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking.object_patches import Box
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.strategy import parse_strategy
from cammask_fast.viz import mask_tool
from cammask_fast.viz.look import Look, look_with_prompts
from cammask_fast.viz.mask_images import other_donors, photograph, read_photographs
from cammask_fast.viz.mask_rows import MaskSettings, shown_size
from cammask_fast.viz.mask_tool import Outputs, mask_photographs
from cammask_fast.viz.overlay import OverlaySettings, overlay
from cammask_fast.viz.plots import GalleryRow

PROMPTS = ("a photo of the number seven.", "the digit two.")


def picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A smooth picture with some structure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """The tiny model is read from its file once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cammask_fast.viz.look.load_pretrained", cache(load_pretrained))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs, and donors two folders deep."""
    root = tmp_path_factory.mktemp("photographs")
    picture(root / "given" / "wide.png", 300, 200, 1)
    picture(root / "given" / "tall.png", 90, 120, 2)
    for i in range(3):
        picture(root / "donors" / "a" / "b" / f"{i}.png", 100, 100, 10 + i)
    return root


@pytest.fixture(scope="module")
def look() -> Look:
    return look_with_prompts("tiny", "tiny", PROMPTS, "cpu")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[GalleryRow]:
    """The rows that would be drawn."""
    found: list[GalleryRow] = []
    monkeypatch.setattr(mask_tool, "gallery", lambda path, rows, cell: found.extend(rows))
    return found


def mask(*words: Any) -> int:
    return main(["mask", *map(str, words), "--class", PROMPTS[0], "--class", PROMPTS[1]])


def test_the_sheet_shows_the_photograph_and_counts_patches(
    folder: Path, look: Look, drawn: list[GalleryRow], tmp_path: Path
) -> None:
    """Not the 48 pixels that the model sees; the masks are those of what it sees."""
    files = sorted((folder / "given").iterdir())
    mask_photographs(files, look, MaskSettings(threshold="top=5"), Outputs(out=tmp_path / "m.png", boxes=True))
    assert [row.image.shape[0] for row in drawn] == [shown_size(6)] * 4 == [264] * 4
    seen = torch.stack([photograph(path, 48) for path in files])
    labels = torch.tensor([1, 1])
    expected = normalise_relevance(look.maps(seen, labels, "mm-cam", 0)).view(2, 6, 6)
    torch.testing.assert_close(torch.stack([row.cam for row in drawn[2:]]), expected, rtol=1e-4, atol=1e-5)
    probability = look.logits(seen).softmax(1)[0, 1]
    title, context = "object mask (top 5), filled from one image", "context mask (top 5), filled from one image"
    assert drawn[2].notes == {
        title: "5 of 36 patches masked",
        context: "31 of 36 patches masked",
        "": f"probability {probability:.2f}",
    }
    assert sum((c - a) * (d - b) for a, b, c, d in drawn[2].boxes[title]) >= 5
    mask_GG, filled = drawn[2].strategies[title]
    pixels = mask_GG.repeat_interleave(44, 0).repeat_interleave(44, 1)
    torch.testing.assert_close(filled[~pixels], drawn[2].image[~pixels], rtol=0, atol=0)
    assert (filled[pixels] != drawn[2].image[pixels]).float().mean() > 0.5


def test_masks_that_leave_nothing_are_said(folder: Path, drawn: list[GalleryRow], tmp_path: Path, capsys: Any) -> None:
    out = ("--out", tmp_path / "m.png")
    assert mask(folder / "given", "--masking", "ObjMaskNoFill", "--threshold", "top=36", *out) == 0
    assert "object mask (top 36), removed, 36 of 36 patches masked: 4 rows, " in capsys.readouterr().err
    assert mask(folder / "given", "--masking", "ObjMaskNoFill", "--threshold", "1.0", *out) == 0
    assert "removed, 0 of 36 patches masked: 4 rows, " in capsys.readouterr().err
    assert mask(folder / "given", "--masking", "ObjMaskNoFill", "--threshold", "top=35", *out) == 0
    err = capsys.readouterr().err
    assert "patches masked" not in err
    assert "48 x 48 pixels, and knows nothing else" in err


def test_arrays_say_where_every_patch_comes_from(
    folder: Path, drawn: list[GalleryRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebuilt from image, mask and donors, across chunks; donors lie two folders deep and are never the photographs."""
    monkeypatch.setattr(mask_tool, "CHUNK", 1)
    shutil.copytree(folder, tmp_path / "all")
    given, donors = tmp_path / "all" / "given", tmp_path / "all"
    npz = tmp_path / "new" / "a.npz"
    assert mask(given, "--donors", donors, "--npz", npz, "--masking", "ObjMaskMultiFill(0.3)", "--out", tmp_path / "m.png") == 0
    found = np.load(npz)
    assert [Path(name).name for name in found["photographs"]] == ["tall.png", "tall.png", "wide.png", "wide.png"]
    assert found["prompts"].tolist() == [*PROMPTS, *PROMPTS]
    assert found["strategies"].tolist() == ["object mask, filled from many"]
    names = found["donor_photographs"].tolist()
    assert all(Path(name).parent == donors / "donors" / "a" / "b" for name in names)
    others, _ = read_photographs([Path(name) for name in names], size=48, shown=48)
    for i in range(4):
        torch.testing.assert_close(torch.from_numpy(found["image"][i]), photograph(Path(found["photographs"][i]), 48))
        relevance = torch.from_numpy(found["map"][i])
        assert np.array_equal(found["mask"][i, 0], normalise_relevance(relevance.flatten()[None]).view(6, 6) > 0.3)
        rebuilt = found["image"][i].copy()
        for row, column in np.argwhere(found["donors"][i, 0] >= 0):
            where = slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8)
            rebuilt[where] = others[found["donors"][i, 0, row, column]].seen.numpy()[where]
        assert np.array_equal(found["donors"][i, 0] >= 0, found["mask"][i, 0])
        assert np.array_equal(rebuilt, found["counterfactual"][i, 0])
    assert len(names) > 1


def test_an_overlay_has_the_photograph_at_its_own_size(folder: Path) -> None:
    """The map lies over the model's crop and nowhere else."""
    path, cam = folder / "given" / "wide.png", torch.zeros(6, 6)
    cam[:, 3:] = 1.0
    plain = np.asarray(Image.open(path).convert("RGB"))
    found = np.asarray(overlay(path, cam, seen=48, settings=OverlaySettings(alpha=1.0, bar=False)))
    assert found.shape == plain.shape
    assert np.array_equal(found[:, :50], plain[:, :50])
    assert np.array_equal(found[:, 250:], plain[:, 250:])
    brightest = np.array(mpl.colormaps["inferno"](1.0, bytes=True)[:3])
    assert np.array_equal(found[100, 245], brightest)
    assert found[100, 60].max() <= 6
    half = np.asarray(overlay(path, cam, seen=48, settings=OverlaySettings(alpha=0.5, bar=False)))
    assert np.abs(half[100, 245] - (plain[100, 245].astype(float) + brightest) / 2).max() <= 1
    untouched = np.asarray(overlay(path, cam, seen=48, settings=OverlaySettings(alpha=0.0, bar=False)))
    assert np.array_equal(untouched[5:195, 60:240], plain[5:195, 60:240])
    boxed = np.asarray(overlay(path, cam, seen=48, boxes=[Box(0, 0, 3, 6, 18)], settings=OverlaySettings(alpha=0.0, bar=False)))
    yellow = (boxed == (255, 255, 0)).all(-1)
    assert yellow[100, [50, 149]].all()
    assert not yellow[100, [100, 200]].any()


def test_size_and_bar_of_an_overlay(folder: Path) -> None:
    path, cam = folder / "given" / "tall.png", torch.rand(6, 6)
    assert overlay(path, cam, seen=48, settings=OverlaySettings(size=240, bar=False)).size == (180, 240)
    width, height = overlay(path, cam, seen=48, settings=OverlaySettings(size=240)).size
    assert height == 240
    assert 195 < width < 240


def test_overlays_get_names_of_their_own(folder: Path, drawn: list[GalleryRow], tmp_path: Path) -> None:
    shutil.copytree(folder / "given", tmp_path / "in" / "x")
    shutil.copytree(folder / "given", tmp_path / "in" / "y")
    assert mask(tmp_path / "in", "--overlay", tmp_path / "o", "--no-colorbar", "--out", tmp_path / "m.png") == 0
    stems = ["tall-a-photo-of-the-number-seven", "tall-the-digit-two", "wide-a-photo-of-the-number-seven", "wide-the-digit-two"]
    assert sorted(path.stem for path in (tmp_path / "o").iterdir()) == sorted([*stems, *(f"{stem}-2" for stem in stems)])
    assert Image.open(tmp_path / "o" / "wide-the-digit-two-2.png").size == (300, 200)


def test_numbers_as_json(folder: Path, drawn: list[GalleryRow], tmp_path: Path, capsys: Any) -> None:
    """Boxes are pixels of the photograph; a contrast changes the map and not the probabilities' order."""
    words = (
        folder / "given" / "wide.png",
        "--masking",
        "CtxMaskNoFill",
        "--threshold",
        "top=1",
        "--json",
        "--out",
        tmp_path / "m.png",
    )
    assert mask(*words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert mask(*words, "--contrast-with", "a two on a cat", "--resolution", "96") == 0
    other = json.loads(capsys.readouterr().out)
    for found, grid in ((plain, 6), (other, 12)):
        for row in found["rows"]:
            (made,) = row["masks"].values()
            assert (made["masked"], made["patches"], row["grid"]) == (grid**2 - 1, grid**2, grid)
            assert made["boxes"][0][0] >= 50
            assert max(box[2] for box in made["boxes"]) <= 250
            assert [0 <= one < grid for one in row["peak"]] == [True, True]
    assert sum(row["probability"] for row in plain["rows"]) == pytest.approx(1)
    assert sum(row["probability"] for row in other["rows"]) < 0.999
    assert plain["sheets"] == [str(tmp_path / "m.png")]
    assert any("knows nothing else" in line for line in plain["notices"])


def test_a_prompt_to_contrast_with_means_the_mean(folder: Path, drawn: list[GalleryRow], tmp_path: Path) -> None:
    words = (folder / "given", "--out", tmp_path / "m.png")
    for more in ((), ("--contrast-with", "a two on a cat"), ("--contrast-with", "a two on a cat", "--cam-contrast", "none")):
        assert mask(*words, *more) == 0
    plain, contrasted, uncontrasted = (torch.stack([row.cam for row in drawn[i : i + 4]]) for i in (0, 4, 8))
    torch.testing.assert_close(plain, uncontrasted)
    assert (plain - contrasted).abs().max() > 0.05


def test_scores_of_a_single_photograph(folder: Path, look: Look, drawn: list[GalleryRow], tmp_path: Path, capsys: Any) -> None:
    """RISE's areas of the row's own map, prompt and photograph."""
    wide, tall = folder / "given" / "wide.png", folder / "given" / "tall.png"
    assert mask(wide, tall, "--scores", "--json", "--masking", "ObjMaskNoFill(0.3)", "--out", tmp_path / "m.png") == 0
    found = json.loads(capsys.readouterr().out)["rows"][2]
    seen, label = photograph(wide, 48)[None], torch.tensor([1])
    pixels = to_pixels(look.maps(seen, label, "mm-cam", 0), 48)
    with torch.no_grad():
        curves = insertion_deletion(lambda x: look.model(x).logits, normalise(seen), label, pixels)
    insertion, deletion = (area_under(curve).item() for curve in curves)
    assert (found["image"], found["prompt"]) == (str(wide), PROMPTS[1])
    assert (found["insertion"], found["deletion"]) == pytest.approx((insertion, deletion), abs=1e-4)
    assert drawn[2].notes["CAM"] == f"insertion {insertion:.2f}, deletion {deletion:.2f}"
    one = ("--scores", "--masking", "ObjMaskNoFill(0.3)", "--out", str(tmp_path / "m.png"))
    assert main(["mask", str(wide), "--class", PROMPTS[0], *one]) == 2
    assert "need two or more prompts" in capsys.readouterr().err


def test_given_donors_fill_alone() -> None:
    for name, shape in (("ObjMaskSingleFill(0.3)", (9,)), ("ObjMaskMultiFill(0.3)", (9, 36))):
        donors = other_donors(parse_strategy(name), 9, 36, torch.Generator().manual_seed(0), given=4).donors
        assert donors is not None
        assert donors.shape == shape
        assert set(donors.flatten().tolist()) == ({5, 6, 7, 8} if len(shape) == 2 else set(donors.tolist()) & {5, 6, 7, 8})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "300"), "--size: says how overlays look"),
        (("--no-colorbar",), "--no-colorbar: says how"),
        (("--overlay", "o", "--alpha", "1.5"), "--alpha: expected an opacity"),
        (("--overlay", "o", "--size", "3"), "--size: expected 16"),
        (("--npz", "a.np"), r"--npz: expected a .npz file"),
        (("--threshold", "otto"), "unknown threshold 'otto'"),
        (("--threshold", "otsu", "--masking", "ObjMaskNoFill(0.3)"), "leave out --threshold"),
        (("--contrast-with", PROMPTS[0]), "is given twice"),
        (("--cam-contrast", "mean", "--cam", "rollout"), "attention rollout has no class score"),
        (("--resolution", "50"), "multiple of the model's patches of 8 pixels, such as 48 or 56"),
    ],
)
def test_mistakes_say_what_to_do(folder: Path, tmp_path: Path, capsys: Any, words: tuple[str, ...], message: str) -> None:
    assert mask(folder / "given", "--out", tmp_path / "m.png", *words) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_donors_that_are_the_photograph_do_not_count(
    folder: Path, drawn: list[GalleryRow], tmp_path: Path, capsys: Any
) -> None:
    one = folder / "given" / "wide.png"
    assert mask(one, "--donors", one, "--out", tmp_path / "m.png") == 2
    assert "give --donors FOLDER with other images" in capsys.readouterr().err
    assert mask(one, "--donors", folder, "--out", tmp_path / "m.png") == 0
    assert mask(folder / "given", "--donors", folder / "given", "--out", tmp_path / "m.png") == 0

"""`cammask cam-bench` and `cf.cam_bench`: images and masks from folders, what is explained, what is printed and refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import cammask_fast as cf
from cammask_fast.api.map_bench import MapScores, explained_logits
from cammask_fast.cam.benchmark import MapProtocol, MapScore, measure_maps
from cammask_fast.cli import main
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.model.zero_shot import tiny_classifier

COUNT = 6
CHEAP = ["--metrics", "masks", "perturbation", "--cam", "mm-cam", "random"]
LOADING = ["--loader", "torch", "--workers", "0"]
NOTHING: Any = None
WRONG: Any = (torch.zeros(1, 48, 48, 3, dtype=torch.uint8), [1])
SCENES = sample_scenes(evaluation_specifications()["id"])[slice(0, COUNT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures of the benchmark in class folders, and masks of their digits."""
    root = tmp_path_factory.mktemp("maps")
    covered = (255 * (stroke_coverage(SCENES) > 0.5)).to(torch.uint8)
    for i, (label, image, mask) in enumerate(zip(SCENES.labels, render(SCENES), covered, strict=True)):
        for kind, pixels in (("photos", image), ("masks", mask)):
            path = root / kind / CLASS_NAMES[label] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
    return root / "photos", root / "masks"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["cam-bench", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def expected(coverage: Tensor | None) -> dict[str, MapScore]:
    groups = ("perturbation",) if coverage is None else ("masks", "perturbation")
    protocol = MapProtocol(cams=("mm-cam",), groups=groups)
    labels = torch.from_numpy(SCENES.labels)
    return measure_maps(tiny_classifier(CLASS_NAMES), render(SCENES), labels, coverage=coverage, protocol=protocol)


def test_a_folder_with_masks(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, masks = folders
    classes = tmp_path / "names.txt"
    classes.write_text("\n".join(sorted({CLASS_NAMES[label] for label in SCENES.labels})))
    table = tmp_path / "new" / "maps.csv"
    code, out, _ = run(
        capsys, "tiny", "--data", photos, "--masks", masks, *CHEAP, *LOADING, "--json", "--csv", table, "--class-names", classes
    )
    assert code == 0
    found = json.loads(out)
    assert list(found["maps"]) == ["mm-cam", "random"]
    assert found["settings"]["images"] == COUNT
    assert found["settings"]["masks"] == str(masks)
    assert found["settings"]["passes_per_image_and_map"] == 18
    values = found["maps"]["mm-cam"]["values"]
    gold = cf.cam_bench(cf.load("tiny"), photos, masks=masks, cams=["mm-cam"], metrics=["masks", "perturbation"])
    assert values == pytest.approx(gold["mm-cam"].values, abs=1e-6)
    own = expected((stroke_coverage(SCENES) > 0.5).float())["mm-cam"].values
    assert values["pixel_accuracy"] == pytest.approx(own["pixel_accuracy"], abs=15), "another head, of fewer classes"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["map"] for row in rows} == {"mm-cam", "random"}
    assert {row["data"] for row in rows} == {str(photos)}
    by_metric = {row["metric"]: row for row in rows if row["map"] == "mm-cam"}
    assert float(by_metric["positive"]["value"]) == pytest.approx(values["positive"], abs=1e-3)
    assert float(by_metric["positive"]["standard_error"]) > 0
    assert [by_metric[name]["better"] for name in ("positive", "negative", "best_threshold")] == ["lower", "higher", ""]
    assert "ms_per_image" in by_metric


def test_the_benchmark_knows_its_masks(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tiny", *CHEAP, "--images", COUNT)
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0].split("|")[3:-1]] == ["mm-cam", "random"]
    gold = expected(stroke_coverage(SCENES))["mm-cam"]
    (energy,) = (line for line in lines if line.startswith("| relevance on the object's patches"))
    cells = [cell.strip() for cell in energy.split("|")]
    assert cells[2:4] == ["↑", f"{gold.values['energy']:.1f} ± {gold.errors['energy']:.1f}"]
    assert f"images {COUNT}" in out
    assert "seed 0" in out
    assert "masks of the benchmark" in out


def test_without_masks(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tiny", "--data", folders[0], "--metrics", "perturbation", "--cam", "random", *LOADING)
    assert code == 0
    assert "masks none" in out
    assert "positive perturbation" in out
    assert "IoU" not in out


def test_images_without_an_object_are_left_out(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, masks = folders
    names = sorted(masks.rglob("*.png"))
    for path in names[2:]:
        other = tmp_path / path.relative_to(masks)
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())
    empty = tmp_path / names[0].relative_to(masks)
    empty.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (48, 48)).save(empty)
    argv = ["tiny", "--data", photos, "--masks", tmp_path, "--metrics", "masks", "--cam", "random", *LOADING]
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert f"images {COUNT - 2}," in out
    assert f"left out: 2 of {COUNT}" in err
    assert run(capsys, *argv, "--strict")[0] == 2
    for path in tmp_path.rglob("*.png"):
        Image.new("L", (48, 48)).save(path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert "no image has an object" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cam", "gradcam"], "did you mean grad-cam?"),
        (["--metrics", "iou"], "invalid choice: 'iou'"),
        (["--masks", "."], "the embedded benchmark knows its own"),
        (["--images", "0"], "images: expected 1 or more, got 0"),
        (["--steps", "-2"], "steps: expected 1 or more"),
        (["--threshold", "1.5"], "threshold: expected a value in [0, 1)"),
        (["--data", "no-such-folder"], "no folder at no-such-folder"),
    ],
)
def test_wrong_options(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "tiny", *argv)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_masks_are_wanted_and_there_are_none(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "tiny", "--data", folders[0], "--metrics", "masks", *LOADING)
    assert code == 2
    assert "need known masks" in err


def test_images_in_memory() -> None:
    model = cf.load("tiny", classes=CLASS_NAMES)
    images, labels, masks = render(SCENES), torch.from_numpy(SCENES.labels), stroke_coverage(SCENES)
    found = cf.cam_bench(model, (images, labels), masks=masks, cams=["mm-cam"], metrics=["masks", "perturbation"])
    assert found["mm-cam"].values == pytest.approx(expected(masks)["mm-cam"].values)
    assert (found.images, found.masks) == (COUNT, True)
    page = found._repr_html_()
    assert "<th>mm-cam</th>" in page
    assert f"{found['mm-cam'].values['energy']:.1f} ±" in page
    few = cf.cam_bench(model, (images, labels), cams=["random"], metrics=["perturbation"], images=2)
    assert (few.images, few.masks) == (2, False)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: cf.cam_bench(m, steps=0, colour=1), "unknown settings: colour"),
        (lambda m: cf.cam_bench(m, explain="both"), "explain: expected label or predicted, got 'both'"),
        (lambda m: cf.cam_bench(m, images=True), "images: expected 1 or more"),
        (lambda m: cf.cam_bench(m, WRONG), "a pair of images and labels"),
        (lambda m: cf.cam_bench(m, (render(SCENES), torch.full((COUNT,), 10))), "labels: expected 0 to 9, got 10 to 10"),
        (lambda m: cf.cam_bench(m, (render(SCENES), torch.zeros(2, dtype=torch.int64))), "labels: expected one per image"),
        (lambda m: cf.cam_bench(m, masks=torch.zeros(1)), "masks: expected the folder"),
        (lambda m: cf.cam_bench(m, (render(SCENES), torch.zeros(COUNT).long()), masks="x"), "masks: expected a tensor"),
        (lambda m: cf.cam_bench(NOTHING), "model: expected a model from cf.load"),
    ],
)
def test_wrong_arguments(call: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(cf.load("tiny", classes=CLASS_NAMES))


def test_which_logit_is_explained() -> None:
    """Logits 0 and 2 stand for label 0, logit 1 for label 1, and logit 3 counts for nothing."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0], [5.0, 0.0, 2.0, 9.0]])
    model: Any = SimpleNamespace(head=SimpleNamespace(weight=torch.zeros(4, 1)))

    class Says(SimpleNamespace):
        def __call__(self, pixels: Tensor) -> Any:
            return SimpleNamespace(logits=logits[: len(pixels)])

    says: Any = Says(head=model.head)
    images, groups = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, -1])
    assert explained_logits(says, images, torch.tensor([0, 0]), groups, "label").tolist() == [2, 0]
    assert explained_logits(says, images, torch.tensor([1, 1]), groups, "label").tolist() == [1, 1]
    assert explained_logits(says, images, torch.tensor([1, 1]), groups, "predicted").tolist() == [1, 0]
    same = torch.arange(4)
    assert explained_logits(says, images, torch.tensor([3, 0]), same, "label").tolist() == [3, 0]
    assert explained_logits(says, images, torch.tensor([0, 0]), same, "predicted").tolist() == [3, 3]


def test_rows_of_maps_with_other_metrics() -> None:
    scores = MapScores(
        {
            "a": MapScore({"insertion": 12.34, "best_threshold": 0.3}, {"insertion": 1.0}, 2.0),
            "b": MapScore({"deletion": 5.0}, {}, 0.0),
        },
        images=2,
        masks=False,
    )
    assert scores.rows() == [
        ["threshold of the best mIoU", "", "0.30", "-"],
        ["insertion AUC", "↑", "12.3 ± 1.0", "-"],
        ["deletion AUC", "↓", "-", "5.0"],
        ["ms per image", "↓", "2.00", "-"],
    ]

"""Tables, claims and pictures from results with known answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from bench.__main__ import main
from bench.pages import fill
from bench.records import ROOT
from cammask_fast.cam.localisation import localisation, object_patches
from cammask_fast.demo.report import (
    accuracy_section,
    accuracy_table,
    claims,
    compared,
    mean_curves,
    mean_std,
    paired,
    reading,
    summary,
    write_report,
)
from cammask_fast.distributed import BUCKET_BYTES
from cammask_fast.viz.plots import GalleryRow, contact_sheet, gallery, gallery_figure


def results(**headline: list[float]) -> dict[str, Any]:
    def method(identity: list[float], ood: list[float]) -> dict[str, Any]:
        return {"id": identity, "ood": {"flipped": ood, "sketch": ood}, "ood_mean": ood}

    masked = {"id": [84.0, 86.0], "ood": [75.0, 75.0]} | headline
    curve = [[a, {"id": 80 + 10 * a, "flipped": 75 - 10 * a, "sketch": 75 - 10 * a}] for a in (0.0, 0.5)]
    quality = {"energy": 50.0, "masked": 60.0, "area": 40.0}
    return {
        "methods": {
            "zeroshot": method([80.0, 80.0], [75.0, 75.0]),
            "ft": method([90.0, 90.0], [65.0, 65.0]),
            "wise-ft": method([85.0, 85.0], [72.0, 72.0]),
            "ft-fd": method([83.0, 85.0], [74.0, 74.0]),
            "masked-object": method(masked["id"], masked["ood"]),
        },
        "headline": "masked-object",
        "seeds": [0, 1],
        "curves": {"ft": [curve, curve]},
        "cam": {"ft": [{"mm-cam": quality, "grad-cam": quality}] * 2},
        "configs": {"ft": {"epochs": 1}},
        "seconds": 12.0,
        "peak_rss_mb": 100,
        "environment": {"cpu": "c", "cores": 2, "torch": "t", "date": "d"},
    }


def test_mean_std_is_the_sample_deviation() -> None:
    assert mean_std([1.0, 3.0]) == "2.0 ± 1.4"
    assert mean_std([2.0]) == "2.0"


def test_the_table_holds_every_method_in_order() -> None:
    lines = accuracy_table(results()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["zeroshot", "ft", "wise-ft", "ft-fd", "**masked-object**"]
    assert "85.0 ± 1.4" in lines[-1]
    assert len({len(line) for line in lines}) == 1


def test_claims_hold_and_fail_as_the_numbers_say() -> None:
    assert [ok for _, _, ok in claims(results())] == [True] * 5
    assert [ok for _, _, ok in claims(results(ood=[69.0, 69.0]))] == [True, True, False, False, True]
    assert [ok for _, _, ok in claims(results(id=[82.0, 83.0]))] == [True, True, True, True, False]


def test_paired_differences_are_seed_by_seed() -> None:
    fd, wise = paired(results())
    assert "+1.00, +1.00 (mean +1.00)" in fd
    assert "+1.00, +2.00 (mean +1.50)" in wise
    assert "95 % interval -4.85 to +7.85 (t, 0 of 2 seeds negative): not told apart" in wise, "12.71 * 0.707 / 1.414"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.56, -0.38, -0.77], "95 % interval -1.05 to -0.09 (t, 3 of 3 seeds negative): lower"),
        ([-0.04, -0.65, -0.71], "95 % interval -1.39 to +0.45 (t, 3 of 3 seeds negative): not told apart"),
        ([0.5, 0.6, 0.4], "95 % interval +0.25 to +0.75 (t, 0 of 3 seeds negative): higher"),
        ([-1.0], "one seed says nothing about the sign"),
    ],
)
def test_a_sign_is_claimed_only_where_the_interval_has_one(differences: list[float], verdict: str) -> None:
    assert compared("a", "b", differences).endswith(verdict)


def test_sentences_follow_the_numbers() -> None:
    shift, keep = reading(results())
    assert shift == "ft against zero-shot: +10.0 points of ID, -10.0 with the background flipped, -10.0 of average OOD"
    assert keep.endswith("within 0.5 points: masked-object (+5.0 ID, +0.0 OOD)")
    assert reading(results(ood=[74.4, 74.4]))[1].endswith("within 0.5 points: none")
    cam = copy.deepcopy(results())
    cam["cam"]["masked-object"] = [{"mm-cam": {"energy": 55.5, "area": 40.0}, "grad-cam": {"energy": 49.0, "area": 40.0}}] * 2
    mm_cam, grad_cam = reading(cam)[2:]
    assert mm_cam.startswith("MM-CAM energy on the digit: 55.5 % after masked-object, +5.5 points against ft, +15.5 against")
    assert "-1.0 points against ft, +9.0 against" in grad_cam


def test_the_short_report_is_part_of_the_whole_one() -> None:
    short, whole = accuracy_section(results()), summary(results())
    assert all(line in whole for line in short.splitlines() if line.startswith(("|", "-")))
    assert "`make demo`: 2 seeds; 12 s and 100 MB on 2 cores (c), torch t, d" in short
    assert accuracy_section(results() | {"full": True}).splitlines()[-1].startswith("`make demo-full`: ")


def test_curves_average_over_seeds_and_end_at_the_method() -> None:
    assert list(mean_curves(results()).values()) == [[(80.0, 75.0), (85.0, 70.0), (90.0, 65.0)]]


def rows() -> list[GalleryRow]:
    image = torch.randint(0, 255, (48, 48, 3), dtype=torch.uint8)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    return [GalleryRow("seven", image, torch.rand(6, 6), {"object": (mask, image), "context": (~mask, image)})] * 2


def test_report_is_one_file_with_everything(tmp_path: Path) -> None:
    gallery(tmp_path / "gallery.png", rows())
    text = write_report(tmp_path, results())
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "masked-object" in page
    assert "85.0 ± 1.4" in page
    assert (tmp_path / "table.md").read_text().strip() in text
    for name in ("gallery.png", "tradeoff.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


def test_notes_and_boxes_of_a_gallery_stand_at_their_pictures() -> None:
    (row, _) = rows()
    noted = row._replace(notes={"": "probability", "CAM": "scores", "context": "36 of 36"}, boxes={"object": [(1, 2, 3, 6)]})
    axes = gallery_figure([noted]).axes
    assert [[text.get_text() for text in axis.texts] for axis in axes] == [
        ["probability"],
        ["scores"],
        [],
        [],
        ["36 of 36"],
        [],
    ]
    assert [len(axis.patches) for axis in axes] == [0, 0, 1, 0, 0, 0]
    (box,) = axes[2].patches
    assert isinstance(box, Rectangle)
    assert tuple(box.get_bbox().extents) == (7.5, 15.5, 23.5, 47.5)  # pixel centres are whole numbers


def test_contact_sheet(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", {"web": torch.zeros(8, 48, 48, 3, dtype=torch.uint8)})
    assert (tmp_path / "sheet.png").stat().st_size > 500
    with pytest.raises(ValueError, match="cannot write"):
        contact_sheet(tmp_path / "missing" / "sheet.png", {"web": torch.zeros(1, 48, 48, 3, dtype=torch.uint8)})


def test_localisation_of_known_maps() -> None:
    coverage = torch.zeros(3, 12, 12)
    coverage[:, :6, :6] = 1.0
    touched = object_patches(coverage, grid=2)
    assert touched.tolist() == [[True, False, False, False]] * 3
    maps = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.0, 0, 0, 0]])
    found = localisation(maps, touched, threshold=0.3)
    assert found.energy == pytest.approx(100 * (1 + 0.5 + 0.25) / 3)
    assert found.masked == pytest.approx(100 * (1 + 0.5 + 0.25) / 3)
    assert found.area == pytest.approx(25.0)


@pytest.mark.slow
def test_the_scaling_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import scaling

    assert main(["scaling"]) == 0
    text = capsys.readouterr().out.strip()
    assert "ViT-L/14" in text
    page = (ROOT / "docs/resume-and-scaling.md").read_text()
    assert fill(page, "model", text) == page
    work = scaling.Work(flops=1e12, units=7.5, parameters=100_000_000)
    step, whole, exposed = scaling.seconds(work, 8, 64)
    assert step == pytest.approx(64e12 / (989e12 * 0.4))
    assert whole == pytest.approx(2 * 7 / 8 * 4e8 / (450e9 * 0.8))
    assert exposed == pytest.approx(2 * 7 / 8 * BUCKET_BYTES / (450e9 * 0.8)), "all but the last bucket is hidden"
    assert scaling.seconds(work, 64, 64)[1] == pytest.approx(whole + 2 * 7 / 8 * 0.5e8 / (50e9 * 0.8))


@pytest.mark.slow
def test_the_cost_of_a_checkpoint_is_measured(tmp_path: Path) -> None:
    from bench import checkpoints

    record = checkpoints.measure("tiny", 2, 2, tmp_path)
    assert record["stall_share"] == record["stall_seconds"] / 500 / record["step_seconds"]
    assert 0 < record["stall_seconds"] < record["write_seconds"]
    assert record["mb"] > 5.5, "weights and both moments"

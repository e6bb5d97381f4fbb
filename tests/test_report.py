"""Tables, claims and pictures from results with known answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.records import ROOT
from cammask_fast.cam.localisation import localisation, object_patches
from cammask_fast.demo.report import (
    BEGIN,
    END,
    accuracy_table,
    claims,
    mean_curves,
    mean_std,
    paired,
    refresh_readme,
    write_report,
)
from cammask_fast.distributed import BUCKET_BYTES
from cammask_fast.viz.plots import GalleryRow, contact_sheet, gallery


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


def test_contact_sheet(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", {"web": torch.zeros(8, 48, 48, 3, dtype=torch.uint8)})
    assert (tmp_path / "sheet.png").stat().st_size > 500
    with pytest.raises(ValueError, match="cannot write"):
        contact_sheet(tmp_path / "missing" / "sheet.png", {"web": torch.zeros(1, 48, 48, 3, dtype=torch.uint8)})


def test_readme_is_refreshed_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{BEGIN}\nold\n{END}\nbottom\n")
    refresh_readme(readme, json.loads(json.dumps(results())))
    text = readme.read_text()
    assert text.startswith("top\n")
    assert text.endswith(f"{END}\nbottom\n")
    assert "old" not in text
    assert "85.0 ± 1.4" in text
    full_begin, full_end = BEGIN.replace("results", "full results"), END.replace("results", "full results")
    readme.write_text(f"{text}{full_begin}\n{full_end}\n")
    refresh_readme(readme, results(ood=[60.0, 60.0]) | {"full": True})
    assert readme.read_text().startswith(text + full_begin), "the other table stays"
    assert "60.0 ± 0.0" in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected one"):
        refresh_readme(readme, results())


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
def test_the_scaling_page_shows_what_the_command_prints() -> None:
    from bench import scaling

    words = [sys.executable, "-m", "bench", "scaling"]
    text = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert "ViT-L/14" in text
    assert text in (ROOT / "docs/scaling.md").read_text()
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

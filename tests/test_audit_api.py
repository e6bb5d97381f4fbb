"""The audit from Python, in the report of a run, and its bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import cammask_fast as cf
from bench.audit import correlation_line, order_line, section
from cammask_fast.cli import main
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications

NAMES = ("zero", "<i>one")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Zeros and ones of the benchmark, their labels and where their strokes are."""
    scenes = sample_scenes(evaluation_specifications()["id"])[slice(0, 80)]
    rows = torch.from_numpy(scenes.labels) < 2
    return render(scenes)[rows], torch.from_numpy(scenes.labels)[rows], stroke_coverage(scenes)[rows]


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny", classes=NAMES)


def test_an_audit_from_python(model: cf.Model, digits: tuple[Tensor, Tensor, Tensor], tmp_path: Path) -> None:
    images, labels, strokes = digits
    data = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    quick: Any = {"contexts": 1}
    found = cf.audit(model, data, masks=strokes, against=model, **quick)
    assert list(found.to_dict()) == [
        "accuracy", "context_reliance", "object_reliance", "interval", "classes", "against", "comparison",
    ]  # fmt: skip
    assert found.to_dict()["comparison"]["difference"]["context_reliance"] == 0
    assert found.context_reliance == found.to_dict()["context_reliance"]
    assert found.object_reliance == found.to_dict()["object_reliance"]
    assert found.audited.trials.audited == len(labels)
    found.save(tmp_path / "a.html")
    for page in ((tmp_path / "a.html").read_text(), found._repr_html_()):
        assert "&lt;i&gt;one" in page
        assert "<i>" not in page
    by_map = cf.audit(model, data, object_share=0.25, images=10, **quick)
    assert by_map.audited.trials.masks["object_filled"].sum(1).unique().tolist() == [9]
    assert by_map.audited.trials.audited == 10
    alone = cf.audit(model, data, groups=[3, 3], **quick)
    assert alone.context_reliance is None
    other = cf.load("tiny", classes=NAMES[::-1])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"masks": strokes[1:]}, "masks: expected bool or float"), ({"groups": [0]}, "groups: expected a file"),
        ({"against": other}, "against: expected a model with the same classes"), ({"maps_by": other}, "maps_by: expected"),
        ({"against": "tiny"}, "against: expected a model from cf.load"), ({"kind": "x"}, "unknown cam"),
        ({"images": 0}, "images"),
    ]  # fmt: skip
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            cf.audit(model, data, **given)
    assert cf.audit(model, data, maps_by=cf.load("tiny"), **quick).audited.trials.audited == len(labels)


@pytest.mark.slow
def test_a_folder_from_python_and_a_run_that_is_audited(
    digits: tuple[Tensor, Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (image, label) in enumerate(zip(digits[0], digits[1].tolist(), strict=True)):
        path = tmp_path / "photos" / CLASS_NAMES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    data, out = tmp_path / "photos", tmp_path / "run"
    argv = ["train", "--data", str(data), "--epochs", "1", "--batch-size", "4", "--lr", "1e-3", "--loader", "torch"]
    argv += ["--workers", "0", "--audit"]
    assert main([*argv, "--out", str(out), "--val-share", "0.5", "--cam", "grad-cam"]) == 0
    said = capsys.readouterr()
    assert "audit: fine-tuned: " in said.out
    assert "than before training" in said.out
    record = json.loads((out / "audit.json").read_text())
    assert record["accuracy"]["clean"]["accuracy"] == json.loads((out / "run.json").read_text())["accuracy"]["validation"]
    assert {"against", "comparison"} <= record.keys()
    page = (out / "report.html").read_text()
    assert "What the model looks at" in page
    assert "Counterfactuals that cost most" in page
    found = cf.audit(cf.load(out), str(data), contexts=1)
    assert found.audited.class_names == ("one", "zero")
    with pytest.raises(ValueError, match="expected the folder of their images"):
        cf.audit(cf.load(out), str(data), masks=digits[2])
    assert main([*argv, "--out", str(tmp_path / "none"), "--val-share", "0"]) == 2
    assert "--audit: there are no validation images" in capsys.readouterr().err


def record(model: str, seed: int, reliance: float, flipped: float) -> dict[str, Any]:
    figures = {"context_reliance": reliance, "object_reliance": 0.5}
    return {
        "op": "audit", "model": model, "seed": seed, "true": figures, "map": figures | {"context_reliance": reliance / 2},
        "id": 80.0, "flipped": flipped, "images": 300, "evaluated": 1000, "contexts": 4, "batch_size": 64,
        "cpu": "c", "torch": "t", "commit": "x",
    }  # fmt: skip


def test_the_bench_says_how_many_seeds_agree_and_how_few_models_there_are() -> None:
    records = [record("zeroshot", 0, 0.0, 75.0)]
    for seed in range(4):
        records += [record("ft", seed, 0.3 - 0.01 * seed, 45.0 + seed), record("wise-ft", seed, 0.2, 60.0)]
        records += [record("masked-object", seed, 0.25 if seed == 3 else 0.1, 70.0 + seed)]
    models = {name: [one for one in records if one["model"] == name] for name in ("ft", "wise-ft", "masked-object")}
    assert order_line(models, "true") == "true masks: ft above wise-ft above masked-object in 3 of 4 seeds"
    assert order_line({"ft": models["ft"]}, "true") == ""
    line = correlation_line(records, "map")
    assert line.startswith("own maps: r = -0.")
    assert "over 8 trained models; fewer than the 30 that were planned" in line
    assert "planned" not in correlation_line(records * 4, "map")
    assert correlation_line(records[:4], "map") == ""
    text = section(records)
    assert text.index("| ft ") < text.index("| wise-ft ") < text.index("| masked-object ") < text.index("| zeroshot ")
    assert "`cammask bench audit --images 300 --contexts 4 --evaluated 1000 --batch-size 64` (images" in text
    assert section([]) == "Not yet measured."

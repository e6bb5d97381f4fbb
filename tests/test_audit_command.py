"""`cammask audit`: models, folders and masks as people have them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cammask_fast.audit.subject import read_groups, shown_names
from cammask_fast.checkpoint import Description, save_classifier
from cammask_fast.checkpoint.heads import Classes
from cammask_fast.cli import main
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.data.object_masks import object_of
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import tiny_classifier

LOADING = ["--precision", "fp32", "--loader", "torch", "--workers", "0", "--contexts", "2"]
HOSTILE = "<script>alert(1)</script>"
USED = ("zero", "one", "seven")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits of three classes in `photos/`, and their masks in `masks/`, a few pixels larger."""
    root = tmp_path_factory.mktemp("digits")
    scenes = sample_scenes(evaluation_specifications()["id"])[slice(0, 36)]
    for i, (label, image, strokes) in enumerate(zip(scenes.labels, render(scenes), stroke_coverage(scenes), strict=True)):
        name = CLASS_NAMES[label]
        if name in USED:
            for folder, suffix, pixels in (("photos", "png", image), ("masks", "gif", (strokes > 0.5).byte() * 255)):
                path = root / folder / name / f"{i:02d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                made = Image.fromarray(pixels.numpy())
                (made if folder == "photos" else made.resize((96, 96))).save(path)
    return root


def saved(path: Path, model: Classifier, names: tuple[str, ...], **run: Any) -> str:
    save_classifier(path, model, Description(arch="tiny", vit=model.visual.config, class_names=names, run=run))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint over the three classes in another order than the folders', one of them with a hostile name."""
    model = tiny_classifier(("seven", "zero", "one"))
    names, folders = (HOSTILE, "zero", "one"), ("seven", "zero", "one")
    return saved(tmp_path_factory.mktemp("run") / "best.safetensors", model, names, class_folders=folders)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same classes in the folders' order, with weights that know less."""
    weaker = tiny_classifier(("one", "seven", "zero"))
    with torch.no_grad():
        weaker.head.weight.mul_(0.2)
    names, folders = ("one", HOSTILE, "zero"), ("one", "seven", "zero")
    return saved(tmp_path_factory.mktemp("run") / "best.safetensors", weaker, names, class_folders=folders)


def record_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["audit", *argv, "--json", *LOADING]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["audit", *LOADING, *argv]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


@pytest.mark.slow
def test_an_audit_as_table_json_csv_and_page(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, page = tmp_path / "new" / "a.csv", tmp_path / "other" / "a.html"
    argv = [model, "--data", str(photos / "photos")]
    record = record_of(capsys, *argv, "--csv", str(table), "--html", str(page))
    assert list(record) == ["accuracy", "context_reliance", "object_reliance", "interval", "classes"]
    assert list(record["accuracy"]) == ["clean", "same_context", "other_context", "object_filled", "random_filled"]
    assert set(record["classes"]) == {HOSTILE, "zero", "one"}
    assert sum(one["images"] for one in record["classes"].values()) == record["accuracy"]["clean"]["images"]
    low, high = record["interval"]["object_reliance"]
    assert low <= record["object_reliance"] <= high
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["", *record["classes"]]
    assert float(rows[0]["context_reliance"]) == pytest.approx(record["context_reliance"])
    assert float(rows[1]["object_reliance_high"]) == pytest.approx(record["classes"][HOSTILE]["interval"]["object_reliance"][1])
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text, "nothing is fetched"
    shown = 1 + sum(min(3, one["images"]) for one in record["classes"].values())
    assert len(re.findall(r'<img alt="[^"]*" src="data:image/(png|jpeg);base64,', text)) == text.count("<img") == shown
    assert main(["audit", *argv, *LOADING]) == 0
    printed = capsys.readouterr().out
    assert f"{record['context_reliance']:+.3f}" in printed
    assert "context of other classes" in printed
    assert "MM-CAM" in printed.upper()


@pytest.mark.slow
def test_two_models_on_the_same_counterfactuals(
    model: str, other: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one's head is put into the order of the first; a pre-trained model gets the first one's classes."""
    argv = [model, "--data", str(photos / "photos"), "--maps-by", "tiny"]
    alone = record_of(capsys, *argv)
    record = record_of(capsys, *argv, "--against", other)
    assert {key: record[key] for key in alone} == alone
    second = record["against"]
    assert second["accuracy"]["clean"] == pytest.approx(record_of(capsys, other, *argv[1:])["accuracy"]["clean"])
    for key in ("context_reliance", "object_reliance"):
        assert record["comparison"]["difference"][key] == pytest.approx(alone[key] - second[key])
    assert record["accuracy"]["clean"]["accuracy"] == second["accuracy"]["clean"]["accuracy"], "in the order of the first"
    assert record["accuracy"]["clean"]["probability"] > second["accuracy"]["clean"]["probability"]
    same = record_of(capsys, model, "--data", str(photos / "photos"), "--against", model)
    assert set(same["comparison"]["difference"].values()) == {0.0}
    assert main(["audit", *argv, "--against", other, *LOADING]) == 0
    assert re.search(r"^/tmp/.*run0 relies|^.*run0 relies", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_given_masks_tell_the_object(model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, masks = photos / "photos", photos / "masks"
    known = record_of(capsys, model, "--data", str(data), "--masks", str(masks))
    assert known != record_of(capsys, model, "--data", str(data))
    assert known["accuracy"]["object_filled"]["probability"] < known["accuracy"]["random_filled"]["probability"]
    split = tmp_path / "whole"
    split.mkdir()
    (split / "val").symlink_to(data)
    shutil.copytree(masks, tmp_path / "of" / "photos")
    assert record_of(capsys, model, "--data", str(data), "--masks", str(tmp_path / "of")) == known, "by the data's own name"
    assert record_of(capsys, model, "--data", str(split), "--masks", str(masks)) == known, "of the split that is read"
    some = tmp_path / "some"
    for path in sorted(masks.rglob("*.gif"))[1:]:
        (some / path.parent.name).mkdir(parents=True, exist_ok=True)
        (some / path.parent.name / path.name).write_bytes(path.read_bytes())
    full = next(some.rglob("*.gif"))
    Image.new("L", (48, 48), 255).save(full)
    assert main(["audit", model, "--data", str(data), "--masks", str(some), *LOADING]) == 0
    said = capsys.readouterr().err
    assert "images without a mask: 1" in said
    assert "not audited, a mask that covers nothing: 1" in said
    assert "not audited, a mask that covers everything: 1" in said
    assert "--strict" in fails(capsys, model, "--data", str(data), "--masks", str(some), "--strict")
    Image.new("L", (48, 30), 255).save(full)
    assert "48 x 30 pixels and its photograph" in fails(capsys, model, "--data", str(data), "--masks", str(some))
    full.write_bytes(b"none")
    assert "cannot read" in fails(capsys, model, "--data", str(data), "--masks", str(some))
    (tmp_path / "empty").mkdir()
    shutil.copytree(masks / "one", tmp_path / "elsewhere")
    for folder, message in (("empty", "no images in"), ("gone", "no folder at"), ("elsewhere", "no mask for any image")):
        assert message in fails(capsys, model, "--data", str(data), "--masks", str(tmp_path / folder))
    assert "give one of them" in fails(capsys, model, "--data", str(data), "--masks", str(masks), "--maps-by", "tiny")


@pytest.mark.slow
def test_few_images_and_other_classes(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(name: str, **counts: int) -> str:
        for of_class, count in counts.items():
            for path in sorted((photos / "photos" / of_class).iterdir())[:count]:
                (tmp_path / name / of_class).mkdir(parents=True, exist_ok=True)
                (tmp_path / name / of_class / path.name).write_bytes(path.read_bytes())
        return str(tmp_path / name)

    one = record_of(capsys, model, "--data", folder("few", zero=2, one=1))
    assert one["accuracy"]["clean"]["images"] == 2
    assert (one["classes"]["one"]["images"], one["classes"]["one"]["left_out"]) == (0, 1)
    assert main(["audit", model, "--data", str(tmp_path / "few"), *LOADING, "--html", str(tmp_path / "few.html")]) == 0
    assert "no other image of the class to take a context from: 1" in capsys.readouterr().err
    assert "no other image of the class" in (tmp_path / "few.html").read_text()
    single = folder("single", zero=3)
    assert record_of(capsys, model, "--data", single)["context_reliance"] is None
    assert (
        main(
            [
                "audit",
                model,
                "--data",
                single,
                *LOADING,
                "--html",
                str(tmp_path / "single.html"),
                "--csv",
                str(tmp_path / "s.csv"),
            ]
        )
        == 0
    )
    assert "context reliance cannot be known" in capsys.readouterr().out
    assert "no image can be audited" in fails(capsys, model, "--data", folder("lonely", zero=1, one=1))
    (tmp_path / "few" / "nine").mkdir()
    (tmp_path / "few" / "nine" / "a.png").write_bytes(next((photos / "photos" / "one").iterdir()).read_bytes())
    assert "outside the 3 known classes: nine" in fails(capsys, model, "--data", str(tmp_path / "few"))
    unlike = saved(tmp_path / "unlike.safetensors", tiny_classifier(("zero", "one")), ("zero", "one"))
    assert "must have the same classes" in fails(capsys, model, "--data", single, "--against", unlike)
    for words, message in (
        (["--object-share", "1"], "--object-share"), (["--contexts", "0"], "--contexts"), (["--images", "1"], "--images"),
        (["--templates", "x"], "brings its own head"),
    ):  # fmt: skip
        assert message in fails(capsys, model, "--data", single, *words)
    chosen = record_of(capsys, model, "--data", str(photos / "photos"), "--images", "6")
    assert chosen["accuracy"]["clean"]["images"] == 6
    monkeypatch.setattr("cammask_fast.commands.audit.launched", lambda: True)
    assert "without torchrun" in fails(capsys, model, "--data", single)


def test_classes_that_share_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "groups.txt"
    file.write_text("cow\tgrass\nsheep, grass\nwhale\tsea\n")
    assert read_groups(file, ("cow", "eagle", "sheep", "whale")).tolist() == [0, 1, 0, 2]
    assert "groups of their own: 1, eagle" in capsys.readouterr().err
    for text, message in (("dog\tgrass", "no class dog"), ("cow", "line 1: expected FOLDER<TAB>GROUP"), ("cow\t", "line 1")):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_groups(file, ("cow", "sheep"))
    assert shown_names(("n1", "n2"), Classes(("cow", "sheep"), ("n1", "n2"))) == ("cow", "sheep")
    assert shown_names(("n1", "n2"), Classes(("crane", "crane"), ("n1", "n2"))) == ("n1", "n2"), "names that occur twice"


def test_masks_in_the_formats_of_people() -> None:
    values = np.array([[0, 1, 100], [0, 200, 255]], np.uint8)
    expected = {
        "L": [0, 0, 0, 0, 255, 255], "small": [0, 255, 255, 0, 255, 255], "P": [0, 255, 255, 0, 255, 255], "white": [255] * 6,
        "RGB": [0, 0, 0, 0, 255, 255], "RGBA": [0, 0, 0, 0, 255, 255], "opaque": [0, 0, 0, 0, 255, 255],
        "I;16": [0, 0, 0, 0, 255, 255], "1": [0, 0, 0, 0, 255, 255],
    }  # fmt: skip
    palette = Image.fromarray(values, "L").convert("P")
    palette.putpalette([0, 0, 0] + [9, 0, 0] * 255)
    white = Image.new("P", (3, 2), 0)
    white.putpalette([255, 255, 255])
    alpha = Image.new("RGBA", (3, 2), (9, 9, 9, 255))
    opaque = Image.merge("RGBA", [Image.fromarray(values)] * 3 + [Image.new("L", (3, 2), 255)])
    alpha.putalpha(Image.fromarray(values))
    made = {
        "L": Image.fromarray(values), "small": Image.fromarray((values > 0).astype(np.uint8) * 3), "P": palette, "white": white,
        "RGB": Image.fromarray(values).convert("RGB"), "RGBA": alpha, "opaque": opaque,
        "I;16": Image.fromarray(values.astype(np.uint16) * 200), "1": Image.fromarray(values > 150),
    }  # fmt: skip
    for name, image in made.items():
        assert np.asarray(object_of(image)).flatten().tolist() == expected[name], name

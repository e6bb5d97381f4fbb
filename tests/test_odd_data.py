"""Whole commands on data as people have them: each works, or ends with one line that is true."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cammask_fast.checkpoint import load_classifier
from cammask_fast.cli import main
from cammask_fast.commands import evaluation, recipes
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.datasets.webdataset import open_shards
from cammask_fast.runtime.run_dir import refuse_changes
from tests.test_cli import fails
from tests.test_folder import make_folder, write_image
from tests.test_webdataset import jpeg, write_tar

PLAIN = ["--loader", "torch", "--workers", "0"]
QUICK = ["--epochs", "1", "--batch-size", "4", "--lr", "1e-4", *PLAIN]


def train(data: Path | str, out: Path, *options: object, method: str = "zeroshot") -> dict[str, Any]:
    """Run `train` and return its run.json."""
    argv = ["train", "--data", data, "--method", method, "--out", out, *QUICK, *options]
    assert main([str(arg) for arg in argv]) == 0
    return json.loads((out / "run.json").read_text())


def evaluate(run: Path, data: Path, *options: object) -> int:
    argv = ["evaluate", "--checkpoint", run / "best.safetensors", "--data", data, *PLAIN, *options]
    return main([str(arg) for arg in argv])


@pytest.mark.slow
def test_a_class_called_train_is_trained_scored_and_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {"bus": 6, "car": 6, "train": 6})
    run = train(data, tmp_path / "run", method="lp")
    assert (run["class_folders"], run["train_images"]) == (["bus", "car", "train"], 15)
    assert evaluate(tmp_path / "run", data, "--json") == 0
    assert main(["data", "pack", str(data), str(tmp_path / "packed")]) == 0
    packed = open_shards(str(tmp_path / "packed"))
    assert (len(packed), packed.folders) == (18, ("bus", "car", "train"))


@pytest.mark.slow
def test_splits_of_export_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 6), ("valid", 2), ("test", 3)):
        make_folder(data / split, {"a": count, "b": count})
    run = train(data, tmp_path / "run", method="lp")
    assert run["train_images"] == 12
    assert run["validation_accuracy"] is not None
    started = capsys.readouterr().out
    assert f"{data}/train: 12 training images, 2 classes of 6 to 6" in started
    assert f"4 validation images, {data}/valid" in started
    assert len(started.splitlines()) <= 24, "a screen at most"
    assert evaluate(tmp_path / "run", data, "--json") == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["sets"]
    assert (row["data"], row["images"]) == (str(data / "valid"), 4)
    assert "valid/ is evaluated; for the other one, name its folder" in printed.err
    assert json.loads(printed.out)["notices"] == [printed.err.strip().removeprefix("cammask: warning: ")]
    assert evaluate(tmp_path / "run", data / "train") == 0
    assert "the model was trained on images of this set" in capsys.readouterr().err
    error = fails(capsys, "evaluate", "--checkpoint", tmp_path / "run" / "best.safetensors", "--data", data, *PLAIN, "--strict")
    assert "an error because of --strict" in error
    assert main(["data", "pack", str(data), str(tmp_path / "packed")]) == 0
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == ["test", "train", "valid"]


@pytest.mark.slow
def test_what_is_noticed_stands_in_run_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {"polar_bear": 20, "polar bear": 20, "cat/images": 20})
    (data / "polar bear" / "notes.txt").touch()
    (data / "polar_bear" / "03.jpg").write_bytes(b"no image")
    run = train(data, tmp_path / "run", "--val-share", "0.9", "--max-bad", "0.1")
    error = capsys.readouterr().err
    for line, text in zip(
        run["notices"], ("taken for that class: 20", "1 .txt", "more than one class", "cannot be read"), strict=True
    ):
        assert text in line
        assert line in error
    (data / "polar bear" / "notes.txt").unlink()
    argv = ["train", "--data", data, "--method", "zeroshot", "--out", tmp_path / "other", *QUICK, "--strict"]
    assert "taken for that class: 20" in fails(capsys, *argv)
    images = data / "cat" / "images"
    images.rename(tmp_path / "images")
    (data / "cat").rmdir()
    (tmp_path / "images").rename(data / "cat")
    assert "'polar bear' and 'polar_bear'" in fails(capsys, *argv)
    (data / "polar bear").rename(data / "polar")
    assert "03.jpg (not an image" in fails(capsys, *argv, "--val-share", "0.9"), "no unreadable image is allowed"
    assert not (tmp_path / "other" / "run.json").exists()


@pytest.mark.slow
def test_lists_with_byte_order_marks_and_numeric_folders(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", {"2": 2, "10": 2, "1": 2})
    (tmp_path / "classes.txt").write_text("1\n10\n2\n", encoding="utf-8-sig")
    (tmp_path / "names.txt").write_text("one\ntwo\nten\n", encoding="utf-16")
    (tmp_path / "templates.txt").write_text("the digit {}.\n", encoding="utf-8-sig")
    files = [("--classes", "classes.txt"), ("--class-names", "names.txt"), ("--templates", "templates.txt")]
    run = train(data, tmp_path / "run", *(arg for option, name in files for arg in (option, tmp_path / name)))
    assert dict(zip(run["class_folders"], run["class_names"], strict=True)) == {"1": "one", "2": "two", "10": "ten"}
    assert any("in numeric order: 1, 2, 10" in line for line in run["notices"])


def test_text_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {"a": 2, "b": 2})
    argv = ["train", "--data", data, "--method", "zeroshot", "--out", tmp_path / "run", *QUICK]
    (tmp_path / "two.txt").write_text("a photo of a {}, a type of {}.\n")
    assert "two.txt, line 1: 2 placeholders {}" in fails(capsys, *argv, "--templates", tmp_path / "two.txt")
    wnids = ",".join(f"n{number:08d}" for number in range(30))
    assert "has no class n00000000" in fails(capsys, *argv, "--classes", wnids)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nb\n")
    assert "byte 0xe9 in line 1 is not UTF-8" in fails(capsys, *argv, "--class-names", tmp_path / "latin.txt")
    assert "a pattern of shards goes in quotes" in fails(capsys, "train", "--data", "0.tar", "1.tar")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_folder(tmp_path / os.fsdecode(b"d\xe9") / "val", {"a": 6, os.fsdecode(b"caf\xe9"): 6})
    assert train(data, tmp_path / "run", "--val-share", "0")["class_names"] == ["a", r"caf\xe9"]
    capsys.readouterr()
    assert evaluate(tmp_path / "run", data, "--out", tmp_path / "scores") == 0
    assert "     12        2" in capsys.readouterr().out
    assert r",caf\xe9," in (tmp_path / "scores" / "per_class.csv").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["sets"][0]["images"] == 12
    assert main(["data", "pack", str(data), str(tmp_path / "packed")]) == 0
    assert evaluate(tmp_path / "run", tmp_path / "packed") == 0, "the same names in shards"

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation, "write_scores", full)
    capsys.readouterr()
    assert evaluate(tmp_path / "run", data, "--out", tmp_path / "scores") == 2
    printed = capsys.readouterr()
    assert "     12        2" in printed.out, "the table comes before what can fail"
    assert "No space left on device; make room there, or set TMPDIR" in printed.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/pymp-1"),
            "set TMPDIR to another folder if it is the temporary one",
        ),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "set TMPDIR to a folder that can be written"),
        (
            RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n…: No space left on device (28)"),
            "shared memory (/dev/shm) or the temporary folder is full; try fewer --workers",
        ),
    ],
)
def test_a_full_temporary_folder_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def full(_args: object) -> None:
        raise error

    monkeypatch.setattr(recipes, "run_recipes", full)
    assert message in fails(capsys, "recipes")


@pytest.mark.slow
def test_images_that_change_between_start_and_resume_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {"a": 6, "b": 6})
    train(data, tmp_path / "run", method="lp")
    (tmp_path / "run" / "run.json").unlink()
    data.rename(tmp_path / "moved")
    assert train(tmp_path / "moved", tmp_path / "run", method="lp")["notices"] == [], "only the location has changed"
    (tmp_path / "run" / "run.json").unlink()
    write_image(tmp_path / "moved" / "a" / "00.jpg", 9, (200, 100))
    (line,) = train(tmp_path / "moved", tmp_path / "run", method="lp")["notices"]
    assert "the images have changed since the run in" in line
    (tmp_path / "run" / "run.json").unlink()
    write_image(tmp_path / "moved" / "a" / "99.jpg", 9)
    write_image(tmp_path / "moved" / "b" / "99.jpg", 9)
    argv = ["train", "--data", tmp_path / "moved", "--method", "lp", "--out", tmp_path / "run", *QUICK]
    assert "train_images 12 instead of 10" in fails(capsys, *argv)


def test_a_fingerprint_knows_names_and_sizes_and_no_places(tmp_path: Path) -> None:
    first = scan(make_folder(tmp_path / "x", {"a": 3, "b": 2}))
    same = scan(make_folder(tmp_path / "y", {"a": 3, "b": 2}))
    assert first.fingerprint() == same.fingerprint()
    (tmp_path / "y" / "a" / "00.jpg").rename(tmp_path / "y" / "a" / "03.jpg")
    assert scan(tmp_path / "y").fingerprint() != first.fingerprint()
    (tmp_path / "x" / "b" / "01.jpg").write_bytes(b"other")
    assert scan(tmp_path / "x").fingerprint() not in (first.subset(first.labels == 0).fingerprint(), same.fingerprint())
    members = {"0.jpg": jpeg(0), "0.cls": b"0"}
    shards = [open_shards(str(write_tar(tmp_path / name / "0.tar", members))) for name in ("s", "t")]
    assert shards[0].fingerprint() == shards[1].fingerprint()
    other = open_shards(str(write_tar(tmp_path / "u" / "0.tar", {**members, "0.jpg": jpeg(0) + b"x"})))
    assert other.fingerprint() != shards[0].fingerprint()


def test_runs_from_before_there_were_fingerprints_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_changes({"seed": 0}, {"seed": 0, "images": "x"}, tmp_path)
    refuse_changes({"seed": 0, "images": "x"}, {"seed": 0, "images": "x"}, tmp_path)
    assert capsys.readouterr().err == ""
    refuse_changes({"seed": 0, "images": "y"}, {"seed": 0, "images": "x"}, tmp_path)
    assert "the images have changed" in capsys.readouterr().err


@pytest.mark.slow
def test_names_and_order_of_classes_survive_shards(tmp_path: Path) -> None:
    """A model of a folder scores the packed shards of the same images as the folder."""
    data = make_folder(tmp_path / "data", {"red_fox": 5, "Dog": 4})
    train(data, tmp_path / "run", "--val-share", "0")
    assert load_classifier(tmp_path / "run" / "best.safetensors")[1].class_names == ("Dog", "red fox")
    assert main(["data", "pack", str(data), str(tmp_path / "packed")]) == 0
    for name, path in (("folder", data), ("shards", tmp_path / "packed")):
        assert evaluate(tmp_path / "run", path, "--out", tmp_path / name) == 0
    scores = [json.loads((tmp_path / name / "scores.json").read_text())["sets"][0] for name in ("folder", "shards")]
    assert scores[0]["per_class"] == scores[1]["per_class"]

"""Where the splits of `--data` lie: spellings, classes that are called like splits, shards, patterns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cammask_fast.data.datasets.webdataset import are_shards, open_shards, shard_paths
from cammask_fast.data.factory import DataSubset, training_sources
from cammask_fast.data.layout import evaluation_location, find_splits, open_source, training_locations
from tests.test_folder import make_folder, write_image
from tests.test_webdataset import jpeg, write_tar

TWO = {"a": 2, "b": 2}


def found(root: Path) -> dict[str, str]:
    return {split: os.path.relpath(str(path), root) for split, path in find_splits(str(root)).items()}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}),
        (("train", "valid", "test"), {"train": "train", "val": "valid", "test": "test"}),
        (("Training", "VALIDATION"), {"train": "Training", "val": "VALIDATION"}),
        (("testing", "Valid"), {"val": "Valid", "test": "testing"}),
        (("training",), {"train": "training"}),
        (("a", "b"), {}),
    ],
)
def test_spellings(tmp_path: Path, folders: tuple[str, ...], expected: dict[str, str]) -> None:
    for name in folders:
        make_folder(tmp_path / name, TWO)
    assert found(tmp_path) == expected


def test_valid_validates_and_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 4), ("valid", 2), ("test", 3)):
        make_folder(tmp_path / name, {"a": count, "b": count})
    train, held_out = training_sources(str(tmp_path), DataSubset(), seed=0)
    assert held_out is not None
    assert (len(train), len(held_out), held_out.where) == (8, 4, str(tmp_path / "valid"))
    assert capsys.readouterr().err == ""
    assert evaluation_location(str(tmp_path)) == str(tmp_path / "valid")
    error = capsys.readouterr().err
    assert "has the splits train/, valid/, test/: valid/ is evaluated; for the other one, name its folder" in error


def test_training_images_are_never_scored_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "Train", TWO)
    assert evaluation_location(str(tmp_path)) == str(tmp_path / "Train")
    assert "warning: " in (error := capsys.readouterr().err)
    assert "Train/ is evaluated, which holds images for training; there are no others" in error
    make_folder(tmp_path / "test", TWO)
    assert evaluation_location(str(tmp_path)) == str(tmp_path / "test")
    assert capsys.readouterr().err.endswith("has the splits Train/, test/: test/ is evaluated\n")
    make_folder(tmp_path / "usual" / "train", TWO)
    make_folder(tmp_path / "usual" / "val", TWO)
    assert evaluation_location(str(tmp_path / "usual")) == str(tmp_path / "usual" / "val")
    assert capsys.readouterr().err == ""


def test_a_class_may_be_called_like_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "one", {"bus": 2, "car": 2, "train": 3})
    make_folder(tmp_path / "three", {"test": 2, "train": 2, "val": 2})
    make_folder(tmp_path / "nested", {"bus": 2, "car/images": 2, "train/images": 3})
    for name, classes in (("one", "bus car train"), ("three", "test train val"), ("nested", "bus car train")):
        root = str(tmp_path / name)
        assert find_splits(root) == {}
        assert training_locations(root) == (root, None)
        assert evaluation_location(root) == root
        assert open_source(root).folders == tuple(classes.split())
    capsys.readouterr()
    make_folder(tmp_path / "split", {"train/bus": 2, "train/train": 2, "notes": 1})
    write_image(tmp_path / "split" / "train" / "preview.jpg", 1)
    assert found(tmp_path / "split") == {}, "a stray image and other folders with images: train/ is taken for a class"
    (tmp_path / "split" / "train" / "preview.jpg").unlink()
    assert found(tmp_path / "split") == {"train": "train"}
    assert "has the splits train/; other folders with images, not used: 1, notes" in capsys.readouterr().err


def test_a_stray_image_beside_the_classes_of_a_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", TWO)
    write_image(tmp_path / "train" / "preview.jpg", 1)
    assert found(tmp_path) == {"train": "train"}


def test_splits_that_cannot_be_used(tmp_path: Path) -> None:
    make_folder(tmp_path / "x" / "val", TWO)
    with pytest.raises(ValueError, match="has no train split; it has val/: name the folder to train on"):
        training_locations(str(tmp_path / "x"))
    make_folder(tmp_path / "x" / "valid", TWO)
    with pytest.raises(ValueError, match="two folders for one split, val/, valid/: rename or merge them"):
        find_splits(str(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"no folder at .*x/train: .*; .*x holds val, valid"):
        open_source(str(tmp_path / "x" / "train"))
    make_folder(tmp_path / "flat" / "train", TWO)
    write_image(tmp_path / "flat" / "test" / "0.jpg", 1)
    with pytest.raises(ValueError, match="its images lie outside class folders"):
        open_source(evaluation_location(str(tmp_path / "flat")))
    for archive in ("photos.tar.gz", "photos.ZIP"):
        with pytest.raises(ValueError, match="a compressed archive: unpack it"):
            open_source(archive)


def tar(path: Path, count: int = 1) -> Path:
    return write_tar(path, {f"{i}.{kind}": jpeg(i) if kind == "jpg" else b"0" for i in range(count) for kind in ("jpg", "cls")})


def test_patterns_of_shards(tmp_path: Path) -> None:
    first, second = tar(tmp_path / "d" / "0.tar"), tar(tmp_path / "d" / "1.tar")
    assert shard_paths(str(tmp_path / "d" / "*.tar")) == [first, second]
    assert len(open_shards(str(tmp_path / "*" / "[01].tar"))) == 2
    with pytest.raises(ValueError, match=r"no file matches .*d/x\*.tar"):
        shard_paths(str(tmp_path / "d" / "x*.tar"))
    with pytest.raises(ValueError, match=r"names 1 shards more than once, such as .*0.tar"):
        shard_paths(str(tmp_path / "d" / "{0,0}.tar"))
    odd = tar(tmp_path / "d[1]" / "a.tar")
    assert shard_paths(str(odd)) == [odd], "a name with brackets is a name if there is such a file"


def test_shards_beside_class_folders_and_splits_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "classes", TWO)
    tar(tmp_path / "classes" / "x.tar")
    assert open_source(str(tmp_path / "classes")).folders == ("a", "b")
    assert ".tar files beside folders of images, ignored: 1, such as x.tar" in capsys.readouterr().err
    assert not are_shards(str(tmp_path / "missing"))
    for name in ("in-train-0.tar", "in-train-1.tar", "in-validation-0.tar", "rest.tar"):
        tar(tmp_path / "shards" / name, 3)
    train, held_out = training_sources(str(tmp_path / "shards"), DataSubset(), seed=0)
    assert held_out is not None
    assert (len(train), len(held_out)) == (6, 3)
    error = capsys.readouterr().err
    assert "the shards are splits by their names: 2 train, 1 val; not used: 1, such as rest.tar" in error
    for name in ("train", "val"):
        tar(tmp_path / "folders" / name / "0.tar", 2)
    assert found(tmp_path / "folders") == {"train": "train", "val": "val"}
    assert find_splits(str(tmp_path / "folders" / "train")) == {}


def test_what_lies_beside_splits_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "train", {"a": 2, "b": 2})
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert set(find_splits(str(tmp_path))) == {"train"}
    assert capsys.readouterr().err == ""
    for name in ("x.tar", "loose.jpg", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    assert set(find_splits(str(tmp_path))) == {"train"}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "images and shards beside them, not used: 2, loose.jpg, x.tar" in said

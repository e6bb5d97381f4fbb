"""Image folders: scanning, splits, few-shot and class subsets, class names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cammask_fast.data.class_names import class_list, read_class_names
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.factory import DataSubset, training_sources
from cammask_fast.data.layout import find_splits
from cammask_fast.data.splits import few_shot, hold_out, hold_out_images, labelled_by, of_classes
from cammask_fast.data.transforms import Transform, decode


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A smooth random image of (width, height) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def make_folder(root: Path, counts: dict[str, int], suffix: str = ".jpg") -> Path:
    for index, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i:02}{suffix}", seed=100 * index + i)
    return root


def test_scan_sorts_follows_links_and_ignores_other_files(tmp_path: Path) -> None:
    make_folder(tmp_path, {"dog": 2, "cat": 1})
    write_image(tmp_path / "cat" / "big.JPEG", 7)
    (tmp_path / "cat" / "zz.jpg").symlink_to(tmp_path / "dog" / "00.jpg")
    (tmp_path / "cat" / ".hidden.jpg").write_bytes(b"no image")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    found = scan(tmp_path)
    assert found.folders == ("cat", "dog")
    assert found.files == ("cat/00.jpg", "cat/big.JPEG", "cat/zz.jpg", "dog/00.jpg", "dog/01.jpg")
    assert found.read(2) == found.read(3)
    assert found.labels.tolist() == [0, 0, 0, 1, 1]


def test_train_and_val_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 3, "b": 2, "c": 2})
    make_folder(tmp_path / "val", {"b": 1, "c": 2})
    train, val = training_sources(str(tmp_path), DataSubset(), seed=0)
    assert val is not None
    assert len(train) == 7
    assert val.labels.tolist() == [1, 2, 2]
    held = training_sources(str(tmp_path), DataSubset(val_images=2), seed=0)[1]
    assert held is not None
    assert held.where.endswith("train"), "asked to hold out, val/ is left for the test"
    make_folder(tmp_path / "val", {"d": 1})
    with pytest.raises(ValueError, match="d; known: a, b, c"):
        training_sources(str(tmp_path), DataSubset(), seed=0)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.99])
def test_the_split_is_stratified_and_follows_the_seed(tmp_path: Path, share: float) -> None:
    folder = scan(make_folder(tmp_path, {"a": 8, "b": 2, "c": 5}))
    train, val = hold_out(folder, share=share, seed=3)
    assert set(train.files).isdisjoint(val.files)
    assert set(train.files) | set(val.files) == set(folder.files)
    assert train.labels.unique().tolist() == val.labels.unique().tolist() == [0, 1, 2]
    assert (val.labels == 0).sum() == min(max(1, round(share * 8)), 7)
    assert hold_out(folder, share=share, seed=3)[1].files == val.files
    if share == 0.25:
        assert hold_out(folder, share=share, seed=4)[1].files != val.files


def test_class_names(tmp_path: Path) -> None:
    folders = ("n01", "tabby_cat")
    file = tmp_path / "names.txt"
    assert read_class_names(None, folders) == ("n01", "tabby cat")
    file.write_text("goldfish\n\ntabby\n")
    assert read_class_names(file, folders) == ("goldfish", "tabby")
    file.write_text("tabby_cat\ttabby\nn01\tgoldfish\nother\tfox\n")
    assert read_class_names(file, folders) == ("goldfish", "tabby")
    for text, message in (
        ("one\n", "1 class names for 2"), ("n01\tx\n", "no class for the folders tabby_cat"), ("", "empty"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_names(file, folders)


def test_held_out_images_keep_the_proportions_of_the_classes(tmp_path: Path) -> None:
    folder = scan(make_folder(tmp_path, {"a": 10, "b": 5, "c": 4, "d": 1}))
    train, val = hold_out_images(folder, 7, seed=0)
    assert (len(train), len(val)) == (13, 7)
    assert torch.bincount(val.labels, minlength=4).tolist() == [4, 2, 1, 0], "exact shares are 3.5, 1.75, 1.4, 0.35"
    assert set(train.files).isdisjoint(val.files)
    assert len(hold_out_images(folder, 16, seed=0)[0]) == 4, "one image of each class always stays"
    for images in (0, 17):
        with pytest.raises(ValueError, match=r"--val-images: expected 1 to 16"):
            hold_out_images(folder, images, seed=0)


@pytest.mark.parametrize("shots", [1, 3, 100])
def test_few_shot_ends_when_a_class_is_small(tmp_path: Path, shots: int) -> None:
    folder = scan(make_folder(tmp_path, {"a": 8, "b": 2, "c": 5}))
    few = few_shot(folder, shots, seed=3)
    assert torch.bincount(few.labels).tolist() == [min(shots, count) for count in (8, 2, 5)]
    assert few.files == few_shot(folder, shots, seed=3).files
    if shots == 3:
        assert few.files != few_shot(folder, shots, seed=4).files
    with pytest.raises(ValueError, match="--shots"):
        few_shot(folder, 0, seed=3)


def test_classes_with_fewer_images_than_shots_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = scan(make_folder(tmp_path, {"a": 4, "b": 2, "c": 3}))
    assert torch.bincount(few_shot(source, 3, seed=0).labels).tolist() == [3, 2, 3]
    assert "--shots 3: classes that have fewer images, and keep them all: 1, b" in capsys.readouterr().err
    few_shot(source, 2, seed=0)
    assert capsys.readouterr().err == ""


def test_class_subsets_are_labelled_in_the_order_asked_for(tmp_path: Path) -> None:
    folder = scan(make_folder(tmp_path, {"a": 2, "b": 1, "c": 3}))
    some = of_classes(folder, ["c", "a"])
    assert some.folders == ("c", "a")
    assert [some.folders[label] for label in some.labels.tolist()] == [name.split("/")[0] for name in some.files]
    with pytest.raises(ValueError, match="has no class d"):
        of_classes(folder, ["a", "d"])
    assert labelled_by(some, ("a", "b", "c")).labels.tolist() == [0, 0, 2, 2, 2]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder at"):
        scan(tmp_path / "missing")
    (tmp_path / "file.jpg").touch()
    with pytest.raises(ValueError, match=r"file\.jpg is a file: expected a folder of class folders"):
        scan(tmp_path / "file.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in class folders"):
        scan(tmp_path / "empty")
    write_image(tmp_path / "flat" / "a.jpg", 0)
    with pytest.raises(ValueError, match="outside class folders"):
        scan(tmp_path / "flat")
    make_folder(tmp_path / "single", {"a": 3, "b": 1})
    single = str(tmp_path / "single")
    with pytest.raises(ValueError, match=r"only one image in class b .*--val-share 0"):
        training_sources(single, DataSubset(val_share=0.1), seed=0)
    train, val = training_sources(single, DataSubset(val_share=0), seed=0)
    assert val is None
    assert len(train) == 4
    for wrong in ({"val_share": 1.0}, {"val_share": 0.1, "val_images": 3}):
        with pytest.raises(ValueError, match="--val-share"):
            DataSubset(**wrong)  # type: ignore[arg-type]


def test_an_empty_class_folder_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a": 2, "c": 1})
    (tmp_path / "b").mkdir()
    found = scan(tmp_path)
    assert found.folders == ("a", "c")
    assert found.labels.tolist() == [0, 0, 1]
    assert "class folders without images, left out: 1, b" in capsys.readouterr().err


def test_images_one_folder_deeper_and_other_formats_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a": 4, "b": 12, "a/images": 5})
    for i in range(5):
        write_image(tmp_path / "a" / f"{i}.tif", i)
        (tmp_path / "a" / f"{i}.jfif").write_bytes((tmp_path / "a" / "00.jpg").read_bytes())
        (tmp_path / "a" / f"x{i}.JPEG.jpg").write_bytes((tmp_path / "a" / "00.jpg").read_bytes())
        write_image(tmp_path / "a" / f"{i}.avif", i)
    found = scan(tmp_path)
    assert torch.bincount(found.labels).tolist() == [29, 12]
    for index in range(29):
        assert decode(found.read(index), Transform(size=16)).shape == (16, 16, 3), found.name(index)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "images in folders below a class folder (images), taken for that class: 5" in error


def test_what_is_ignored_is_one_line_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1, "a/x/y": 2})
    for name in (
        "a/1.heic",
        "a/2.HEIC",
        "b/notes.txt",
        "b/noext",
        "a/.DS_Store",
        "a/._00.jpg",
        "a/Thumbs.db",
        "__MACOSX/a/0.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    write_image(tmp_path / "loose.png", 1)
    assert len(scan(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (
        "ignored files and folders: 11, of which ", "2 .heic (a format that is not read; convert to .jpg or .png)",
        "1 .txt (such as",
        "1 without a suffix", "2 images more than one folder below a class", "1 images outside class folders", "2 hidden",
        "2 left by the system",
    ):  # fmt: skip
        assert part in error
    shutil.rmtree(tmp_path / "__MACOSX")
    make_folder(tmp_path / "litter", {"a": 1, "b": 1})
    (tmp_path / "litter" / "a" / "Thumbs.db").write_bytes(b"x")
    scan(tmp_path / "litter")
    assert "warning" not in (error := capsys.readouterr().err)
    assert "ignored files and folders: 1, of which 1 left by the system" in error


def test_folders_two_levels_below_are_no_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "sets", {"cows/a": 1, "cows/b": 1, "birds/c": 1})
    with pytest.raises(
        ValueError, match=r"one level below, as in .*birds/c/00.jpg: name the folder whose folders are the classes"
    ):
        scan(tmp_path / "sets")
    make_folder(tmp_path / "tiny", {"n1/images": 2, "n2/images": 1})
    assert scan(tmp_path / "tiny").labels.tolist() == [0, 0, 1]


def test_links_in_circles_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to("loop")
    (tmp_path / "b" / "loop.jpg").symlink_to("loop.jpg")
    found = scan(tmp_path)
    assert found.files == ("a/00.jpg", "b/00.jpg", "b/loop.jpg")
    with pytest.raises(OSError, match="symbolic links"):
        found.read(2)
    error = capsys.readouterr().err
    assert error.count("links to a folder that is read already") == 3
    assert "1 without a suffix" in error
    assert find_splits(str(tmp_path)) == {}


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a": 1, os.fsdecode(b"caf\xe9"): 2})
    found = scan(tmp_path)
    assert found.folders == ("a", r"caf\xe9")
    assert len(found.read(2)) > 0
    assert r"folder names escaped, as they are not UTF-8 or hold control characters: 1, caf\xe9" in capsys.readouterr().err


def test_odd_names_keep_their_labels(tmp_path: Path) -> None:
    names = ["a,b", "c\td", "dog ", " e"]
    make_folder(tmp_path / "train", dict.fromkeys(names, 2))
    make_folder(tmp_path / "val", {"a,b": 1, "c\td": 1, "dog": 1, "e": 1})
    train, val = training_sources(str(tmp_path), DataSubset(), seed=0)
    assert val is not None
    assert train.folders == tuple(sorted(names))
    assert [train.folders[label].strip() for label in val.labels.tolist()] == ["a,b", "c\td", "dog", "e"]
    assert of_classes(train, class_list('"a,b",dog')).folders == ("a,b", "dog ")
    make_folder(tmp_path / "val", {"DOG": 1})
    with pytest.raises(ValueError, match=r"did you mean 'dog ' for 'DOG'"):
        training_sources(str(tmp_path), DataSubset(), seed=0)

"""`cammask data check`: what it finds in a data set, its table, JSON and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cammask_fast.cli import main
from cammask_fast.data.check import check
from tests.test_folder import write_image
from tests.test_webdataset import jpeg, write_tar


def report(data: Path | str, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["data", "check", str(data), "--workers", "2", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Two classes with six different images each, and a validation split."""
    for number, split in enumerate(("train", "val")):
        for label, name in enumerate("ab"):
            for i in range(6):
                write_image(tmp_path / "data" / split / name / f"{i}.jpg", 100 * number + 10 * label + i)
    return tmp_path / "data"


def test_a_clean_set_has_no_problems(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(clean, capsys)
    assert (code, found["problems"]) == (0, [])
    assert found["classes"] == {"a": {"train": 6, "val": 6}, "b": {"train": 6, "val": 6}}
    split = found["splits"]["val"]
    assert (split["images"], split["classes"], split["unreadable"]) == (12, 2, 0)
    assert split["bytes"] == sum(path.stat().st_size for path in (clean / "val").rglob("*.jpg"))
    assert split["pixels"] == {"smallest": [40, 30], "median": [40, 30], "largest": [40, 30]}
    assert found["formats"] == {"JPEG RGB": 24}
    assert main(["data", "check", str(clean)]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("no problems\n")
    assert "formats: 24 JPEG RGB" in printed.out
    assert printed.err == ""


def test_every_kind_of_problem_is_found(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = clean / "train", clean / "val"
    shutil.copy(train / "a" / "0.jpg", val / "a" / "leak.jpg")
    shutil.copy(train / "a" / "1.jpg", train / "a" / "again.jpg")
    shutil.copy(train / "a" / "2.jpg", train / "b" / "other.jpg")
    (train / "b" / "5.jpg").write_bytes(b"no image")
    (train / "b" / "4.jpg").write_bytes((train / "b" / "3.jpg").read_bytes()[:-100])
    (train / "b" / "empty.jpg").touch()
    (train / "b" / "notes.txt").touch()
    write_image(train / "A_" / "0.jpg", 50)
    write_image(val / "new" / "0.jpg", 51)
    code, found = report(clean, capsys)
    assert code == 1
    assert {(Path(one["image"]).name, one["reason"].split(" (")[0]) for one in found["unreadable"]} == {
        ("5.jpg", "not an image in a known format"), ("4.jpg", "image file is truncated"), ("empty.jpg", "the file is empty"),
    }  # fmt: skip
    groups = [(group["splits"], group["classes"], len(group["images"])) for group in found["duplicates"]]
    assert groups == [(["train", "val"], ["a"], 2), (["train"], ["a"], 2), (["train"], ["a", "b"], 2)]
    assert found["nearly_empty"] == {"A_": 1}, "a class that nothing trains has a line of its own"
    assert found["clashes"] == [["A_", "a"]]
    assert found["unknown_classes"] == {"val": ["new"]}
    expected = [
        "unreadable images: 3 of 30", "images in more than one split, where what was learnt is tested, byte for byte: 1",
        "images with more than one class, byte for byte: 1", "images that are there more than once, byte for byte: 1",
        "classes with fewer than 5 images: 1, such as A_ with 1",
        "names of classes differ in case, underscores and spaces only: 'A_' and 'a'",
        "val has classes that the training images lack: 1, such as new", "ignored files and folders: 1, of which 1 .txt",
    ]  # fmt: skip
    assert len(found["problems"]) == len(expected)
    for problem, text in zip(found["problems"], expected, strict=True):
        assert text in problem
    assert main(["data", "check", str(clean)]) == 1
    printed = capsys.readouterr().out
    assert "problems: 8" in printed
    for text in expected:
        assert text in printed


def test_odd_images_are_remarks_and_with_strict_problems(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clean / "train" / "a"
    Image.new("RGBA", (40, 40), (1, 2, 3, 4)).save(folder / "x.png")
    Image.new("RGB", (40, 40), (9, 2, 3)).save(folder / "y.png", "JPEG")
    Image.new("RGB", (600, 33), (9, 2, 5)).save(folder / "long.png")
    Image.new("L", (40, 8), 7).save(folder / "small.png")
    frames = [Image.new("L", (40, 40), grey) for grey in (0, 255)]
    frames[0].save(folder / "z.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 40), (9, 7, 3)).save(folder / "turned.jpg", exif=exif)
    code, found = report(clean, capsys)
    assert code == 0
    kinds = {kind: [Path(one).name for one in of_kind["examples"]] for kind, of_kind in found["odd"].items()}
    assert kinds.pop("mode RGBA, converted to RGB") == ["x.png"]
    assert kinds.pop("JPEG files with another suffix") == ["y.png"]
    assert kinds.pop("more than 16 times as long as wide, cut to that") == ["long.png"]
    assert found["odd"]["a side below 32 pixels"]["count"] == 25
    assert kinds.pop("animations, of which the first frame is used") == ["z.gif"]
    assert kinds.pop("turned by EXIF") == ["turned.jpg"]
    assert kinds.keys() <= {"a side below 32 pixels", "mode P, converted to RGB"}
    code, found = report(clean, capsys, "--strict")
    assert code == 1
    assert "turned by EXIF: 1" in found["problems"]


def test_shards_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: dict[str, bytes] = {}
    for i in range(10):
        members |= {f"{i}.jpg": jpeg(i if i < 9 else 0), f"{i}.cls": b"%d" % (i % 2)}
    write_tar(tmp_path / "x-train-0.tar", members | {"lost.cls": b"0"})
    write_tar(tmp_path / "x-val-0.tar", {"v.jpg": jpeg(1), "v.cls": b"1", "w.jpg": jpeg(20), "w.cls": b"0"})
    code, found = report(tmp_path, capsys)
    assert code == 1
    assert {name: split["images"] for name, split in found["splits"].items()} == {"train": 10, "val": 2}
    assert found["unreadable"] == [{"split": "train", "image": f"{tmp_path}/x-train-0.tar/lost", "reason": "no image"}]
    groups = [(group["splits"], group["classes"]) for group in found["duplicates"]]
    assert groups == [(["train"], ["0", "1"]), (["train", "val"], ["1"])]


def test_what_cannot_be_read_at_all_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"no image")
    for data, message in (("missing", "no folder at"), ("", "none of its images can be read; the first: not an image")):
        assert main(["data", "check", str(tmp_path / data)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err.splitlines()[-1]
        assert printed.out == ""
    assert main(["data", "check", str(tmp_path), "--workers", "0"]) == 2


def test_a_split_without_classes_is_a_problem_of_that_split(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(clean / "test" / "0.jpg", 3)
    code, found = report(clean, capsys)
    assert code == 1
    assert list(found["splits_that_cannot_be_opened"]) == ["test"]
    assert "its images lie outside class folders" in found["problems"][0]


def test_progress_ends_with_all_images(clean: Path) -> None:
    calls: list[tuple[int, int]] = []
    check(str(clean), workers=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (24, 24)
    assert calls == sorted(calls)

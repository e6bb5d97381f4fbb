"""Keys, images and labels of shards as people write them, and indexes that are out of date or cannot be kept."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from cammask_fast.data.datasets.imagenet import wnids
from cammask_fast.data.datasets.shard_index import INDEX, index_of
from cammask_fast.data.datasets.webdataset import TarShards, open_shards, write_classes
from tests.test_webdataset import jpeg, write_tar


def opened(root: Path, members: dict[str, bytes]) -> TarShards:
    return open_shards(str(write_tar(root / "0.tar", members)))


def labelled(labels: list[bytes], kind: str = "cls") -> dict[str, bytes]:
    """A sample per label."""
    members: dict[str, bytes] = {}
    for number, label in enumerate(labels):
        members |= {f"{number}.jpg": jpeg(number), f"{number}.{kind}": label}
    return members


def classes_of(shards: TarShards) -> list[str]:
    return [shards.folders[label] for label in shards.labels.tolist()]


def test_the_key_ends_at_the_first_dot(tmp_path: Path) -> None:
    members = {
        "s0.input.jpg": jpeg(0), "s0.cls": b"1", "a/img.v2.jpg": jpeg(1), "a/img.cls": b"0", "b.v2.jpg": jpeg(2),
        "b.v2.cls": b"2", "c.JPEG.jpg": jpeg(3), "c.cls": b"0", "v1.0/d.jpg": jpeg(4), "v1.0/d.cls": b"1",
    }  # fmt: skip
    shards = opened(tmp_path, members)
    assert shards.keys == ("s0", "a/img", "b", "c", "v1.0/d")
    assert shards.labels.tolist() == [1, 0, 2, 0, 1]
    assert [shards.read(i) for i in range(5)] == [jpeg(i) for i in range(5)]
    assert shards.faults == ()


def test_samples_that_share_a_key_are_a_fault_that_names_the_dot(tmp_path: Path) -> None:
    members = {"img.v1.jpg": jpeg(0), "img.v1.cls": b"0", "img.v2.jpg": jpeg(1), "img.v2.cls": b"1"}
    shards = opened(tmp_path, members | labelled([b"0"]) | {"x.part.txt": b""})
    assert shards.keys == ("0",)
    (_, shared), (_, imageless) = shards.faults
    assert "several samples with one key: the key ends at the first dot" in shared
    assert "v1.jpg, v2.jpg" in shared
    assert "no image; the key ends at the first dot of a member's name, and these follow it: part.txt" in imageless


@pytest.mark.parametrize("order", [("jpg", "png"), ("png", "jpg"), ("mask.png", "jpg"), ("png", "input.jpg")])
def test_of_several_images_the_plain_jpeg_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], order: tuple[str, str]
) -> None:
    images = {kind: jpeg(number) for number, kind in enumerate(order)}
    shards = opened(tmp_path, {"s.cls": b"0"} | {f"s.{kind}": data for kind, data in images.items()})
    used = "png" if "input.jpg" in order else "jpg"
    (unused,) = set(order) - {used}
    assert shards.read(0) == images[used]
    assert f"samples with more than one image, of which .{used} is used and not .{unused}: 1" in capsys.readouterr().err


def test_ids_of_classes_are_mapped_and_never_counted_up_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = opened(tmp_path / "wnids", labelled([b"0", b"1440764"] * 2))
    assert shards.folders == ("0", "1440764")
    assert shards.labels.tolist() == [0, 1, 0, 1]
    assert (
        "the labels, 0 to 1440764, are ids and no indices into a list: the classes are the 2 that occur, 0, 1440764"
        in capsys.readouterr().err
    )
    two = wnids()[0], wnids()[5]
    shards = opened(tmp_path / "ids", labelled([str(int(wnid[1:])).encode() for wnid in two]))
    assert shards.folders == two == tuple(classes_of(shards))
    few = opened(tmp_path / "few", labelled([b"0", b"9"]))
    assert (len(few.folders), classes_of(few)) == (10, ["0", "9"])
    assert "classes without images there: 8 of 10" in capsys.readouterr().err


def test_labels_as_text(tmp_path: Path) -> None:
    shards = opened(tmp_path / "cls", labelled([b"red fox\n", "\ufeffdog".encode(), b"red fox"]))
    assert shards.folders == ("dog", "red fox")
    assert classes_of(shards) == ["red fox", "dog", "red fox"]
    texts = [json.dumps(value).encode() for value in ({"label": "dog"}, {"cls": "1"}, {"label": "0"})]
    mixed = opened(tmp_path / "json", labelled(texts, "json"))
    assert mixed.labels.tolist() == [1, 0], "numbers as strings are numbers"
    assert "no label: expected .cls with a number or a class's name" in mixed.faults[0][1]
    write_classes(tmp_path / "json", ["owl", "dog"])
    assert classes_of(open_shards(str(tmp_path / "json"))) == ["dog", "dog", "owl"]
    write_classes(tmp_path / "json", ["owl", "cat"])
    fewer = open_shards(str(tmp_path / "json"))
    assert classes_of(fewer) == ["cat", "owl"]
    assert "label dog, and " in fewer.faults[0][1]


def test_whole_floats_are_numbers_and_what_is_no_label_is_quoted(tmp_path: Path) -> None:
    values = (1.0, 0.0, 0.5, -1, True, None, float("inf"))
    shards = opened(tmp_path, labelled([json.dumps({"label": value}).encode() for value in values], "json"))
    assert dict(zip(shards.keys, shards.labels.tolist(), strict=True)) == {"0": 1, "1": 0, "4": 1}
    assert [reason.partition("; ")[2] for _, reason in shards.faults] == [
        f".json holds '{{\"label\": {text}}}'" for text in ("0.5", "-1", "null", "Infinity")
    ]


def test_two_labels_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = labelled([b"0", b"1", b"1"])
    members |= {"0.json": b'{"label": 1}', "1.json": b'{"label": 1}', "2.json": b'{"caption": "a dog"}'}
    assert opened(tmp_path, members).labels.tolist() == [0, 1, 1]
    said = capsys.readouterr().err
    assert "samples whose labels differ, of which .cls is used and not .json: 1" in said
    assert said.count("\n") == 1


def test_a_path_may_begin_with_a_dot(tmp_path: Path) -> None:
    assert opened(tmp_path, {"./x/a.jpg": jpeg(0), "x/a.cls": b"0"}).keys == ("x/a",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(gzip.compress(b"tar"), "no tar: compressed by gzip"), (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")],
    ids=["gzip", "lfs"],
)
def test_what_is_no_tar_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        open_shards(str(tmp_path / "0.tar"))


def test_labels_that_start_at_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", labelled([b"1", b"2"]))
    write_classes(tmp_path, ["owl", "dog"])
    with pytest.raises(ValueError, match=r"the labels are 1 to 2, and .*classes.txt has 2 classes: labels start at 0"):
        open_shards(str(tmp_path))


def test_hidden_and_repeated_members_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"._0.jpg": b"x", "__MACOSX/0.jpg": b"x", "0.JPG": jpeg(9)} | labelled([b"0"])
    assert opened(tmp_path, members).read(0) == jpeg(0)
    error = capsys.readouterr().err
    assert "cammask: " + str(tmp_path / "0.tar: ignored hidden members: 2") in error
    assert "warning: " + str(tmp_path / "0.tar: members that replace an earlier one of the same name: 1") in error


def test_an_index_of_another_shard_of_the_same_size_and_time_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(1), "a.cls": b"0"})
    before = shard.stat()
    assert not index_of(shard).stale
    write_tar(shard, {"b.jpg": jpeg(1), "b.cls": b"1"})
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size
    assert open_shards(str(shard)).keys == ("b",)
    assert "indexes made again, as they were of another state of their shards: 1 of 1" in capsys.readouterr().err
    assert open_shards(str(shard)).keys == ("b",)
    assert "another state" not in capsys.readouterr().err


def test_clocks_that_disagree_do_no_harm(tmp_path: Path) -> None:
    """An index belongs to a shard by equality of times, whichever is later."""
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(1), "a.cls": b"0"})
    for moment in (time.time() + 1e6, time.time() - 1e8, 0):
        os.utime(shard, (moment, moment))
        assert index_of(shard).samples[0][0] == "a"
        kept = shard.with_name(shard.name + INDEX)
        kept.write_text(kept.read_text().replace('"a"', '"from the file"'))
        assert index_of(shard).samples[0][0] == "from the file"


def test_an_index_that_cannot_be_kept_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", labelled([b"0"]))
        (tmp_path / f"{number}.tar{INDEX}" / "in the way").mkdir(parents=True)
    assert len(open_shards(str(tmp_path))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "indexes that cannot be kept (" in error
    assert "): 2; these shards are read through at every start" in error
    assert not list(tmp_path.glob("*.part"))

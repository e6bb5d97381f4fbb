"""Tar shards: indexing, patterns, damage, and packing a folder into them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from cammask_fast.cli import main
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.datasets.shard_index import INDEX, index_of
from cammask_fast.data.datasets.webdataset import expand_braces, open_shards, shard_paths, write_classes
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.pack import pack
from tests.test_folder import make_folder, write_image


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (seed * 37 % 256, seed * 91 % 256, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def no_bad(folder: Path, total: int = 100) -> UnreadableSamples:
    return UnreadableSamples("test", total, report=folder / "bad.tsv")


def test_braces() -> None:
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    for wrong in ("a-{0..1.tar", "a-{3..1}.tar"):
        with pytest.raises(ValueError, match="expected"):
            expand_braces(wrong)


def test_samples_are_found_by_key_wherever_their_members_lie(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {
        "x/001.jpg": jpeg(1), "x/001.cls": b"2", "x/002.json": json.dumps({"label": 0}).encode(), "readme": b"text",
        "x/003.cls": b" 1\n", "x/002.JPEG": jpeg(2), "x/003.jpg": jpeg(3), "y/001.png": jpeg(4), "y/001.json": b'{"cls": 1}',
    })  # fmt: skip
    shards = open_shards(str(tmp_path / "0.tar"))
    assert shards.keys == ("x/001", "x/002", "x/003", "y/001")
    assert shards.labels.tolist() == [2, 0, 1, 1]
    assert [shards.read(i) for i in range(4)] == [jpeg(1), jpeg(2), jpeg(3), jpeg(4)]
    assert shards.folders == ("0", "1", "2")
    assert [index for index, _ in shards.faults] == [f"{tmp_path / '0.tar'}/readme"]
    write_classes(tmp_path, ["ant", "bee", "cow"])
    assert open_shards(str(tmp_path)).folders == ("ant", "bee", "cow")
    write_classes(tmp_path, ["ant", "bee"])
    fewer = open_shards(str(tmp_path))
    assert len(fewer) == 3
    assert any("label 2" in reason and "2 classes" in reason for _, reason in fewer.faults)


@pytest.mark.parametrize(
    "label", [{}, {"cls": b""}, {"cls": b"cow"}, {"cls": b"-1"}, {"json": b"{"}, {"json": b"[1]"}, {"json": b'{"label": 1.5}'},
              {"json": b'{"label": null}'}, {"cls": b"\xff"}, {"cls": b"99999999999999999999"}],
    ids=str,
)  # fmt: skip
def test_a_sample_without_a_label_is_a_fault(tmp_path: Path, label: dict[str, bytes]) -> None:
    members = {"good.jpg": jpeg(0), "good.cls": b"0", "bad.jpg": jpeg(1)}
    members |= {f"bad.{name}": data for name, data in label.items()}
    shards = open_shards(str(write_tar(tmp_path / "0.tar", members)))
    assert shards.keys == ("good",)
    assert len(shards.faults) == 1
    assert "no label" in shards.faults[0][1]


def test_lists_patterns_and_missing_shards(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"s-{i}.tar", {f"{i}.jpg": jpeg(i), f"{i}.cls": b"0"})
    paths = [tmp_path / f"s-{i}.tar" for i in range(3)]
    (tmp_path / "list.txt").write_text("s-2.tar\ns-{0..1}.tar\n")
    assert shard_paths(str(tmp_path)) == shard_paths(str(tmp_path / "s-{0..2}.tar")) == paths
    assert shard_paths(str(tmp_path / "list.txt")) == [paths[2], paths[0], paths[1]]
    with pytest.raises(ValueError, match=r"1 of 4 shards are missing, the first is .*s-3.tar"):
        open_shards(str(tmp_path / "s-{0..3}.tar"))
    with pytest.raises(ValueError, match=r"no samples in .*expected members"):
        open_shards(str(write_tar(tmp_path / "none.tar", {"a.txt": b"x"})))


def test_the_index_is_kept_until_the_shard_changes(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(1), "a.cls": b"0"})
    first = index_of(shard)
    kept = shard.with_name(shard.name + INDEX)
    poisoned = json.loads(kept.read_text())
    poisoned["samples"][0][0] = "from the file"
    kept.write_text(json.dumps(poisoned))
    assert index_of(shard).samples[0][0] == "from the file", "not read again"
    write_tar(shard, {"b.jpg": jpeg(1), "b.cls": b"0", "c.jpg": jpeg(2), "c.cls": b"0"})
    assert [sample[0] for sample in index_of(shard).samples] == ["b", "c"]
    for damaged in ("", "{", "[]", json.dumps({"format": 1})):
        kept.write_text(damaged)
        assert [sample[0] for sample in index_of(shard).samples] == ["b", "c"]
    assert first.samples[0][0] == "a"


def test_a_cut_shard_keeps_its_whole_samples_and_says_so(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(6):
        members |= {f"{i}.cls": b"0", f"{i}.jpg": jpeg(i)}
    shard = write_tar(tmp_path / "0.tar", members)
    whole = shard.read_bytes()
    for length in (3000, 4096, 5120, 5632, 6000):  # in a file, at its end, behind a header, anywhere
        shard.write_bytes(whole[:length])
        shards = open_shards(str(shard))
        assert 0 < len(shards) < 6
        assert [shards.read(i) for i in range(len(shards))] == [jpeg(int(key)) for key in shards.keys]
        assert any("cut off or damaged after" in reason for _, reason in shards.faults)


def test_a_shard_cut_after_it_was_indexed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", {"a.cls": b"0", "a.jpg": jpeg(1)})
    shards = open_shards(str(shard))
    shard.write_bytes(shard.read_bytes()[:1600])
    with pytest.raises(EOFError, match="cut off"):
        shards.read(0)


def test_packing_keeps_bytes_labels_and_classes(tmp_path: Path) -> None:
    folder = scan(make_folder(tmp_path / "images", {"a b": 4, "c": 7}))
    shards = pack(folder, tmp_path / "out", per_shard=4, bad=no_bad(tmp_path))
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    packed = open_shards(str(tmp_path / "out"))
    assert packed.folders == folder.folders
    index = [int(key) for key in packed.keys]
    assert sorted(index) == list(range(11))
    assert index != sorted(index), "shuffled"
    assert packed.labels.tolist() == folder.labels[torch.tensor(index)].tolist()
    assert [packed.read(i) for i in range(11)] == [folder.read(i) for i in index]


def test_packing_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scan(make_folder(tmp_path / "images", {"a": 10}))
    expected = [shard.read_bytes() for shard in pack(folder, tmp_path / "whole", per_shard=3, bad=no_bad(tmp_path))]
    out, synced = tmp_path / "out", os.fsync
    done: list[int] = []

    def interrupted(descriptor: int) -> None:
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        done.append(descriptor)
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(ValueError, match=r"No space left on device; what is there stays; run the command again"):
        pack(folder, out, per_shard=3, bad=no_bad(tmp_path))
    assert sorted(path.name for path in out.glob("*.tar")) == ["000000.tar", "000001.tar"], "no half shard under its name"
    monkeypatch.undo()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    shards = pack(folder, out, per_shard=3, bad=no_bad(tmp_path))
    assert [shard.read_bytes() for shard in shards] == expected
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items()), "finished shards are kept"
    for other in ({"per_shard": 4}, {"per_shard": 3, "resize": 8}, {"per_shard": 3, "seed": 1}):
        with pytest.raises(ValueError, match="other settings or from other images"):
            pack(folder, out, bad=no_bad(tmp_path), **other)  # type: ignore[arg-type]
    write_tar(tmp_path / "foreign" / "0.tar", {})
    with pytest.raises(ValueError, match="not packed here"):
        pack(folder, tmp_path / "foreign", bad=no_bad(tmp_path))


def test_resizing_shrinks_once_and_leaves_bad_images_out(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a" / "large.png", 1, (90, 60))
    write_image(tmp_path / "images" / "a" / "small.jpg", 2, (12, 20))
    (tmp_path / "images" / "a" / "bad.jpg").write_bytes(b"no image")
    bad = UnreadableSamples("test", 3, max_share=0.5, report=tmp_path / "bad.tsv")
    pack(scan(tmp_path / "images"), tmp_path / "out", resize=24, quality=80, bad=bad)
    packed = open_shards(str(tmp_path / "out"))
    sizes = {key: Image.open(io.BytesIO(packed.read(i))).size for i, key in enumerate(packed.keys)}
    assert sorted(sizes.values()) == [(12, 20), (36, 24)], "never enlarged"
    assert "bad.jpg\tnot an image" in (tmp_path / "bad.tsv").read_text()


def test_the_command_packs_splits_and_training_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "images" / "train", {"dog": 6, "red_fox": 6})
    make_folder(tmp_path / "images" / "val", {"dog": 2, "red_fox": 2})
    out = str(tmp_path / "shards")
    assert main(["data", "pack", str(tmp_path / "images"), out, "--per-shard", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"12 images in 3 shards written to {out}/train" in printed
    assert f"4 images in 1 shards written to {out}/val" in printed
    quick = ["--method", "ft", "--epochs", "1", "--batch-size", "4"]
    accuracies = []
    for data, run in ((out, "from-shards"), (str(tmp_path / "images"), "from-folders")):
        assert main(["train", "--data", data, "--out", str(tmp_path / run), *quick]) == 0
        found = json.loads((tmp_path / run / "run.json").read_text())
        assert found["class_names"] == ["dog", "red fox"]
        capsys.readouterr()
        checkpoint = ["--checkpoint", str(tmp_path / run / "best.safetensors")]
        assert main(["evaluate", *checkpoint, "--data", f"{out}/val", str(tmp_path / "images"), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["sets"]
        assert rows[0]["accuracy"] == rows[1]["accuracy"], "the same images, from shards and from the folder"
        accuracies.append(rows[0]["accuracy"])
    assert main(["data", "preview", "--data", out, "--out", str(tmp_path / "sheet.png")]) == 0

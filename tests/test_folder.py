"""Image folders: scanning, splits, class names, decoding, loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from cammask_fast.data.folder import (
    FolderLoader,
    decode,
    evaluation_folder,
    hold_out,
    read_class_names,
    scan,
    training_folders,
)


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A smooth random image of (width, height) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def make_folder(root: Path, counts: dict[str, int], suffix: str = ".jpg") -> Path:
    for place, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i:02}{suffix}", seed=100 * place + i)
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
    assert [path.name for path in found.paths] == ["00.jpg", "big.JPEG", "zz.jpg", "00.jpg", "01.jpg"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1]


def test_train_and_val_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 3, "b": 2, "c": 2})
    make_folder(tmp_path / "val", {"b": 1, "c": 2})
    train, val = training_folders(tmp_path, val_share=0.1, seed=0)
    assert val is not None
    assert len(train) == 7
    assert val.labels.tolist() == [1, 2, 2]
    assert evaluation_folder(tmp_path).root.name == "val"
    make_folder(tmp_path / "val", {"d": 1})
    with pytest.raises(ValueError, match="d; known: a, b, c"):
        training_folders(tmp_path, val_share=0.1, seed=0)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.99])
def test_the_split_is_stratified_and_follows_the_seed(tmp_path: Path, share: float) -> None:
    folder = scan(make_folder(tmp_path, {"a": 8, "b": 2, "c": 5}))
    train, val = hold_out(folder, share=share, seed=3)
    assert set(train.paths).isdisjoint(val.paths)
    assert set(train.paths) | set(val.paths) == set(folder.paths)
    assert train.labels.unique().tolist() == val.labels.unique().tolist() == [0, 1, 2]
    assert (val.labels == 0).sum() == min(max(1, round(share * 8)), 7)
    assert hold_out(folder, share=share, seed=3)[1].paths == val.paths
    if share == 0.25:
        assert hold_out(folder, share=share, seed=4)[1].paths != val.paths


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


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50), (333, 77)])
def test_decode_resizes_and_crops_as_torchvision(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_image(tmp_path / "image.png", 1, size)
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    decoded = decode(path, 32)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, torch.from_numpy(np.array(transform(Image.open(path).convert("RGB")))))


def test_decode_turns_by_exif_and_converts_to_rgb(tmp_path: Path) -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[:24] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the top comes to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", 48)
    assert turned[:, 30:].min() == 255
    assert turned[:, :18].max() == 0
    for mode in ("L", "P", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.fromarray(pixels).convert(mode).save(path)
        assert decode(path, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_shuffles_by_epoch_and_drops_the_last_batch(tmp_path: Path, workers: int) -> None:
    folder = scan(make_folder(tmp_path, {"a": 5, "b": 6}))
    loader = FolderLoader(folder, image_size=16, batch_size=4, shuffle=True, seed=1, workers=workers)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        epochs.append(torch.cat([batch.sample_ids for batch in batches]).tolist())
    assert epochs[0] == epochs[2] != epochs[1]
    first = batches[0]
    assert first.images.shape == (4, 16, 16, 3)
    assert first.images.dtype == torch.uint8
    assert first.labels.tolist() == folder.labels[first.sample_ids].tolist()
    assert torch.equal(first.images[0], decode(folder.paths[int(first.sample_ids[0])], 16))
    in_order = FolderLoader(folder, image_size=16, batch_size=4, workers=workers)
    assert torch.cat([batch.sample_ids for batch in in_order]).tolist() == list(range(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    make_folder(tmp_path, {"a": 2, "b": 2})
    whole = (tmp_path / "b" / "00.jpg").read_bytes()
    (tmp_path / "b" / "00.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*b/00\.jpg") as caught:
        list(FolderLoader(scan(tmp_path), image_size=16, batch_size=2, workers=workers))
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder at"):
        scan(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in class folders"):
        scan(tmp_path / "empty")
    write_image(tmp_path / "flat" / "a.jpg", 0)
    with pytest.raises(ValueError, match="outside class folders"):
        scan(tmp_path / "flat")
    make_folder(tmp_path / "hole", {"a": 1})
    (tmp_path / "hole" / "b").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*b"):
        scan(tmp_path / "hole")
    make_folder(tmp_path / "single", {"a": 3, "b": 1})
    with pytest.raises(ValueError, match=r"only one image in class b .*--val-share 0"):
        training_folders(tmp_path / "single", val_share=0.1, seed=0)
    train, val = training_folders(tmp_path / "single", val_share=0, seed=0)
    assert val is None
    with pytest.raises(ValueError, match="batch size 5 is larger than the 4"):
        FolderLoader(train, image_size=16, batch_size=5, shuffle=True)
    with pytest.raises(ValueError, match="--val-share"):
        training_folders(tmp_path / "single", val_share=1.0, seed=0)

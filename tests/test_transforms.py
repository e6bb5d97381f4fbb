"""Decoding with PIL: torchvision's geometry, odd files, augmentations that depend on (seed, epoch, sample) alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from cammask_fast.data.transforms import (
    Augment,
    AugmentParams,
    Transform,
    centre_window,
    decode,
    placed,
    random_window,
    to_pixels,
)
from tests.test_folder import write_image

SIZE = 32
Pixels = NDArray[np.uint8]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, size: int = SIZE) -> Pixels:
    return decode(data, Transform(size=size)).numpy()


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50), (333, 77), (7, 9)])
def test_decode_resizes_and_crops_as_torchvision(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_image(tmp_path / "image.png", 1, size)
    transform = Compose([Resize(SIZE, InterpolationMode.BICUBIC), CenterCrop(SIZE)])
    decoded, image = decode(path.read_bytes(), Transform(size=SIZE)), Image.open(path).convert("RGB")
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, transform(to_pixels(image).permute(2, 0, 1)).permute(1, 2, 0)), "on tensors"
    by_pil = np.abs(decoded.numpy().astype(int) - np.array(transform(image)))
    assert by_pil.max() <= 2
    assert by_pil.mean() <= 0.05


def test_turned_by_exif() -> None:
    dark_below = np.zeros((48, 48, 3), np.uint8)
    dark_below[:24] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the top comes to the right
    turned = pixels(encoded(Image.fromarray(dark_below), exif=exif), 48)
    assert turned[:, 30:].min() == 255
    assert turned[:, :18].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_shows_the_same_grey(mode: str) -> None:
    """16-bit images in particular: PIL's own conversion clips them to white."""
    grey = np.full((40, 40), 128, np.uint8)
    if mode == "I;16":
        data = encoded(Image.fromarray(grey.astype(np.uint16) * 257))
    else:
        converted = Image.fromarray(np.stack([grey] * 3, 2)).convert(mode)
        data = encoded(converted, "JPEG" if mode == "CMYK" else "PNG")
    tolerance = {"1": 130, "P": 32}.get(mode, 3)  # dithered to black and white, or to a palette
    assert np.abs(pixels(data).astype(int) - 128).max() <= tolerance


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "BMP", "JPEG"])
def test_formats_are_told_by_content(tmp_path: Path, kind: str) -> None:
    image = Image.open(write_image(tmp_path / "image.png", 3))
    difference = pixels(encoded(image.convert("RGB"), kind)).astype(int) - pixels(encoded(image))
    assert np.abs(difference).mean() < (10 if kind == "GIF" else 6), "a GIF has 256 colours"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 20), (20, 20_000)])
def test_extreme_shapes(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    assert (pixels(encoded(image)) == (10, 200, 30)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"hello", "known format"), (encoded(Image.new("RGB", (64, 64)))[:60], ""), (b"\xff\xd8\xff" * 9, "")],
    ids=["empty", "text", "cut", "markers"],
)
def test_damage_is_a_reason_in_words(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        pixels(data)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_border_is_cut_off() -> None:
    framed = np.zeros((44, 64, 3), np.uint8)
    framed[..., 0] = 255
    framed[2:-2, 2:-2] = (0, 0, 255)
    data = encoded(Image.fromarray(framed))
    assert (decode(data, Transform(size=SIZE, border=2)).numpy() == (0, 0, 255)).all()
    assert not (pixels(data) == (0, 0, 255)).all()
    with pytest.raises(ValueError, match="border"):
        decode(encoded(Image.new("RGB", (4, 4))), Transform(size=SIZE, border=2))


def test_augmentations_follow_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    data = write_image(tmp_path / "image.png", 5, (90, 60)).read_bytes()
    augment = Augment.parse(["random-crop", "flip", "color-jitter", "rand-augment"])

    def one(seed: int, epoch: int, sample_id: int) -> Pixels:
        return decode(data, Transform(size=SIZE, augment=augment, seed=seed), epoch=epoch, sample_id=sample_id).numpy()

    np.testing.assert_array_equal(one(1, 2, 3), one(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(one(1, 2, 3), one(*other))


def test_a_flip_is_a_mirror_of_half_of_the_images(tmp_path: Path) -> None:
    data = write_image(tmp_path / "image.png", 5, (60, 60)).read_bytes()
    plain, transform = pixels(data), Transform(size=SIZE, augment=Augment(flip=True))
    shown = [decode(data, transform, sample_id=index).numpy() for index in range(64)]
    mirrored = [np.array_equal(image, plain[:, ::-1]) for image in shown]
    assert all(turned or np.array_equal(image, plain) for turned, image in zip(mirrored, shown, strict=True))
    assert 16 < sum(mirrored) < 48


def test_random_windows_keep_area_and_aspect() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        window = random_window(100, 60, 0.25, random)
        if window is not None:
            left, top, right, bottom = window
            assert 0 <= left < right <= 100
            assert 0 <= top < bottom <= 60
            assert 0.24 <= (right - left) * (bottom - top) / 6000 <= 1
            assert 0.7 <= (right - left) / (bottom - top) <= 1.4
    assert random_window(1000, 2, 1.0, random) is None, "no window of the whole area has such an aspect"


def test_the_centre_window_is_what_the_centre_crop_shows(tmp_path: Path) -> None:
    image = Image.open(write_image(tmp_path / "image.png", 1, (93, 61))).convert("RGB")
    window = centre_window(*image.size, SIZE)
    by_window = np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=window)).astype(int)
    by_crop = placed(to_pixels(image), AugmentParams(window, centred=True), SIZE).numpy()
    assert np.abs(by_window - by_crop)[:, 2:-2].max() <= 2, "the outermost columns see no pixels beyond the window"


@pytest.mark.parametrize(
    "words", [["random-crop=2"], ["flip=1"], ["rand-augment=2"], ["rand-augment=2,31"], ["color-jitter=x"]]
)
def test_bad_augmentations(words: list[str]) -> None:
    with pytest.raises(ValueError, match="augment"):
        Augment.parse(words)

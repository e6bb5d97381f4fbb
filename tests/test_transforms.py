"""Decoding with PIL: torchvision's geometry, odd files, augmentations that depend on (seed, epoch, sample) alone."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, functional

from cammask_fast.data.augment import Augment
from cammask_fast.data.transforms import (
    AugmentParams,
    Transform,
    _resize,
    centre_window,
    decode,
    encoded_simply,
    opened,
    orientation,
    placed,
    random_window,
    to_pixels,
    to_rgb,
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


JUNK = [
    b"Exif\0\0garbage!",
    b"Exif\0\0",
    b"Exif\0\0II*\0\xff\xff\xff\xff",  # a directory beyond the end
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9,
    b"no EXIF",
]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", JUNK)
def test_damaged_exif_does_not_matter(tmp_path: Path, kind: str, block: bytes) -> None:
    image = Image.open(write_image(tmp_path / "image.png", 2, (61, 40)))
    clean = pixels(encoded(image, kind, lossless=True))
    for resolution in ({}, {"dpi": (72, 72)}):
        np.testing.assert_array_equal(pixels(encoded(image, kind, exif=block, lossless=True, **resolution)), clean)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(10))
def test_turned_by_exif_in_every_format(tmp_path: Path, kind: str, turn: int) -> None:
    """As PIL's own function turns them; 0 and 9 have no meaning."""
    image = Image.open(write_image(tmp_path / "image.png", 2, (61, 40)))
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(image, kind, exif=exif, lossless=True)
    assert orientation(opened(data)) == (turn if 1 <= turn <= 8 else 1)
    np.testing.assert_array_equal(
        np.asarray(to_rgb(opened(data))), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    )


def test_exif_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.open(write_image(tmp_path / "image.png", 2, (61, 40))), exif=exif)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    moved = data[:start] + data[start + len(chunk) : end] + chunk + data[end:]
    assert to_rgb(opened(moved)).size == (40, 61)
    with pytest.raises(ValueError, match=r"."):
        to_rgb(opened(data[: len(data) // 2]))


def test_cmyk_with_adobes_marker_and_rgb_without_a_conversion(tmp_path: Path) -> None:
    image = Image.open(write_image(tmp_path / "image.png", 2, (64, 64))).convert("RGB")
    inks = Image.merge("CMYK", [*(ImageOps.invert(band) for band in image.split()), Image.new("L", image.size)])
    for data in (encoded(inks, "JPEG", quality=98), encoded(image, "JPEG", quality=98, keep_rgb=True)):
        assert b"Adobe" in data
        assert not encoded_simply(opened(data))
        assert np.abs(np.asarray(to_rgb(opened(data))).astype(int) - np.asarray(image)).mean() < 1
    marker = data.index(b"\xff\xee")
    unmarked = data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :]
    assert b"Adobe" not in unmarked
    assert not encoded_simply(opened(unmarked)), "by the names of its components"
    assert encoded_simply(opened(encoded(image, "JPEG")))
    assert encoded_simply(opened(encoded(image.convert("L"), "JPEG")))
    assert not encoded_simply(opened(encoded(image, "PNG")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((200, 10, 10), (10, 200, 10), (10, 10, 200))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.abs(pixels(data).astype(int) - (200, 10, 10)).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animations_are_told_and_pages_are_not(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ((200, 10, 10), (10, 200, 10))]
    said: list[str] = []
    decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), Transform(size=SIZE), note=said.append)
    assert said == ([] if kind in ("TIFF", "MPO") else ["an animation, of which the first frame is used"])
    decode(encoded(frames[0], "JPEG" if kind == "MPO" else kind), Transform(size=SIZE), note=said.append)
    assert len(said) <= 1


def test_a_cut_of_a_very_long_image_is_told() -> None:
    said: list[str] = []
    for length in (16 * 20, 16 * 20 + 1):
        decode(encoded(Image.new("RGB", (length, 20))), Transform(size=SIZE), note=said.append)
    assert said == ["more than 16 times as long as wide, cut to that about its centre"]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_a_palette_with_transparency(recwarn: pytest.WarningsRecorder, transparency: int | bytes) -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 250, 120, 30, 9, 9, 9])
    assert (pixels(encoded(image, transparency=transparency)) == (250, 120, 30)).all(), "the colour behind it"
    assert not [warning for warning in recwarn if "alette" in str(warning.message)]


def deep_png(values: NDArray[np.uint16], *, kind: int, significant: int | None = None) -> bytes:
    """A PNG of 16 bits. values: (H, W, channels); kind: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    told = b"" if significant is None else chunk(b"sBIT", bytes([significant] * channels))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + told + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize(
    ("highest", "significant", "bits"),
    [
        (4095, None, 12), (4000, None, 12), (1023, None, 10), (16383, None, 14), (255, None, 8), (65535, None, 16),
        (16384, None, 16), (900, 12, 12), (4095, 12, 12), (65520, 12, 16), (5000, 12, 14), (900, 16, 16), (0, None, 8),
    ],
)  # fmt: skip
def test_sixteen_bits_that_use_fewer(kind: int, channels: int, highest: int, significant: int | None, bits: int) -> None:
    """By what the file says, unless its values are larger, as where they fill the upper bits; else by what it holds."""
    values = np.random.default_rng(0).integers(0, highest + 1, (24, 24, channels)).astype(np.uint16)
    values[0, 0] = highest
    if channels in (2, 4):
        values[..., -1] = 65535  # alpha does not count
    notes: list[str] = []
    shown = np.asarray(to_rgb(opened(deep_png(values, kind=kind, significant=significant)), note=notes.append))
    colours = values[..., :1].repeat(3, 2) if channels < 3 else values[..., :3]
    np.testing.assert_array_equal(shown, colours >> (bits - 8))
    assert len(notes) == (bits < 16 and highest > 0)
    assert all(f"of {bits} bits ({'its sBIT' if bits == significant else 'no value'}" in note for note in notes)


def test_a_deep_png_that_is_cut_off_is_unreadable() -> None:
    data = deep_png(np.random.default_rng(0).integers(0, 4096, (64, 64, 3)).astype(np.uint16), kind=2)
    with pytest.raises(ValueError, match=r"."):
        pixels(data[: len(data) // 2])


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
    [
        (b"", "empty"),
        (b"hello", "known format"),
        (encoded(Image.new("RGB", (64, 64)))[:60], ""),
        (b"\xff\xd8\xff" * 9, ""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "^a Git LFS pointer .* `git lfs pull`$"),
        (b"\n<!DOCTYPE html><html>404", "^a page of HTML or XML"),
        (b"<?xml?><svg/>", "^an SVG drawing, and no image$"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "^a HEIC image, which is not read: convert it"),
        (b"\x1f\x8b\x08" + bytes(99), "^compressed by gzip"),
        (b"PK\x03\x04" + bytes(99), "^a zip archive"),
    ],
    ids=["empty", "text", "cut", "markers", "lfs", "html", "svg", "heic", "gzip", "zip"],
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


@pytest.mark.parametrize(
    ("height", "width", "to"), [(300, 200, (48, 70)), (37, 91, (224, 224)), (64, 64, (64, 64)), (1, 5, (48, 48))]
)
def test_pixels_are_resized_as_torchvision_does(height: int, width: int, to: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    for image in (pixels, pixels[:, : -(-height // 2), width // 3 :]):
        theirs = functional.resize(image, list(to), interpolation=InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(_resize(image, *to), theirs)

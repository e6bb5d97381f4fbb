"""A whole data set read once: what is damaged, odd, doubled, leaking, nearly empty or misnamed."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

from cammask_fast.data.class_names import twins
from cammask_fast.data.files import SUFFIXES
from cammask_fast.data.layout import find_splits, open_source
from cammask_fast.data.loaders.reading import read_sample
from cammask_fast.data.loaders.torch_loader import UNREADABLE, error_reason
from cammask_fast.data.summary import NEARLY_EMPTY
from cammask_fast.data.transforms import LONGEST, opened, to_rgb
from cammask_fast.data.types import ImageSource

CHUNK = 32
"""Images that a thread reads at a time."""
SMALL = 32
"""Images with a side below so many pixels are pointed out."""
ORIENTATION = 0x0112  # EXIF tag
SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",),
    "GIF": (".gif",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm"), "AVIF": (".avif",),
}  # fmt: skip

Progress = Callable[[int, int], None]
"""Called with the images done and in total."""


class Seen(NamedTuple):
    """What is known of an image. digest: of its bytes. size: in bytes. pixels: width and height. odd: what is unusual. reason:
    why it cannot be read, or empty."""

    digest: bytes = b""
    size: int = 0
    form: str = ""
    pixels: tuple[int, int] = (0, 0)
    odd: tuple[str, ...] = ()
    reason: str = ""


def look_at(source: ImageSource, index: int) -> Seen:
    """Read and decode one image."""
    digest, size = b"", 0
    try:
        data = read_sample(source, index)
        digest, size = hashlib.blake2b(data, digest_size=16).digest(), len(data)
        image = opened(data)
        form, pixels, odd = f"{image.format} {image.mode}", image.size, tuple(_odd(image, source.name(index)))
        to_rgb(image, note=lambda _: None)
    except UNREADABLE as error:
        return Seen(digest=digest, size=size, reason=error_reason(error))
    return Seen(digest, size, form, pixels, odd)


def _odd(image: Any, name: str) -> Iterator[str]:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES and suffix not in SUFFIXES_OF.get(image.format, SUFFIXES):
        yield f"{image.format} files with another suffix"
    if image.mode not in ("RGB", "L"):
        yield f"mode {image.mode}, converted to RGB"
    if getattr(image, "is_animated", False) and image.format != "MPO":
        yield "animations, of which the first frame is used"
    if min(image.size) < SMALL:
        yield f"a side below {SMALL} pixels"
    if max(image.size) > LONGEST * min(image.size):
        yield f"more than {LONGEST} times as long as wide, cut to that"
    try:
        if image.getexif().get(ORIENTATION, 1) != 1:
            yield "turned by EXIF"
    except Exception:  # a damaged block raises anything, as in `decode`
        yield "damaged EXIF"


def look_at_all(sources: Mapping[str, ImageSource], *, workers: int, progress: Progress) -> dict[str, list[Seen]]:
    """Look at every image of every split. Threads suffice: decoders and hashes release Python's lock.

    Args:
        sources: image sources by the name of their split.
        workers: number of threads.
        progress: called with the images done and in total.

    Returns:
        By split, what is known of each image, in the order of the source.
    """
    chunks = [
        (name, range(start, min(start + CHUNK, len(source))))
        for name, source in sources.items()
        for start in range(0, len(source), CHUNK)
    ]
    seen: dict[str, list[Seen]] = {name: [] for name in sources}
    total = sum(map(len, sources.values()))
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(workers) as pool:
        looks = pool.map(lambda chunk: [look_at(sources[chunk[0]], index) for index in chunk[1]], chunks)
        for (name, _), found in zip(chunks, looks, strict=True):
            seen[name] += found
            progress(sum(map(len, seen.values())), total)
    return seen


def check(data: str, *, workers: int, progress: Progress) -> dict[str, Any]:
    """Read a whole data set once and report what is wrong with it.

    Args:
        data: a folder or shards, perhaps with splits inside.
        workers: number of threads, 1 or more.
        progress: called with the images done and in total.

    Returns:
        Plain values for JSON; `problems` has a line for each kind of fault.

    Raises:
        ValueError: no split can be opened, no image can be read, or fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"--workers: expected 1 or more, got {workers}")
    sources: dict[str, ImageSource] = {}
    closed: dict[str, str] = {}
    for name, location in (find_splits(data) or {"all": data}).items():
        try:
            sources[name] = open_source(location)
        except ValueError as error:
            closed[name] = str(error)
    if not sources:
        raise ValueError(next(iter(closed.values())))
    seen = look_at_all(sources, workers=workers, progress=progress)
    readable = sum(not one.reason for of_split in seen.values() for one in of_split)
    if not readable:
        first = next(one.reason for of_split in seen.values() for one in of_split)
        raise ValueError(f"{data}: none of its images can be read; the first: {first}")
    classes = _classes(sources)
    report = {
        "data": data,
        "splits": {name: _of_split(source, seen[name]) for name, source in sources.items()},
        "splits_that_cannot_be_opened": closed,
        "classes": classes,
        "unreadable": list(_unreadable(sources, seen)),
        "formats": dict(Counter(one.form for of_split in seen.values() for one in of_split if one.form).most_common()),
        "odd": _odd_kinds(sources, seen),
        "duplicates": _duplicates(sources, seen),
    }  # fmt: skip
    report |= _names(classes, sources)
    return report | {"problems": list(_problems(report))}


def _of_split(source: ImageSource, seen: Sequence[Seen]) -> dict[str, Any]:
    sides = [one.pixels for one in seen if not one.reason]
    return {
        "path": source.where, "images": len(source), "classes": len(source.folders), "bytes": sum(one.size for one in seen),
        "unreadable": sum(bool(one.reason) for one in seen) + len(source.faults),
        "pixels": {
            what: [take(width for width, _ in sides), take(height for _, height in sides)]
            for what, take in (("smallest", min), ("median", median), ("largest", max))
        } if sides else {},
    }  # fmt: skip


def _unreadable(sources: Mapping[str, ImageSource], seen: Mapping[str, Sequence[Seen]]) -> Iterator[dict[str, str]]:
    for name, source in sources.items():
        bad = [(source.name(index), one.reason) for index, one in enumerate(seen[name]) if one.reason]
        yield from ({"split": name, "image": image, "reason": reason} for image, reason in (*bad, *source.faults))


def _classes(sources: Mapping[str, ImageSource]) -> dict[str, dict[str, int]]:
    """Images by class and split."""
    counts: dict[str, dict[str, int]] = {}
    for name, source in sources.items():
        found = Counter(source.labels.tolist())
        for label, folder in enumerate(source.folders):
            counts.setdefault(folder, dict.fromkeys(sources, 0))[name] = found[label]
    return counts


def _odd_kinds(sources: Mapping[str, ImageSource], seen: Mapping[str, Sequence[Seen]]) -> dict[str, dict[str, Any]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, of_split in seen.items():
        for index, one in enumerate(of_split):
            for kind in one.odd:
                kinds[kind].append(sources[name].name(index))
    return {kind: {"count": len(images), "examples": images[:5]} for kind, images in kinds.items()}


def _duplicates(sources: Mapping[str, ImageSource], seen: Mapping[str, Sequence[Seen]]) -> list[dict[str, Any]]:
    """Groups of images with the same bytes, whether readable or not."""
    found_at: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for name, of_split in seen.items():
        for index, one in enumerate(of_split):
            if one.size:
                found_at[one.digest].append((name, index))
    return [
        {
            "splits": sorted({name for name, _ in group}),
            "classes": sorted({sources[name].folders[int(sources[name].labels[index])] for name, index in group}),
            "images": [sources[name].name(index) for name, index in group],
        }
        for group in found_at.values()
        if len(group) > 1
    ]  # fmt: skip


def _names(classes: Mapping[str, Mapping[str, int]], sources: Mapping[str, ImageSource]) -> dict[str, Any]:
    """Classes with few images where one trains, names that clash, and classes that only some splits have."""
    first = "train" if "train" in sources else next(iter(sources))
    folders = list(classes)
    return {
        "nearly_empty": {name: classes[name][first] for name in sources[first].folders if classes[name][first] < NEARLY_EMPTY},
        "clashes": [[folders[index] for index in group] for group in twins(folders)],
        "unknown_classes": {
            name: [folder for folder in source.folders if folder not in sources[first].folders]
            for name, source in sources.items()
            if set(source.folders) - set(sources[first].folders)
        },
    }


def _problems(report: Mapping[str, Any]) -> Iterator[str]:
    for name, reason in report["splits_that_cannot_be_opened"].items():
        yield f"{name}: {reason}"
    images = sum(split["images"] for split in report["splits"].values())
    if report["unreadable"]:
        one = report["unreadable"][0]
        yield f"unreadable images: {len(report['unreadable'])} of {images}, such as {one['image']} ({one['reason']})"
    for text, chosen in (
        ("in more than one split, where what was learnt is tested", lambda group: len(group["splits"]) > 1),
        ("with more than one class", lambda group: len(group["classes"]) > 1),
        ("that are there more than once", lambda group: len(group["splits"]) == len(group["classes"]) == 1),
    ):
        groups = [group for group in report["duplicates"] if chosen(group)]
        if groups:
            first = groups[0]["images"]
            yield f"images {text}, byte for byte: {len(groups)}, such as {' and '.join(first[:2])}"
    if report["nearly_empty"]:
        name, count = next(iter(report["nearly_empty"].items()))
        yield f"classes with fewer than {NEARLY_EMPTY} images: {len(report['nearly_empty'])}, such as {name} with {count}"
    for group in report["clashes"]:
        yield f"names of classes differ in case, underscores and spaces only: {' and '.join(map(repr, group))}"
    for name, folders in report["unknown_classes"].items():
        yield f"{name} has classes that the training images lack: {len(folders)}, such as {folders[0]}"

"""From an image folder to tar shards, for data that outgrows one disk or one folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from cammask_fast.data.datasets.webdataset import write_classes
from cammask_fast.data.loaders.reading import ReadError, read_sample
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.sampler import epoch_order
from cammask_fast.data.transforms import opened, to_rgb
from cammask_fast.data.types import ImageSource
from cammask_fast.runtime.files import atomic_write

PLAN = "pack.json"


def pack(
    source: ImageSource,
    out: Path,
    *,
    per_shard: int = 1000,
    resize: int | None = None,
    quality: int = 95,
    seed: int = 0,
    bad: UnreadableSamples,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `out/000000.tar` …, `classes.txt` and the plan.

    Samples are shuffled, so that a shard holds all classes. Each shard is written under a temporary name, synced and renamed,
    and shards that are there already are kept, so that the same call continues after an interruption.

    Args:
        source: encoded images with labels.
        out: folder of the shards.
        per_shard: images per shard, the last one excepted.
        resize: pixels of the short side, to which larger images are reduced and written as JPEG; None copies the bytes.
        quality: of the JPEGs, 1 to 100.
        seed: of the order.
        bad: what cannot be decoded is reported to it and left out.
        progress: called with the images done and in total.

    Returns:
        The shards' paths.

    Raises:
        ValueError: `out` holds shards of another source or other settings, or cannot be written; or a number is out of range.
    """
    if per_shard < 1 or (resize is not None and resize < 1) or not 1 <= quality <= 100:
        raise ValueError("expected 1 or more images per shard, a size of 1 or more and a quality of 1 to 100")
    plan = {
        "source": source.where, "images": len(source), "classes": len(source.folders), "per_shard": per_shard,
        "resize": resize, "quality": quality if resize else None, "seed": seed,
    }  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        _keep_plan(out / PLAN, plan)
        write_classes(out, source.folders)
        parts = epoch_order(len(source), seed=seed, epoch=0).split(per_shard)
        shards = [out / f"{number:06d}.tar" for number in range(len(parts))]
        for number, (shard, ids) in enumerate(zip(shards, parts, strict=True)):
            if not shard.exists():
                _write_shard(shard, source, ids.tolist(), resize=resize, quality=quality, bad=bad)
            if progress is not None:
                progress(min((number + 1) * per_shard, len(source)), len(source))
    except OSError as error:
        raise ValueError(
            f"cannot write to {out}: {error.strerror or error}; what is there stays; run the command again to resume"
        ) from None
    return shards


def _keep_plan(path: Path, plan: dict[str, object]) -> None:
    text = json.dumps(plan, indent=1) + "\n"
    if not path.exists():
        if any(path.parent.glob("*.tar")):
            raise ValueError(f"{path.parent} holds shards that were not packed here: choose another folder")
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} was started with other settings or from other images: choose another folder or remove it")


def _write_shard(
    shard: Path, source: ImageSource, ids: list[int], *, resize: int | None, quality: int, bad: UnreadableSamples
) -> None:
    with atomic_write(shard) as part, part.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in ids:
                try:
                    data = read_sample(source, index)
                    suffix = "jpg" if resize else _suffix(source.name(index))
                    if resize:
                        data = _resized(data, resize, quality)
                except (OSError, EOFError, ValueError) as error:
                    bad.add(source.name(index), str(error))
                    continue
                except ReadError as error:
                    raise ValueError(f"{error}; what is packed stays; run the same command again to resume") from None
                for extension, content in ((suffix, data), ("cls", b"%d" % int(source.labels[index]))):
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())


def _suffix(name: str) -> str:
    suffix = Path(name).suffix.lower().removeprefix(".")
    return suffix or "jpg"


def _resized(data: bytes, size: int, quality: int) -> bytes:
    image = to_rgb(opened(data))
    short = min(image.size)
    if short > size:
        image = image.resize((round(image.width * size / short), round(image.height * size / short)), Image.Resampling.BICUBIC)
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=quality)
    return packed.getvalue()

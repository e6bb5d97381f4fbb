"""Images held in memory, and given masks of their objects: mask images by the photograph's relative path."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cammask_fast.data.class_names import some
from cammask_fast.data.factory import EVALUATION_BATCH, AnyLoader
from cammask_fast.data.files import photographs_of
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.loaders.torch_loader import UNREADABLE, error_reason
from cammask_fast.data.transforms import Transform, opened, orientation, placed, to_pixels, to_rgb
from cammask_fast.data.types import ArrayLoader, Batch, ImageSource
from cammask_fast.runtime.notices import notice

INDEX_BELOW = 128
"""A grey mask whose values are all lower holds indices: everything but 0 is the object."""
ASPECT = 0.02
"""Largest relative difference between the aspects of a photograph and its mask."""
SIDEWAYS = 5
"""EXIF orientations from here on exchange width and height."""


def read_images(loader: AnyLoader, chosen: Tensor, config: LoaderConfig) -> tuple[Batch, AnyLoader]:
    """Decode some of a loader's images as evaluation sees them.

    Args:
        loader: of an evaluation or validation set.
        chosen: int64 (n,), sample ids in rising order.
        config: how images are loaded.

    Returns:
        The images that can be read, on the CPU, with their labels and sample ids; and the loader that read them.

    Raises:
        ValueError: none of them can be read.
    """
    if isinstance(loader, ArrayLoader):
        return Batch(loader.images[chosen], loader.labels[chosen], chosen), loader
    part = config.build(loader.source.subset(chosen), loader.transform, batch_size=EVALUATION_BATCH)
    batches = [batch.to("cpu") for batch in part]
    if not batches:
        raise ValueError(f"none of the {len(chosen)} images of {loader.source.where} can be read")
    images, labels, ids = (
        torch.cat(column) for column in zip(*((b.images, b.labels, b.sample_ids) for b in batches), strict=True)
    )
    order = ids.argsort()
    return Batch(images[order], labels[order], chosen[ids[order]]), part


def read_masks(folder: Path, loader: AnyLoader, sample_ids: Sequence[int]) -> Tensor:
    """Read the masks of some of a loader's images, cut and resized as these are.

    A photograph's mask has its path below the data, or below the folder of the data's name, with any image suffix in the place
    of its own or behind it. The object is what is opaque in a mask with transparency; what is not black in one with colours;
    what is not 0 in a grey one whose values are all below 128; else what is brighter than half of the brightest.

    Args:
        folder: of the masks.
        loader: of the images.
        sample_ids: of the images.

    Returns:
        float32 (n, S, S) in [0, 1], the share of each pixel on the object; zeros without a mask, which is a notice.

    Raises:
        ValueError: there is no mask at all, or one that cannot be read or has another shape than its photograph.
    """
    if isinstance(loader, ArrayLoader):
        raise ValueError("--masks: the embedded benchmark has no files; its own map is used without --masks")
    if not folder.is_dir():
        raise ValueError(f"--masks: no folder at {folder}")
    source, size = loader.source, loader.transform.size
    of_path = {str(path.relative_to(folder).with_suffix("")): path for path in photographs_of([folder])}
    masks, missing = torch.zeros(len(sample_ids), size, size), list[str]()
    for row, index in enumerate(sample_ids):
        paths = mask_paths_of(source, index)
        path = next((of_path[one] for one in paths if one in of_path), None)
        if path is None:
            missing.append(paths[0])
        else:
            masks[row] = _coverage(path, source, index, loader.transform)
    if len(missing) == len(sample_ids):
        raise ValueError(f"--masks {folder}: no mask for any image; expected such as {folder / missing[0]}.png")
    if missing:
        notice(f"--masks {folder}: images without a mask: {len(missing)}, {some(missing, 3)}")
    return masks


def mask_paths_of(source: ImageSource, index: int) -> list[str]:
    """Where the mask of an image may lie below the masks' folder, without its last suffix."""
    files: Sequence[str] = source.files if hasattr(source, "files") else getattr(source, "keys", ())
    name, root = Path(files[index]), Path(source.where).name
    plain = [str(name.with_suffix("")), str(name)]
    return [*plain, *(str(Path(root, one)) for one in plain)]


def object_of(image: Image.Image) -> Image.Image:
    """The object of a mask in white on black."""
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < alpha.max():
            return Image.fromarray((alpha >= INDEX_BELOW).astype(np.uint8) * 255)
    values = np.asarray(image if image.mode in ("1", "L", "I", "F", "I;16") else image.convert("RGB"))
    if values.ndim == 3:
        coloured = (values != values[..., :1]).any()
        values = values.max(2) if not coloured else (values.max(2) > 0).astype(np.uint8)
    indices = values.max() < INDEX_BELOW and values.min() >= 0
    inside = values > 0 if indices else values > values.max() / 2
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _coverage(path: Path, source: ImageSource, index: int, transform: Transform) -> Tensor:
    """float32 (S, S): the mask of an image as the model sees the image."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as given:
            given.load()
            mask = to_rgb(object_of(given), border=transform.border)
    except UNREADABLE as error:
        raise ValueError(f"--masks: cannot read {path} ({error_reason(error)})") from None
    photo = opened(source.read(index))
    width, height = photo.size[::-1] if orientation(photo) >= SIDEWAYS else photo.size
    given_width, given_height = given.size
    if abs(given_width * height / (width * given_height) - 1) > ASPECT:
        raise ValueError(
            f"--masks: {path} has {given_width} x {given_height} pixels and its photograph {source.name(index)} {width} x "
            f"{height}: expected the same shape"
        )
    draw = transform.sample_params(0, 0, *mask.size)
    return placed(to_pixels(mask), draw, transform.size)[..., 0].float() / 255

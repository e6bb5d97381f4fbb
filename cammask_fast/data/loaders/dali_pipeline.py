"""DALI's pipeline: what goes into it, and its graph, which can be looked at on a machine without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cammask_fast.data.augment import RAND_AUGMENT_BINS, Augment
from cammask_fast.data.loaders.dali_versions import GPU_REGIONS, installed_versions, known_faults
from cammask_fast.data.transforms import AugmentParams, Transform
from cammask_fast.data.warn import warn_once

PREFETCH = 2


class Encoded(NamedTuple):
    """A batch before decoding. data: uint8 (bytes,), all files one after the other; lengths: int64 (n,). region: int32 (n, 4),
    top, left, height and width of what is decoded. draws: with windows in pixels of that region. reasons: rows that cannot be
    read. notes: what was guessed of a row."""

    sample_ids: Tensor
    epoch: int
    data: Tensor
    lengths: Tensor
    region: Tensor
    draws: list[AugmentParams]
    reasons: Mapping[int, str]
    notes: Mapping[int, str]


class Work(NamedTuple):
    """What the pipeline does.

    resizes: it resizes and augments what it has decoded. regions: it is told which region of an image to decode, and decodes
    whole images otherwise. whole_centre: the region is the whole image where the crop is central.
    """

    resizes: bool
    regions: bool
    whole_centre: bool


def work_for(augment: Augment, device: torch.device) -> Work:
    """On a GPU DALI does everything, on a CPU what nobody else does better.

    A GPU decodes regions for random crops only: a centre crop shows most of an image. Where decoding regions is known to fail,
    whole images are decoded for random crops too, which is said once.
    """
    on_gpu = device.type == "cuda"
    resizes = on_gpu or bool(augment.color_jitter or augment.rand_augment[0])
    regions = augment.random_crop > 0 or (resizes and not on_gpu)
    if regions and on_gpu:
        fault = known_faults(installed_versions()).get(GPU_REGIONS)
        if fault is not None:
            warn_once(f"{fault}: whole images are decoded for random crops, which takes longer")
            regions = False
    return Work(resizes=resizes, regions=regions, whole_centre=on_gpu or not resizes)


def part(encoded: Encoded, rows: range) -> Encoded:
    """Consecutive rows of a batch, without reasons and notes."""
    here = slice(rows.start, rows.stop)
    before = int(encoded.lengths[: rows.start].sum())
    return encoded._replace(
        sample_ids=encoded.sample_ids[here], lengths=encoded.lengths[here], region=encoded.region[here],
        data=encoded.data[before : before + int(encoded.lengths[here].sum())], draws=encoded.draws[here], reasons={}, notes={},
    )  # fmt: skip


def columns(encoded: Encoded, augment: Augment, work: Work) -> tuple[list[Any], ...]:
    """A batch in the form that the pipeline takes.

    Args:
        encoded: JPEG bytes, regions and augmentation parameters of the batch.
        augment: augmentations, which decide the inputs of the pipeline.
        work: what the pipeline does.

    Returns:
        One list of arrays per input of the pipeline.
    """
    files = [file.numpy() for file in encoded.data.split(encoded.lengths.tolist())]
    region, draws = encoded.region.numpy(), encoded.draws
    parts = [region[:, :2], region[:, 2:]] if work.regions else []
    if work.resizes:
        windows = np.array([draw.window for draw in draws], dtype=np.float32)
        parts += [windows[:, [1, 0]], windows[:, [3, 2]]]
        if augment.flip:
            parts += [np.array([[draw.flip] for draw in draws], dtype=np.int32)]
        if augment.color_jitter:
            parts += [np.array([draw.jitter for draw in draws], dtype=np.float32)]
        if augment.rand_augment[0]:
            parts += [np.array([draw.operations for draw in draws], dtype=np.float32)]
            parts += [np.array([draw.signs for draw in draws], dtype=np.int32)]
    return (files, *(list(np.ascontiguousarray(part)) for part in parts))


def define_pipeline(
    source: Callable[[], Any],
    transform: Transform,
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
    hardware_share: float,
    work: Work,
    prefetch: int = PREFETCH,
) -> Any:
    """A pipeline that decodes each image and, if `work` says so, resizes its window and augments it.

    It is not built yet, so no GPU is needed.

    Args:
        source: feeds what `columns` returns, or raises StopIteration.
        transform: size and augmentations.
        batch_size: images in a batch, at most.
        threads: DALI's own.
        device: where images are decoded and come out.
        hardware_share: of the JPEGs on a GPU, for its hardware decoder; 0 to 1.
        work: what the pipeline does, see `work_for`.
        prefetch: batches that are decoded ahead; with 1 each run asks `source` once.

    Returns:
        A DALI pipeline.
    """
    from nvidia.dali import fn, pipeline_def, types

    size, augment, on_gpu = transform.size, transform.augment, device.type == "cuda"
    operations = augment.rand_augment[0]
    decoder: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False,
        "jpeg_fancy_upsampling": True, **({"hw_decoder_load": hardware_share} if on_gpu else {}),
    }  # fmt: skip

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=prefetch,
        enable_conditionals=operations > 0,
    )
    def graph() -> Any:
        kinds = [types.UINT8, *[types.INT32] * (2 * work.regions)]
        if work.resizes:
            kinds += [types.FLOAT, types.FLOAT, *[types.INT32] * augment.flip, *[types.FLOAT] * bool(augment.color_jitter)]
            kinds += [types.FLOAT, types.INT32] * bool(operations)
        encoded, *looks = fn.external_source(source=source, num_outputs=len(kinds), batch=True, dtype=kinds, ndim=1)
        if work.regions:
            start, extent = looks.pop(0), looks.pop(0)
            images = fn.decoders.image_slice(encoded, start=start, shape=extent, axes=[0, 1], **decoder)
        else:
            images = fn.decoders.image(encoded, **decoder)
        if not work.resizes:
            return images
        begin, end = looks.pop(0), looks.pop(0)
        images = fn.resize(
            images, size=[size, size], roi_start=begin, roi_end=end, interp_type=types.INTERP_CUBIC, antialias=True
        )
        if augment.flip:
            images = fn.flip(images, horizontal=looks.pop(0)[0])
        if augment.color_jitter:
            factors = looks.pop(0)
            images = fn.color_twist(images, brightness=factors[0], contrast=factors[1], saturation=factors[2])
        if operations:
            images = _rand_augment(images, looks[0], looks[1], augment)
        return images

    with warnings.catch_warnings(action="ignore"):  # DALI's own suite uses operators that DALI has renamed
        return graph()


def _rand_augment(images: Any, chosen: Any, signs: Any, augment: Augment) -> Any:
    """RandAugment with DALI's operations and our draws, which a resumed run repeats."""
    from nvidia.dali import fn, types
    from nvidia.dali.auto_aug.core import select, signed_bin
    from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

    suite = get_rand_augment_suite()
    operations, magnitude = augment.rand_augment
    for i in range(operations):
        images = select(
            suite,
            fn.cast(chosen[i] * len(suite), dtype=types.INT32),
            data=images,
            magnitude_bin=signed_bin(magnitude, random_sign=signs[i]),
            num_magnitude_bins=RAND_AUGMENT_BINS,
        )
    return images

"""The loader on NVIDIA DALI: encoded bytes in, uint8 batches out, on the GPU (nvJPEG) or on CPU threads.

Our sampler owns the order: worker processes (or this process) read the bytes of the next batches and look at their headers, and
DALI decodes, resizes, crops and augments them in a prefetching pipeline. On a CPU DALI decodes, and torchvision resizes, three
times as fast as DALI there (with jitter or RandAugment DALI does it all). Baseline and progressive JPEGs in RGB or grey go to
DALI as they are. Everything else (PNG, WebP, GIF, CMYK, EXIF-rotated, very long images) is decoded and placed by PIL as in the
plain loader and handed over as raw pixels. When DALI refuses a batch, its files are tried one by one, those that it refuses go
to PIL, which settles what is unreadable, and the batch is run again: what becomes of a sample never depends on its neighbours.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cammask_fast.data.loaders.torch_loader import (
    UNREADABLE,
    BatchRequest,
    BatchSampler,
    Decoded,
    error_reason,
    record_index_errors,
    replace_or_drop_unreadable,
)
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.loaders.workers import iter_with_worker_check, read_ahead, worker_died
from cammask_fast.data.sampler import ResumableDistributedSampler, ResumableLoader
from cammask_fast.data.transforms import (
    EXACT_MODES,
    LONGEST,
    ORIENTATION,
    RAND_AUGMENT_BINS,
    Augment,
    AugmentParams,
    Transform,
    augmented,
    opened,
    placed,
    to_pixels,
    to_rgb,
)
from cammask_fast.data.types import Batch, ImageSource

HARDWARE_SHARE = 0.75
"""Share of the JPEGs for the hardware decoder of A100, H100 and H200; the others are decoded on the multiprocessors."""
PREFETCH = 2
MARGIN = 16
"""Pixels decoded around a window: more than a bicubic filter and JPEG's chroma up-sampling reach."""
BLACK = b"P6 1 1 255\n\0\0\0"


def dali_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Encoded(NamedTuple):
    """A batch before decoding. data: uint8 (bytes,), all files one after the other; lengths: int64 (n,). region: int32 (n, 4),
    top, left, height and width of what is decoded. draws: with windows in pixels of that region. reasons: rows that cannot be
    read."""

    sample_ids: Tensor
    epoch: int
    data: Tensor
    lengths: Tensor
    region: Tensor
    draws: list[AugmentParams]
    reasons: Mapping[int, str]


class EncodedBatches(Dataset[Encoded]):
    """Reads the batches it is asked for and draws their windows. whole: centre crops need the whole image decoded."""

    def __init__(self, source: ImageSource, transform: Transform, *, whole: bool):
        self.source, self.transform, self.whole = source, transform, whole

    def __getitem__(self, request: BatchRequest) -> Encoded:
        files, regions, draws, reasons = [], [], [], {}
        for row, index in enumerate(request.sample_ids):
            try:
                data, region, draw = self._one(index, request)
            except UNREADABLE as error:
                data, region, draw = BLACK, (0, 0, 1, 1), _nothing(self.transform)
                reasons[row] = error_reason(error)
            files.append(data)
            regions.append(region)
            draws.append(draw)
        return Encoded(
            sample_ids=torch.tensor(request.sample_ids),
            epoch=request.epoch,
            data=torch.from_numpy(np.frombuffer(bytearray().join(files), dtype=np.uint8)),
            lengths=torch.tensor([len(data) for data in files]),
            region=torch.tensor(regions, dtype=torch.int32),
            draws=draws,
            reasons=reasons,
        )

    def _one(self, index: int, request: BatchRequest) -> tuple[bytes, tuple[int, int, int, int], AugmentParams]:
        data = self.source.read(index)
        image = opened(data)
        width, height = image.size
        size = self.transform.size
        if (
            image.format == "JPEG"
            and image.mode in EXACT_MODES
            and max(width, height) <= LONGEST * min(width, height)
            and not self.transform.border
            and index not in request.plain
            and image.getexif().get(ORIENTATION, 1) == 1
        ):
            draw = self.transform.sample_params(request.epoch, index, width, height)
            if self.whole and draw.centred:
                return data, (0, 0, height, width), draw
            left, top, right, bottom = draw.window
            across, down = MARGIN + 2 * (right - left) / size, MARGIN + 2 * (bottom - top) / size
            x0, y0 = max(0, int(left - across) // 16 * 16), max(0, int(top - down) // 16 * 16)
            x1, y1 = min(width, int(right + across) + 1), min(height, int(bottom + down) + 1)
            return data, (y0, x0, y1 - y0, x1 - x0), draw._replace(window=(left - x0, top - y0, right - x0, bottom - y0))
        image = to_rgb(image, border=self.transform.border)
        draw = self.transform.sample_params(request.epoch, index, *image.size)
        pixels = placed(to_pixels(image), draw, size)
        whole = draw._replace(window=(0.0, 0.0, float(size), float(size)), centred=False)
        return b"P6 %d %d 255\n" % (size, size) + pixels.contiguous().numpy().tobytes(), (0, 0, size, size), whole


def _nothing(transform: Transform) -> AugmentParams:
    operations = transform.augment.rand_augment[0]
    return AugmentParams((0.0, 0.0, 1.0, 1.0), centred=False, operations=(0.0,) * operations, signs=(0,) * operations)


class DaliLoader(ResumableLoader):
    """Batches of a source, decoded by DALI in the order of `ResumableDistributedSampler`, resident on `device`.

    On the CPU `workers` are DALI's threads (0 counts as 1) and this process reads the files; on a GPU they are processes that
    read the files (and DALI's own threads beside them), and images come out on the device. Samples that cannot be read follow
    the rule of `torch_loader.replace_or_drop_unreadable`. hardware_share: of the GPU's JPEG decoder, 0 to 1.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        *,
        batch_size: int,
        bad: UnreadableSamples,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        hardware_share: float = HARDWARE_SHARE,
    ):
        if workers < 0:
            raise ValueError(f"--workers: expected 0 or more, got {workers}")
        if not 0 <= hardware_share <= 1:
            raise ValueError(f"--hardware-share: expected a share in [0, 1], got {hardware_share}")
        if not dali_installed():
            raise ValueError(
                "NVIDIA DALI is not installed: pip install nvidia-dali-cuda130 (or -cuda120), or use --loader torch"
            )
        self.source, self.labels, self.bad, self.transform = source, source.labels, bad, transform
        self.device, self.workers, self.hardware_share = torch.device(device), workers, hardware_share
        self.order = ResumableDistributedSampler(
            len(source), batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
        )
        self._asked = BatchSampler(self.order)
        processes = workers if self.device.type == "cuda" else 0
        self._resizes = self.device.type == "cuda" or bool(transform.augment.color_jitter or transform.augment.rand_augment[0])
        self._encoded = EncodedBatches(source, transform, whole=not self._resizes)
        self._reader = read_ahead(self._encoded, self._asked, processes)
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._queue = _Queue(partial(columns, augment=transform.augment, resizes=self._resizes))
        self._pipeline: Any = None
        self._under_way = False
        record_index_errors(source, bad)

    def __iter__(self) -> Iterator[Batch]:
        return self._counted(self._decoded())

    def _counted(self, batches: Iterator[Batch | None]) -> Iterator[Batch]:
        return (batch for batch in super()._counted(batches) if batch is not None)

    def _decoded(self) -> Iterator[Batch | None]:
        if self._under_way:  # an iteration that was abandoned has left batches in the pipeline
            self._pipeline = None
        self._under_way = True
        self._queue.restart(iter_with_worker_check(self._reader))
        self._pipeline = self._pipeline or self._build(self._queue, self.order.batch_size)
        while True:
            try:
                decoded = self._pipeline.run()[0]
            except StopIteration:
                self._pipeline.reset()
                self._under_way = False
                return
            except RuntimeError as error:  # DALI's word for a damaged image; the pipeline cannot be used any more
                if not self._queue.waiting or worker_died(error):
                    raise
                refused = self._queue.waiting.popleft()
                self._queue.replay(self._without_refused(refused, error))
                self._pipeline = self._build(self._queue, self.order.batch_size)
                continue
            encoded = self._queue.waiting.popleft()
            images = self._to_torch(decoded) if self._resizes else self._placed(decoded, encoded.draws)
            yield replace_or_drop_unreadable(self, Decoded(encoded.sample_ids, images, encoded.reasons))

    def _to_torch(self, output: Any) -> Tensor:
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(output.as_array()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        shape = (len(output), self.transform.size, self.transform.size, 3)
        images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        feed_ndarray(output.as_tensor(), images, cuda_stream=torch.cuda.current_stream(self.device))
        return images

    def _placed(self, output: Any, draws: Sequence[AugmentParams]) -> Tensor:
        """Resize and flip what DALI has decoded, one image per thread."""
        images = torch.empty((len(output), self.transform.size, self.transform.size, 3), dtype=torch.uint8)

        def resize_row(row: int) -> None:
            pixels = placed(torch.from_numpy(np.asarray(output[row])), draws[row], self.transform.size)
            images[row] = augmented(pixels, draws[row], self.transform.augment)

        list(self._pool.map(resize_row, range(len(output))))
        return images

    def _without_refused(self, encoded: Encoded, error: RuntimeError) -> Encoded:
        """The batch with the files that DALI refuses decoded by PIL, or marked as unreadable; from now on they bypass DALI."""
        refused = set()
        for row, index in enumerate(encoded.sample_ids.tolist()):
            if not self._takes(_row(encoded, row)):
                refused.add(index)
        if not refused:
            raise ValueError(f"DALI failed on a batch whose images it takes one by one: {str(error).splitlines()[0]}") from None
        self._asked.plain |= refused
        return self._encoded[BatchRequest(encoded.epoch, tuple(encoded.sample_ids.tolist()), frozenset(refused))]

    def _takes(self, one: Encoded) -> bool:
        try:
            self._build(lambda: columns(one, self.transform.augment, resizes=self._resizes), 1).run()
        except RuntimeError:
            return False
        return True

    def _build(self, source: Callable[[], Any], batch_size: int) -> Any:
        return build_pipeline(
            source, self.transform, batch_size=batch_size, threads=max(1, self.workers), device=self.device,
            hardware_share=self.hardware_share, resizes=self._resizes,
        )  # fmt: skip


def _row(encoded: Encoded, row: int) -> Encoded:
    here = slice(row, row + 1)
    return encoded._replace(
        sample_ids=encoded.sample_ids[here], data=encoded.data.split(encoded.lengths.tolist())[row],
        lengths=encoded.lengths[here], region=encoded.region[here], draws=encoded.draws[here], reasons={},
    )  # fmt: skip


def columns(encoded: Encoded, augment: Augment, *, resizes: bool) -> tuple[list[Any], ...]:
    """A batch as the pipeline takes it: one list of arrays per input, as many as it needs."""
    files = [file.numpy() for file in encoded.data.split(encoded.lengths.tolist())]
    region, draws = encoded.region.numpy(), encoded.draws
    parts = [region[:, :2], region[:, 2:]]
    if resizes:
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


class _Queue:
    """Hands batches to the pipeline and remembers those that have not come out of it."""

    def __init__(self, columns: Callable[[Encoded], tuple[list[Any], ...]]) -> None:
        self.columns = columns
        self.waiting: deque[Encoded] = deque()
        self._again: deque[Encoded] = deque()
        self._batches: Iterator[Encoded] = iter(())

    def restart(self, batches: Iterator[Any]) -> None:
        self.waiting.clear()
        self._again.clear()
        self._batches = batches

    def replay(self, first: Encoded) -> None:
        """Hand out `first`, then once more what is waiting, before anything new."""
        self._again = deque([first, *self.waiting, *self._again])
        self.waiting.clear()

    def __call__(self) -> tuple[list[Any], ...]:
        encoded = self._again.popleft() if self._again else Encoded(*next(self._batches))
        self.waiting.append(encoded)
        return self.columns(encoded)


def build_pipeline(
    source: Callable[[], Any],
    transform: Transform,
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
    hardware_share: float,
    resizes: bool,
) -> Any:
    """Decode a region and, if it `resizes`, resize its window and augment. See `columns` for what `source` feeds."""
    from nvidia.dali import fn, pipeline_def, types

    size, augment, on_gpu = transform.size, transform.augment, device.type == "cuda"
    operations = augment.rand_augment[0]
    decoder: dict[str, Any] = {"hw_decoder_load": hardware_share} if on_gpu else {}

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
        enable_conditionals=operations > 0,
    )
    def graph() -> Any:
        kinds = [types.UINT8, types.INT32, types.INT32]
        if resizes:
            kinds += [types.FLOAT, types.FLOAT, *[types.INT32] * augment.flip, *[types.FLOAT] * bool(augment.color_jitter)]
            kinds += [types.FLOAT, types.INT32] * bool(operations)
        encoded, start, extent, *looks = fn.external_source(
            source=source, num_outputs=len(kinds), batch=True, dtype=kinds, ndim=1
        )
        images = fn.decoders.image_slice(
            encoded, start=start, shape=extent, axes=[0, 1], device="mixed" if on_gpu else "cpu", output_type=types.RGB,
            adjust_orientation=False, jpeg_fancy_upsampling=True, **decoder,
        )  # fmt: skip
        if not resizes:
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
        pipeline = graph()
        pipeline.build()
    return pipeline


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

"""The loader on NVIDIA DALI: encoded bytes in, uint8 batches out, on the GPU (nvJPEG) or on CPU threads.

Our sampler owns the order: worker processes (or this process) read the bytes of the next batches and look at their headers, and
DALI decodes, resizes, crops and augments them in a prefetching pipeline. On a CPU DALI decodes, and torchvision resizes, three
times as fast as DALI there (with jitter or RandAugment DALI does it all). Baseline and progressive JPEGs in RGB or grey go to
DALI as they are. Everything else (PNG, WebP, GIF, CMYK, EXIF-rotated, very long images) is decoded and placed by PIL as in the
plain loader and handed over as raw pixels. When DALI refuses a batch, the files that it refuses are found by halving and go to
PIL, which settles what is unreadable, and the batch is run again: what becomes of a sample never depends on its neighbours.
"""

from __future__ import annotations

import importlib.util
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cammask_fast.data.loaders.dali_pipeline import PREFETCH, Encoded, Work, columns, define_pipeline, work_for
from cammask_fast.data.loaders.dali_refused import Trial, refused_rows
from cammask_fast.data.loaders.dali_versions import dali_failure, reason_of
from cammask_fast.data.loaders.reading import Failed, ReadError, read_sample
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
    LONGEST,
    AugmentParams,
    Transform,
    augmented,
    encoded_simply,
    opened,
    orientation,
    placed,
    to_pixels,
    to_rgb,
)
from cammask_fast.data.types import Batch, ImageSource

HARDWARE_SHARE = 0.75
"""Share of the JPEGs for the hardware decoder of A100, H100 and H200; the others are decoded on the multiprocessors."""
MARGIN = 16
"""Pixels decoded around a window: more than a bicubic filter and JPEG's chroma up-sampling reach."""
MOST_ON_GPU = 1 << 25
"""Pixels of an image that a GPU decodes, at most (100 MB): larger ones are decoded by the processes that read."""
BLACK = b"P6 1 1 255\n\0\0\0"


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be found; it is not imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class EncodedBatches(Dataset[Encoded | Failed]):
    """Reads the batches it is asked for and draws their windows.

    work: what the pipeline decodes of them. most_pixels: that it decodes of an image.
    """

    def __init__(self, source: ImageSource, transform: Transform, work: Work, *, most_pixels: float = math.inf):
        self.source, self.transform, self.work, self.most_pixels = source, transform, work, most_pixels

    def __getitem__(self, request: BatchRequest) -> Encoded | Failed:
        files, regions, draws, reasons = [], [], [], {}
        notes: dict[int, str] = {}
        for row, index in enumerate(request.sample_ids):
            try:
                data, region, draw = self._one(index, request, partial(notes.__setitem__, row))
            except UNREADABLE as error:
                data, region, draw = BLACK, (0, 0, 1, 1), _nothing(self.transform)
                reasons[row] = error_reason(error)
            except ReadError as error:
                return Failed(str(error))
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
            notes=notes,
        )

    def _one(
        self, index: int, request: BatchRequest, note: Callable[[str], None]
    ) -> tuple[bytes, tuple[int, int, int, int], AugmentParams]:
        data = read_sample(self.source, index)
        image = opened(data)
        width, height = image.size
        size = self.transform.size
        if (
            encoded_simply(image)
            and max(width, height) <= LONGEST * min(width, height)
            and not self.transform.border
            and index not in request.plain
            and orientation(image) == 1
        ):
            draw = self.transform.sample_params(request.epoch, index, width, height)
            region = (0, 0, height, width)
            if self.work.regions and not (draw.centred and self.work.whole_centre):
                left, top, right, bottom = draw.window
                across, down = MARGIN + 2 * (right - left) / size, MARGIN + 2 * (bottom - top) / size
                x0, y0 = max(0, int(left - across) // 16 * 16), max(0, int(top - down) // 16 * 16)
                x1, y1 = min(width, int(right + across) + 1), min(height, int(bottom + down) + 1)
                region = y0, x0, y1 - y0, x1 - x0
                draw = draw._replace(window=(left - x0, top - y0, right - x0, bottom - y0))
            if region[2] * region[3] <= self.most_pixels:
                return data, region, draw
        image = to_rgb(image, border=self.transform.border, note=note)
        draw = self.transform.sample_params(request.epoch, index, *image.size)
        pixels = placed(to_pixels(image), draw, size)
        whole = draw._replace(window=(0.0, 0.0, float(size), float(size)), centred=False)
        return b"P6 %d %d 255\n" % (size, size) + pixels.contiguous().numpy().tobytes(), (0, 0, size, size), whole


def _black(transform: Transform) -> Encoded:
    """A batch of one black pixel."""
    return Encoded(
        sample_ids=torch.zeros(1, dtype=torch.int64), epoch=0, data=torch.frombuffer(bytearray(BLACK), dtype=torch.uint8),
        lengths=torch.tensor([len(BLACK)]), region=torch.tensor([[0, 0, 1, 1]], dtype=torch.int32),
        draws=[_nothing(transform)], reasons={}, notes={},
    )  # fmt: skip


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
        sampler: ResumableDistributedSampler,
        *,
        bad: UnreadableSamples,
        workers: int = 1,
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
        failure = dali_failure(self.device)
        if failure is not None:
            raise ValueError(
                f"NVIDIA DALI is installed, but does not work on {self.device} ({failure}): "
                "install it again, or use --loader torch"
            )
        self.sampler = sampler
        self._asked = BatchSampler(self.sampler)
        on_gpu = self.device.type == "cuda"
        processes = workers if on_gpu else 0
        self._work: Work = work_for(transform.augment, self.device)
        most_pixels = MOST_ON_GPU if on_gpu else math.inf
        self._encoded = EncodedBatches(source, transform, self._work, most_pixels=most_pixels)
        self._reader = read_ahead(self._encoded, self._asked, processes)
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._queue = _Queue(self._columns)
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
        self._pipeline = self._pipeline or self._build(self._queue, self.sampler.batch_size)
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
                self._pipeline = None  # its memory is needed
                self._queue.replay(self._without_refused(refused, error))
                self._pipeline = self._build(self._queue, self.sampler.batch_size)
                continue
            encoded = self._queue.waiting.popleft()
            images = self._to_torch(decoded) if self._work.resizes else self._placed(decoded, encoded.draws)
            yield replace_or_drop_unreadable(self, Decoded(encoded.sample_ids, images, encoded.reasons, encoded.notes))

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
        ids = tuple(encoded.sample_ids.tolist())

        def build(asked: Callable[[], Encoded]) -> Any:
            return self._build(lambda: self._columns(asked()), len(ids), prefetch=1)

        trial, half = Trial(build, encoded, _black(self.transform)), len(ids) // 2
        rows = [row for part in (range(half), range(half, len(ids))) for row in refused_rows(part, trial.takes)]
        refused = {ids[row] for row in rows}
        if not refused:
            raise ValueError(f"DALI failed on a batch whose images it takes in parts: {reason_of(error)}") from None
        self._asked.plain |= refused
        again = self._encoded[BatchRequest(encoded.epoch, ids, frozenset(refused))]
        if isinstance(again, Failed):
            raise ValueError(again.message)
        return again

    def _columns(self, encoded: Encoded) -> tuple[list[Any], ...]:
        return columns(encoded, self.transform.augment, self._work)

    def _build(self, source: Callable[[], Any], batch_size: int, *, prefetch: int = PREFETCH) -> Any:
        pipeline = define_pipeline(
            source, self.transform, batch_size=batch_size, threads=max(1, self.workers), device=self.device,
            hardware_share=self.hardware_share, work=self._work, prefetch=prefetch,
        )  # fmt: skip
        pipeline.build()
        return pipeline


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

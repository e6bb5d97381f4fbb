"""DALI, our plain loader and torchvision's ImageFolder + DataLoader on the same files, in turn: `python -m bench data`.

All apply the paper's transform (bicubic resize of the short side to 224, centre crop) and give uint8 batches; torchvision's is
not asked to convert or normalise. Workers are DALI's threads or PyTorch's processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.transforms import v2

from bench.data.photographs import generate, mean_kilobytes
from bench.records import cpu_environment, show, spread
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.loaders.dali_loader import DaliLoader, dali_installed
from cammask_fast.data.loaders.torch_loader import TorchLoader
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.transforms import Transform, opened, to_pixels, to_rgb
from cammask_fast.data.types import ImageSource
from cammask_fast.viz.tables import markdown_table

SIZE = 224
BATCH = 64
GENERATED = 160
LEAST_IMAGES = 640
"""Images per epoch, so that the start of an epoch weighs little; fewer files are read several times."""
PROVIDERS = ("dali", "torch", "torchvision")
Epoch = Callable[[], Iterator[Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="DIR", help="class folders of JPEGs (default: generated ones)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="workers of every loader (default: 1 and 2)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs per provider, in turn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines to a file too")


def main(options: argparse.Namespace) -> int:
    if options.repeats < 2 or min(options.threads) < 1:
        raise ValueError("expected --repeats of 2 or more and --threads of 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        root = options.images or generate(Path(folder), GENERATED)
        source = scan(root)
        what = "photographs" if options.images else "generated JPEGs"
        records = [
            cpu_environment() | record | {"images": what, "mean_kb": mean_kilobytes(root)}
            for workers in options.threads
            for record in race(root, source, workers=workers, repeats=options.repeats)
        ]
    show(records, table(records), as_json=options.json, out=options.out)
    return 0


def epochs(root: Path, source: ImageSource, workers: int, report: Path) -> dict[str, Epoch]:
    """The loaders to compare, over every file equally often and in order.

    Args:
        root: folder of the images.
        source: the same images.
        workers: processes or threads of each loader.
        report: file for unreadable images.

    Returns:
        By provider, a function that iterates one epoch of uint8 image batches.
    """
    times = -(-LEAST_IMAGES // len(source))
    repeated = source.subset(torch.arange(len(source)).repeat(times))

    def ours(kind: type[TorchLoader | DaliLoader]) -> Epoch:
        bad = UnreadableSamples(source.where, len(repeated), report=report)
        sampler = ResumableDistributedSampler(len(repeated), batch_size=BATCH)
        loader = kind(repeated, Transform(size=SIZE), sampler, workers=workers, bad=bad)
        return lambda: (batch.images for batch in loader)

    transform = v2.Compose([
        v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE), v2.PILToTensor(),
    ])  # fmt: skip
    theirs = DataLoader(
        Subset(TorchvisionFolder(str(root), transform), list(range(len(source))) * times),
        batch_size=BATCH, num_workers=workers, persistent_workers=True,
    )  # fmt: skip
    found: dict[str, Epoch] = {"torchvision": lambda: (images for images, _ in theirs), "torch": ours(TorchLoader)}
    return ({"dali": ours(DaliLoader)} if dali_installed() else {}) | found


def race(root: Path, source: ImageSource, *, workers: int, repeats: int) -> list[dict[str, Any]]:
    """Time epochs of all loaders in turn, after a first one of each in which workers start and files are cached.

    Args:
        root: folder of the images.
        source: the same images.
        workers: processes or threads of each loader.
        repeats: timed epochs per loader.

    Returns:
        A record per provider.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            providers = epochs(root, source, workers, Path(folder) / "bad.tsv")
            wall: dict[str, list[float]] = {name: [] for name in providers}
            cpu: dict[str, list[float]] = {name: [] for name in providers}
            images = 0
            for round_ in range(repeats + 1):
                for name, epoch in providers.items():
                    started, spent = time.perf_counter(), cpu_seconds()
                    images = sum(len(batch) for batch in epoch())
                    if round_:
                        wall[name].append(time.perf_counter() - started)
                        cpu[name].append(cpu_seconds() - spent)
            apart = {name: difference(source, epoch) for name, epoch in providers.items()}
    finally:
        torch.set_num_threads(threads)
    return [
        {
            "op": "data", "provider": name, "threads": workers, "batch": BATCH, "files": len(source),
            **spread(wall[name]).fields(), "images_per_s": images / statistics.median(wall[name]),
            "cpu_s_per_1000": 1000 * statistics.median(cpu[name]) / images, "mean_abs_diff": apart[name],
            "faster_than_torchvision": statistics.median(wall["torchvision"]) / statistics.median(wall[name]),
        }
        for name in providers
    ]  # fmt: skip


def cpu_seconds() -> float:
    """User and system time of this process and its worker processes so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for pid in [os.getpid(), *(process.pid for process in multiprocessing.active_children())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def difference(source: ImageSource, epoch: Epoch) -> float:
    """Largest mean absolute difference of an image to PIL's, in 255ths."""
    worst, index = 0.0, 0
    for images in epoch():
        for image in images:
            if index == len(source):
                return worst
            pixels = image if image.shape[-1] == 3 else image.permute(1, 2, 0)
            expected = by_pil(source.read(index))
            worst = max(worst, (pixels.float() - expected.float()).abs().mean().item())
            index += 1
    return worst


def by_pil(data: bytes) -> Tensor:
    """The paper's transform by PIL alone, uint8 (224, 224, 3)."""
    transform = v2.Compose([v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)])
    return to_pixels(transform(to_rgb(opened(data))))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    header = ["loader", "workers", "images/s", "against torchvision", "CPU s per 1000 images", "worst mean difference to PIL"]
    names = {"dali": "ours, DALI", "torch": "ours, PyTorch", "torchvision": "torchvision"}
    rows = [
        [
            names[r["provider"]], str(r["threads"]), f"{r['images_per_s']:.0f}", f"{r['faster_than_torchvision']:.2f}x",
            f"{r['cpu_s_per_1000']:.2f}", f"{r['mean_abs_diff']:.2f} of 255",
        ]
        for r in records
    ]  # fmt: skip
    return markdown_table(header, rows)

"""DALI on a real GPU: the batches of the CPU loaders, on the device. Each test runs in a process of its own, so that a decoder
that crashes does not end the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.data.photographs import generate
from cammask_fast.data.augment import Augment
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.loaders.dali_loader import DaliLoader, dali_installed
from cammask_fast.data.loaders.dali_refused import PIPELINES
from cammask_fast.data.loaders.torch_loader import TorchLoader
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.transforms import Transform
from tests.helpers.processes import in_own_process

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not dali_installed(), reason="needs NVIDIA DALI"),
]


@pytest.mark.parametrize("words", [[], ["random-crop", "flip"]], ids=["paper", "crop and flip"])
def test_decoding_on_the_gpu_agrees_with_pil(tmp_path: Path, words: list[str]) -> None:
    in_own_process(agrees_with_pil, tmp_path, words)


def agrees_with_pil(folder: Path, words: list[str]) -> None:
    source = scan(generate(folder, 24))
    (folder / "class0" / "00000.jpg").write_bytes(b"no image")
    transform = Transform(size=224, augment=Augment.parse(words), seed=1)
    bad = UnreadableSamples("test", 24, max_share=1.0, report=folder / "bad.tsv")
    on_cpu = TorchLoader(
        source, transform, ResumableDistributedSampler(len(source), batch_size=8, shuffle=True, seed=2), workers=1, bad=bad
    )
    on_gpu = DaliLoader(
        source,
        transform,
        ResumableDistributedSampler(len(source), batch_size=8, shuffle=True, seed=2),
        workers=1,
        bad=bad,
        device="cuda",
    )
    for plain, dali in zip(on_cpu, on_gpu, strict=True):
        assert dali.images.device.type == "cuda"
        assert dali.images.dtype == torch.uint8
        assert torch.equal(plain.sample_ids, dali.sample_ids)
        difference = (plain.images.float() - dali.images.float().cpu()).abs().mean((1, 2, 3))
        assert difference.max() <= 2.0, "nvJPEG's inverse transform is its own"


def test_damaged_jpegs_cost_few_pipelines_on_the_gpu(tmp_path: Path) -> None:
    in_own_process(costs_few_pipelines, tmp_path)


def costs_few_pipelines(folder: Path) -> None:
    source = scan(generate(folder, 24))
    for index in (3, 4):
        path = Path(source.name(index))
        path.write_bytes(path.read_bytes()[:5000])
    built = 0
    build = DaliLoader._build

    def counted(loader: DaliLoader, *args: Any, **options: Any) -> Any:
        nonlocal built
        built += 1
        return build(loader, *args, **options)

    setattr(DaliLoader, "_build", counted)  # noqa: B010
    bad = UnreadableSamples("test", 24, max_share=1.0, report=folder / "bad.tsv")
    loader = DaliLoader(
        source, Transform(size=224), ResumableDistributedSampler(len(source), batch_size=12), workers=1, bad=bad, device="cuda"
    )
    assert [index for batch in loader for index in batch.sample_ids.tolist()] == [i for i in range(24) if i not in (3, 4)]
    assert built <= 2 + PIPELINES

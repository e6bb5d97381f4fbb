"""DALI on a real GPU: the batches of the CPU loaders, on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.data.photographs import generate
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.loaders.dali_loader import DaliLoader, dali_installed
from cammask_fast.data.loaders.torch_loader import TorchLoader
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.transforms import Augment, Transform

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not dali_installed(), reason="needs NVIDIA DALI"),
]


@pytest.mark.parametrize("augment", [Augment(), Augment.parse(["random-crop", "flip"])], ids=["paper", "crop and flip"])
def test_decoding_on_the_gpu_agrees_with_pil(tmp_path: Path, augment: Augment) -> None:
    source = scan(generate(tmp_path, 24))
    (tmp_path / "class0" / "00000.jpg").write_bytes(b"no image")
    transform = Transform(size=224, augment=augment, seed=1)
    bad = UnreadableSamples("test", 24, max_share=1.0, report=tmp_path / "bad.tsv")
    on_cpu = TorchLoader(source, transform, batch_size=8, workers=1, shuffle=True, seed=2, bad=bad)
    on_gpu = DaliLoader(source, transform, batch_size=8, workers=1, shuffle=True, seed=2, bad=bad, device="cuda")
    for plain, dali in zip(on_cpu, on_gpu, strict=True):
        assert dali.images.device.type == "cuda"
        assert dali.images.dtype == torch.uint8
        assert torch.equal(plain.sample_ids, dali.sample_ids)
        difference = (plain.images.float() - dali.images.float().cpu()).abs().mean((1, 2, 3))
        assert difference.max() <= 2.0, "nvJPEG's inverse transform is its own"

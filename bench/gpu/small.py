"""Every kernel once on small, odd shapes: what compute-sanitizer watches. `python -m bench.gpu.small` on a CUDA machine."""

from __future__ import annotations

from typing import Any

import torch

from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.kernels.legrad import legrad
from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.patch_select import patch_select


def run_all(device: torch.device) -> int:
    """Run every kernel in its variants; returns the number of calls. Raises where Triton cannot run."""
    calls = 0
    previous = set_backend("triton")
    for length, width, dtype in ((50, 64, torch.float16), (65, 32, torch.float32), (197, 64, torch.bfloat16)):
        if dtype == torch.bfloat16 and device.type == "cpu":
            continue  # Triton's interpreter has no bf16 arithmetic
        packed = torch.randn(2, length, 3 * 2 * width, device=device).to(dtype)
        q, k, v = (part.unflatten(-1, (2, width)).transpose(1, 2) for part in packed.chunk(3, -1))
        relevance, lse = torch.rand(2, length, device=device), torch.full((2, 2, length), 9.0, device=device)
        for rows in (length, 1):
            cls_relevance(relevance, q[:, :, :rows], k, v, v[:, :, :rows])
            cls_relevance(relevance, q[:, :, :rows], k, v, v[:, :, :rows], lse=lse[:, :, :rows])
            legrad(lse, v, v[:, :, :rows])
            calls += 3
    for grid, size in ((3, 16), (2, 14), (3, 5)):
        count, side, patches = 3, grid * size, grid * grid
        pixels = torch.randint(0, 256, (count, side, side, 3), device=device, dtype=torch.uint8)
        relevance = torch.rand(count, patches, device=device)
        single = torch.tensor([1, 2, 0], device=device)
        multi = torch.randint(0, count, (count, patches), device=device)
        choices: tuple[dict[str, Any], ...] = ({"threshold": 0.5}, {"top_k": patches // 2})
        for options in choices:
            patch_select(relevance, **options)
            patch_select(relevance, context=True, **options)
            for images in (pixels, pixels.permute(0, 3, 1, 2).float() / 255):
                for donors in (single, multi, None):
                    counterfactual_batch(images, relevance, donors, layout="patches", **options)
                    calls += 1
            calls += 2
        counterfactual_batch(pixels, relevance, single, threshold=0.5, upsample="bilinear", dtype=torch.float16)
        if size == 5:  # the interpreter takes its time
            counterfactual_batch(pixels, relevance, single, top_k=patches // 2, upsample="bilinear", dtype=torch.float16)
            calls += 1
        masked_fill(pixels, relevance > 0.5, multi)
        normalise(pixels)
        normalise(pixels[:, :-1, 1:], dtype=torch.float16)
        calls += 4
    set_backend(previous)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    print(f"{run_all(torch.device('cuda'))} calls")

"""The small, odd shapes that compute-sanitizer watches on a GPU: every op, in Triton."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.small import run_all
from cammask_fast.kernels.backend import set_backend


@pytest.mark.triton
def test_every_kernel_runs(triton_backend: torch.device) -> None:
    assert run_all(triton_backend) >= 60
    assert set_backend("triton") == "triton", "the chosen backend is restored"

"""Where kernel tests run: on the GPU if there is one, otherwise on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cammask_fast.kernels.backend import set_backend


@pytest.fixture
def triton_backend() -> Iterator[torch.device]:
    """Every kernel runs in Triton or raises; yields the device that the inputs belong on."""
    previous = set_backend("triton")
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_backend(previous)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN (the largest value for integers): an element that a kernel forgets to write shows."""
    with torch.device("cpu"):
        torch.zeros(0)  # torch keeps the list of its constructors from the first use on, for every later test of this process
    empty = torch.empty

    def filled(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if made.device.type == "meta":
            return made
        if made.is_floating_point():
            return made.fill_(torch.nan)
        return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", filled)

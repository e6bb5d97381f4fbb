"""TF32 by one of PyTorch's two interfaces, so that both tell the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from cammask_fast.precision import set_matmul_precision


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    set_matmul_precision("fp32")


@pytest.mark.usefixtures("restored")
def test_both_interfaces_tell_whether_tf32_is_allowed() -> None:
    """Each getter without an exception or a warning, there and back; products of a CPU stay what they are."""
    cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for precision in ("tf32", "fp32", "tf32", "bf16"):
            set_matmul_precision(precision)
            allowed = precision == "tf32"
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
            for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):  # type: ignore[attr-defined]
                assert (backend.fp32_precision == "tf32") is allowed
            assert torch.backends.mkldnn.matmul.fp32_precision == cpu  # type: ignore[attr-defined]

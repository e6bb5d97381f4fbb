"""TF32 by one of PyTorch's two interfaces, so that both tell the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from cammask_fast.precision import resolve, set_matmul_precision
from cammask_fast.runtime.notices import collecting


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


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")])
def test_bf16_only_where_the_gpu_has_it(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index=None: f"Card {capability}")
    with collecting():
        for device in ("cuda", torch.device("cuda", 0)):
            assert resolve("auto", device) == chosen
            assert resolve("bf16", device) == "bf16", "asked for"
        assert resolve("auto", "cpu") == "fp32"
    said = capsys.readouterr().err
    assert said == (
        "cammask: Card (7, 5) (sm_75) has no bf16 products: --precision auto is fp32 here\n" if chosen == "fp32" else ""
    )

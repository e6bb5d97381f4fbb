"""The switch between Triton and the references: what it says where neither a GPU nor the interpreter can run a kernel."""

from __future__ import annotations

import pytest
import torch

from cammask_fast.kernels import backend
from cammask_fast.kernels.backend import interpreter_ineligible, set_backend, uses_triton


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.0", "2.10.0rc1", False), ("3.7.1", "2.4.6", True),
     ("3.10.0+git1", "2.5.0", True)],
)  # fmt: skip
def test_old_interpreters_need_an_old_numpy(triton: str, numpy: str, works: bool) -> None:
    said = interpreter_ineligible(triton, numpy)
    assert (
        said is None
        if works
        else said is not None and said.startswith(f"the interpreter of Triton {triton} needs NumPy below 2.4")
    )


def test_an_interpreter_that_cannot_run_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(backend, "interpreter_ineligible", lambda: interpreter_ineligible("3.6.0", "2.4.6"))
    previous = set_backend("triton")
    try:
        with pytest.raises(ValueError, match=r"^normalise: the interpreter of Triton 3\.6\.0 .* pip install 'numpy<2\.4'"):
            uses_triton("normalise", torch.device("cpu"), None)
    finally:
        set_backend(previous)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, triton, reference, got 'cuda'"):
        set_backend("cuda")  # type: ignore[arg-type]

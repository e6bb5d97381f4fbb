"""The one switch between the Triton kernels and the PyTorch references.

auto (default): Triton for CUDA tensors that the kernel takes, the reference for everything else.
triton: Triton or an error that says why not. Also runs on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).
reference: plain PyTorch everywhere.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal, get_args

import torch
import triton

Backend = Literal["auto", "triton", "reference"]
INTERPRETED: bool = triton.knobs.runtime.interpret

_chosen: Backend = "auto"


def _release(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def interpreter_ineligible(triton_version: str = triton.__version__, numpy_version: str | None = None) -> str | None:
    """Why Triton's interpreter cannot run here; None if it can. Before 3.7 it makes ints of arrays of one element."""
    numpy_version = numpy_version or version("numpy")
    if _release(triton_version) < (3, 7) and _release(numpy_version) >= (2, 4):
        return (
            f"the interpreter of Triton {triton_version} needs NumPy below 2.4, got {numpy_version}: "
            "pip install 'numpy<2.4', or a newer torch"
        )
    return None


def set_backend(backend: Backend) -> Backend:
    """Choose the implementation of all kernels in this process; returns the previous choice. ValueError on other names."""
    global _chosen
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    previous, _chosen = _chosen, backend
    return previous


def uses_triton(op: str, device: torch.device, ineligible: str | None) -> bool:
    """Whether an op runs its Triton kernel.

    Args:
        op: its name, for the message.
        device: of its tensors.
        ineligible: why the kernel cannot take this input; None if it can.

    Returns:
        True for the kernel, False for the reference.

    Raises:
        ValueError: Triton was asked for and cannot run.
    """
    if _chosen != "triton":
        return _chosen == "auto" and device.type == "cuda" and ineligible is None
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(f"{op}: backend 'triton' needs CUDA tensors, got {device}; use set_backend('auto') or 'reference'")
    if device.type != "cuda" and (reason := interpreter_ineligible()) is not None:
        raise ValueError(f"{op}: {reason}")
    if ineligible is not None:
        raise ValueError(f"{op}: backend 'triton' cannot take this input: {ineligible}; use set_backend('auto') or 'reference'")
    return True

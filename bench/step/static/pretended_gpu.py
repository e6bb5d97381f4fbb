"""An H100 that is not there, for Inductor and Triton to generate code for."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import torch

P = ParamSpec("P")
R = TypeVar("R")
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20, gcnArchName="", is_integrated=0, clock_rate=1980000, memory_clock_rate=2619000,
    memory_bus_width=5120,
)  # fmt: skip
"""Device properties as CUDA reports them."""


def in_own_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a process that sees no GPU and has empty caches: pretending to have one cannot be undone.

    Args:
        function: importable by name.
        *args: of the function.
        **kwargs: of the function.

    Returns:
        Its result.
    """
    with TemporaryDirectory() as folder:
        environment = {
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_CACHE_DIR": folder,
            "TRITON_INTERPRET": "0",
        }
        with patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args, **kwargs).result()


class _Guard:
    """In place of torch.cuda.device."""

    def __init__(self, device: object):
        del device

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _Driver:
    """What Triton asks of an active driver."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def is_active(self) -> bool:
        return True


@cache
def pretend_gpu() -> None:
    """Make torch.cuda, Dynamo, Inductor and Triton of this process believe in one H100. Nothing can run on it."""
    from torch._dynamo import device_interface
    from torch._inductor import utils as inductor_utils
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton as triton_utils
    from triton.runtime import driver

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "_lazy_init": None,
        "get_device_properties": H100, "get_device_capability": (H100.major, H100.minor), "get_device_name": H100.name,
        "is_bf16_supported": True, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "current_stream": types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1),
        "synchronize": None, "set_device": None, "mem_get_info": (79 << 30, 80 << 30),
        "_exchange_device": 0, "_maybe_exchange_device": 0, "is_current_stream_capturing": False,
    }  # fmt: skip
    cuda: Any = torch.cuda
    for name, answer in answers.items():
        setattr(cuda, name, _always(answer))
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.device = cuda._DeviceGuard = _Guard

    interface: Any = device_interface.CudaInterface
    same = ("current_device", "device_count", "get_device_properties", "synchronize", "set_device", "is_bf16_supported")
    for name in same:
        setattr(interface, name, staticmethod(getattr(cuda, name)))
    interface.exchange_device = interface.maybe_exchange_device = staticmethod(_always(0))
    interface.device = _Guard
    device_interface.caching_worker_device_properties["cuda"] = [H100]
    device_interface.caching_worker_current_devices["cuda"] = 0
    device_interface.get_registered_device_interfaces()

    driver.set_active(_Driver())
    triton_helpers.set_driver_to_gpu = _always(None)
    for module in (triton_utils, inductor_utils):  # what they found out before
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    for passes in (joint_graph, post_grad):  # they trace their patterns through autograd, which wants a driver for CUDA tensors
        setattr(passes, "lazy_init", _on_cpu(passes.lazy_init))  # noqa: B010
    folder: Any = joint_graph.UniformValueConstantFolder
    folder._deduce_value = _folds_on_cpu(folder._deduce_value)


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _on_cpu(lazy_init: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device=None: lazy_init(torch.device("cpu"))


def _folds_on_cpu(deduce: Callable[..., Any]) -> Callable[..., Any]:
    """Constants are folded with real tensors of one element."""

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        kwargs = node.kwargs
        if "device" in kwargs:
            node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = kwargs

    return deduce_on_cpu

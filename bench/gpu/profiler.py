"""Which kernels a call ran and how long each took, by the profiler; which of them were attention's, and from which backend."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.records import Function

TOP = 20
CLASSES = (
    ("attention", re.compile(r"cudnn.*(sdpa|fprop|bprop)|flash_(fwd|bwd)|fmha|AttentionKernel|mem_eff", re.I)),
    ("compiler's Triton kernels", re.compile(r"^triton_")),
    ("own kernels", re.compile(r"^_(cls_relevance|legrad|counterfactual|masked_fill|normalise|patch_select)\w*")),
    ("matrix products", re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitK", re.I)),
    ("copies and fills of memory", re.compile(r"^Mem(cpy|set)", re.I)),
)
"""Of a kernel's name, the first that matches; the rest is `other`."""
OPERATORS = re.compile(
    r"^aten::_scaled_dot_product_(?:fused_)?(cudnn|flash|efficient)_attention|^aten::_scaled_dot_product_attention_(math)"
)
KERNELS = (("cudnn", re.compile("cudnn", re.I)), ("flash", re.compile("flash", re.I)), ("efficient", re.compile("")))


class Kernel(NamedTuple):
    name: str
    launches: int
    seconds: float


class Profile(NamedTuple):
    """kernels: what the device ran, the longest first. operators: PyTorch's, by number of calls; a replayed CUDA graph has
    none."""

    kernels: tuple[Kernel, ...]
    operators: Counter[str]

    @property
    def seconds(self) -> float:
        """In which the device was busy."""
        return sum(kernel.seconds for kernel in self.kernels)


def profiled(function: Function) -> Profile:
    """Of one call, which should have been made before."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    kernels, operators = [], Counter[str]()
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:
            operators[event.key] += event.count
        elif not event.is_user_annotation:
            kernels.append(Kernel(event.key, event.count, event.self_device_time_total / 1e6))
    return Profile(tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)), operators)


def class_of(name: str) -> str:
    """Of a kernel, by its name."""
    return next((label for label, pattern in CLASSES if pattern.search(name)), "other")


def attention_calls(found: Profile) -> dict[str, int]:
    """Calls of attention, forward and backward, by backend: cudnn, flash, efficient or math. By PyTorch's operators; in a
    replayed CUDA graph by the kernels' names, of which a call may have several."""
    calls = Counter[str]()
    for name, count in found.operators.items():
        if match := OPERATORS.match(name):
            calls[match[1] or match[2]] += count
    if not calls:
        for kernel in found.kernels:
            if class_of(kernel.name) == "attention":
                calls[next(backend for backend, pattern in KERNELS if pattern.search(kernel.name))] += kernel.launches
    return dict(calls)


def attention_of(function: Function) -> dict[str, Any]:
    """The field `attention` of a record: calls by backend, or why the profiler could not tell."""
    try:
        return {"attention": attention_calls(profiled(function))}
    except RuntimeError as error:  # a machine that keeps its counters to itself
        return {"attention": {}, "attention_unknown": str(error)[:200]}


def summary(kernels: Iterable[Kernel]) -> dict[str, dict[str, float]]:
    """Seconds and launches by class of kernel."""
    classes: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        entry = classes.setdefault(class_of(kernel.name), {"seconds": 0.0, "launches": 0})
        entry["seconds"] += kernel.seconds
        entry["launches"] += kernel.launches
    return classes


def top(kernels: Sequence[Kernel], count: int = TOP) -> list[dict[str, Any]]:
    """The longest, for a record."""
    return [
        {"kernel": k.name[:120], "class": class_of(k.name), "launches": k.launches, "seconds": k.seconds}
        for k in kernels[:count]
    ]

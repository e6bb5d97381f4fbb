"""The generated wrapper, run on meta tensors: every launch in its order, its work and bytes, and what lives meanwhile."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.step.memory import LiveStorages
from bench.step.static.generate import Generated
from cammask_fast.kernels import cls_relevance, counterfactual_batch, legrad, masked_fill, normalise, patch_select
from cammask_fast.kernels.launch import Launch

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
MODULES = (cls_relevance, counterfactual_batch, legrad, masked_fill, normalise, patch_select)
"""Whose `run` starts the kernels of our operators."""


class Call(NamedTuple):
    """One call of the wrapper. kind: `triton` (a generated kernel), `product`, `attention`, `ours` (an operator of ours) or
    `aten`. bytes: of its operands and results. launches: of kernels."""

    kind: str
    name: str
    bytes: int
    flops: int = 0
    launches: int = 1


class Replay(NamedTuple):
    """peak: bytes of live storages, the step's inputs among them. at_peak: those storages, largest first, as (label, bytes).
    recomputed: layers of the relevance that were not given the softmax statistics of their attention."""

    calls: list[Call]
    peak: int
    at_peak: list[tuple[str, int]]
    recomputed: int


class _Log(LiveStorages):
    """Logs operators, and follows storages from the first tensor that shows them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.at_peak: Counter[str] = Counter()
        self.recomputed = 0
        self._labels: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not (func._schema.is_mutable or any(t.untyped_storage()._cdata not in known for t in results)):
            return out  # a view
        packet = func.overloadpacket
        namespace, _, name = packet._qualified_op_name.partition("::")
        if name.startswith("empty") or name == "new_empty":
            return out
        counted = flop_registry.get(packet)
        flops = 0 if counted is None else int(counted(*args, **(kwargs or {}), out_val=out))
        size = sum(t.numel() * t.element_size() for t in [*given, *results])
        if namespace == "cammask":
            launches = _launches(func, args)
            self.calls.append(Call("ours", name, sum(map(_launch_bytes, launches)), flops, len(launches)))
            self.recomputed += any(launch.arguments.get("lse_ptr", func) is None for launch in launches)
        else:
            self.calls.append(Call("attention" if "attention" in name else "aten", name, size, flops))
        return out

    def _remember(self, tensor: Tensor, *, counts: bool) -> None:
        storage, before = tensor.untyped_storage(), self.peak
        if storage._cdata not in self._seen:
            self._labels[storage._cdata] = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}", storage.nbytes()
        super()._remember(tensor, counts=counts)
        if self.peak > before:
            self.at_peak = Counter()
            for key in self._seen:
                label, size = self._labels[key]
                self.at_peak[label] += size


def _launches(operator: Any, args: tuple[Any, ...]) -> list[Launch]:
    """The launches of one of our operators, planned but not run."""
    found: list[Launch] = []
    arguments = operator._schema.arguments
    values = [*args, *(argument.default_value for argument in arguments[len(args) :])]
    name = f"launch_{operator._opname}"
    (module,) = (module for module in MODULES if hasattr(module, name))
    with patch.object(module, "run", found.extend):
        getattr(module, name)(**{argument.name: value for argument, value in zip(arguments, values, strict=True)})
    return found


def _launch_bytes(launch: Launch) -> int:
    """Of every tensor that a launch is given, once."""
    tensors = {(t.untyped_storage()._cdata, t.storage_offset()): t for t in launch.arguments.values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Products:
    """In place of Inductor's extern_kernels."""

    def __init__(self, calls: list[Call]):
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in PRODUCTS:
            raise ValueError(f"step --static: the generated code calls extern_kernels.{name}, whose work is not known here")

        def product(*operands: Any, out: Tensor, **_: Any) -> None:
            one, other = [t for t in operands if isinstance(t, Tensor)][-2:]
            flops = 2 * math.prod(one.shape) * other.shape[-1]
            size = sum(t.numel() * t.element_size() for t in (*operands, out) if isinstance(t, Tensor))
            self._calls.append(Call("product", f"{name} {str(one.dtype).removeprefix('torch.')}", size, flops))

        return product


class _Kernel:
    """In place of a compiled Triton kernel."""

    def __init__(self, call: Call, calls: list[Call]):
        self._call, self._calls = call, calls

    def run(self, *_: Any, **__: Any) -> None:
        self._calls.append(self._call)


def replay(generated: Generated) -> Replay:
    """Run the wrapper of a step."""
    log = _Log()
    (runner,) = (node for node in ast.parse(generated.wrapper).body if isinstance(node, ast.ClassDef) and node.name == "Runner")

    def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def reinterpret(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
        return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

    def nothing(*_: Any, **__: Any) -> None: ...

    names: dict[str, Any] = {
        "torch": torch, "aten": torch.ops.aten, "inf": math.inf, "nan": math.nan, "device": torch.device,
        "extern_kernels": _Products(log.calls), "empty_strided_cuda": empty, "reinterpret_tensor": reinterpret,
        "get_raw_stream": lambda _: 0, "copy_if_misaligned": lambda tensor: tensor,
        **dict.fromkeys(("assert_size_stride", "assert_size_stride_grouped", "assert_alignment"), nothing),
        **dict.fromkeys(("assert_tensor_metadata", "run_intermediate_hooks"), nothing),
    }  # fmt: skip
    for kernel in generated.kernels.values():
        names[kernel.name] = _Kernel(Call("triton", kernel.name, kernel.bytes), log.calls)
    exec(compile(ast.Module([runner], type_ignores=[]), "wrapper", "exec"), names)
    with torch.no_grad(), log:
        held = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in generated.inputs]
        out = names["Runner"]([]).call(list(held))
        del out
    return Replay(log.calls, log.peak, log.at_peak.most_common(), log.recomputed)

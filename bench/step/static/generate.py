"""Inductor up to the source: the CUDA code of a step and the bytes that each of its Triton kernels has to move."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from bench.step.static import Case
from bench.step.static.classes import Access, classify
from bench.step.static.pretended_gpu import pretend_gpu
from bench.step.static.trace import cpu_graph, on_cuda
from cammask_fast.inductor_options import inductor_options
from cammask_fast.step import build_strategy


class Kernel(NamedTuple):
    """A distinct Triton kernel. accesses: what one launch loads and stores. kind: one of `classes.KINDS`. ops: the ATen
    operators in it."""

    name: str
    source: str
    accesses: list[Access]
    kind: str
    ops: Counter[str]

    @property
    def bytes(self) -> int:
        return sum(access.bytes for access in self.accesses)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The code of a step. kernels: by name. wrapper: Python that launches them. inputs: (shape, strides, dtype) of the tensors
    that the wrapper takes. square: values of the graph that hold an L x L matrix per head. seconds: by stage."""

    kernels: Mapping[str, Kernel]
    wrapper: str
    inputs: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    square: int
    seconds: Mapping[str, float]


class _Written(Exception):  # noqa: N818  (not an error: the code is written)
    pass


class Traced(NamedTuple):
    """The ATen graph of a step over fake CUDA tensors, and seconds by stage. Inductor rewrites a copy of it."""

    graph: GraphModule
    inputs: list[Any]
    mode: FakeTensorMode
    seconds: dict[str, float]


def traced(case: Case) -> Traced:
    """The graph of a step. From the first call on this process believes in a GPU that is not there: see `in_own_process`."""
    from torch._inductor.decomposition import select_decomp_table

    started = time.perf_counter()
    on_cpu = cpu_graph(case)
    middle = time.perf_counter()
    pretend_gpu()
    graph, inputs, mode = on_cuda(on_cpu, select_decomp_table())
    return Traced(graph, inputs, mode, {"trace": middle - started, "retarget": time.perf_counter() - middle})


def generate(case: Case, trace: Traced | None = None) -> Generated:
    """The code of a step, in a process of its own as `traced` is. trace: of the step, where it is at hand."""
    trace = trace or traced(case)
    graph, inputs, mode, seconds = GraphModule(trace.graph, deepcopy(trace.graph.graph)), *trace[1:3], dict(trace.seconds)
    parameters = max(t.numel() for t in inputs if isinstance(t, Tensor) and t.ndim == 1)
    square, started = square_tensors(graph, case), time.perf_counter()
    wrapper, kernels = _inductor(graph, inputs, mode, inductor_options("default"), parameters)
    seconds["inductor"] = time.perf_counter() - started
    layouts = [(t.shape, t.stride(), t.dtype) for t in inputs]
    return Generated(kernels=kernels, wrapper=wrapper, inputs=layouts, square=square, seconds=seconds)


def square_tensors(graph: GraphModule, case: Case) -> int:
    """Values of the graph, views with a stride of 0 excepted, that hold L x L numbers per head; L: all tokens or the kept."""
    strategy, vit, found = build_strategy(case.config), case.race.vit, 0
    lengths = {vit.patches + 1}
    if strategy is not None and strategy.threshold is None:
        k = strategy.k(vit.patches)
        lengths |= {k + 1, vit.patches - k + 1}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or 0 in value.stride() or value.ndim < 2:
            continue
        is_square = value.shape[-1] == value.shape[-2] and value.shape[-1] in lengths
        found += is_square or value.numel() in {case.batch * vit.heads * length**2 for length in lengths}
    return found


def _inductor(
    graph: GraphModule, inputs: list[Any], mode: Any, options: Mapping[str, Any], parameters: int
) -> tuple[str, dict[str, Kernel]]:
    """The wrapper's source and the kernels by name. options: of Inductor, as torch.compile takes them."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import Placeholder
    from torch._inductor.virtualized import V

    kernels: dict[str, Kernel] = {}
    sources: list[str] = []
    define = TritonScheduling.define_kernel

    def recorded(self: Any, source: str, schedule: Any, kernel: Any, *rest: Any, **named: Any) -> Any:
        name = define(self, source, schedule, kernel, *rest, **named)
        if name not in kernels:
            parts = getattr(kernel, "sub_kernels", None) or [kernel]  # of a kernel that does many equal things at once
            accesses = [access for part in parts for access in _accesses(part)]
            ops = sum((_ops(part) for part in parts), Counter())
            reductions = {op for part in parts for op in _reductions(part)}
            for placeholder in (Placeholder.KERNEL_NAME, Placeholder.DESCRIPTIVE_NAME):
                source = source.replace(str(placeholder), name)
            kernels[name] = Kernel(name, source, accesses, classify(accesses, ops, reductions, parameters), ops)
        return name

    def stop(self: Any) -> None:
        code, _ = self.codegen()
        sources.append(code.value)
        raise _Written

    settings = {
        "compile_threads": 1, "fx_graph_cache": False, "triton.autotune_at_compile_time": False,
        "shape_padding": False,  # chosen by timing
        "triton.unique_kernel_names": True, "triton.descriptive_names": "original_aten", **options,
    }  # fmt: skip
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    with (
        patch.object(TritonScheduling, "define_kernel", recorded),
        patch.object(GraphLowering, "compile_to_module", stop),
        config.patch(settings),
        V.set_fake_mode(mode),
        tracing(TracingContext(mode)),
        torch.no_grad(),
    ):
        try:
            compile_fx.compile_fx_forward(
                graph,
                inputs,
                num_orig_model_outputs=len(output.args[0]),
                num_example_inputs=len(inputs),
                compiler_config_extra=compile_fx.create_compiler_config_extra(config),  # type: ignore[arg-type]
                is_inference=True,
            )
        except Exception:
            if not sources:
                raise
    return sources[0], kernels


def _origin_ops(nodes: Any) -> list[str]:
    return [
        getattr(node.target, "_opname", str(node.target)) for node in nodes if node is not None and node.op == "call_function"
    ]


def _ops(kernel: Any) -> Counter[str]:
    names = [
        name for n in kernel.features.scheduler_nodes() if n.node is not None for name in _origin_ops(n.node.get_origins())
    ]
    return Counter(names)


def _reductions(kernel: Any) -> set[str]:
    """The operators whose reductions a kernel computes, or their kinds where Inductor has split them."""
    reducing = [n.node for n in kernel.features.scheduler_nodes() if n.is_reduction() and n.node is not None]
    whole = [node.get_origin_node() for node in reducing]
    split = [node.data.reduction_type for node, origin in zip(reducing, whole, strict=True) if origin is None]
    return {*_origin_ops(whole), *split}


def _accesses(kernel: Any) -> list[Access]:
    """What one launch loads and stores, each element of a buffer once; a slice of a buffer counts as the slice."""
    from torch._inductor.codegen.common import InplacedBuffer
    from torch._inductor.dependencies import MemoryDep
    from torch._inductor.virtualized import V

    args, nodes = kernel.args, list(kernel.features.scheduler_nodes())
    inplace = {
        name: buffer.inner_name
        for buffer in args.inplace_buffers.values()
        if isinstance(buffer, InplacedBuffer)
        for name in buffer.other_names
    }
    stored = {name for name, inner in args.output_buffers.items() if isinstance(inner, str)} | inplace.keys()
    made_here = {dep.name for node in nodes for dep in node.read_writes.writes} - args.input_buffers.keys()
    slices: dict[tuple[bool, str], dict[str, int]] = {}
    buffers: dict[tuple[bool, str], str] = {}

    def touch(store: bool, buffer: str, dep: Any) -> None:
        whole = int(V.graph.get_numel(dep.name))
        if isinstance(dep, MemoryDep):
            offset = str(dep.index.subs(dict.fromkeys(dep.index.free_symbols, 0)))
            count = min(int(dep.get_numel()), whole)
        else:
            offset, count = "all", whole
        of_buffer = slices.setdefault((store, buffer), {})
        of_buffer[offset] = max(of_buffer.get(offset, 0), count)
        buffers[store, buffer] = dep.name

    for node in nodes:
        for dep in node.read_writes.reads:
            real = V.graph.scheduler.mutation_real_name.get(dep.name, dep.name)
            loaded = dep.name in args.input_buffers or dep.name in inplace
            if loaded and dep.name not in V.graph.removed_buffers and dep.name not in made_here:
                touch(False, real, dep)
        for dep in node.read_writes.writes:
            real = V.graph.scheduler.mutation_real_name.get(dep.name, dep.name)
            if not stored.isdisjoint((dep.name, real)) and dep.name not in V.graph.removed_buffers:
                touch(True, inplace.get(dep.name) or inplace.get(real) or real, dep)
    found = []
    for (store, buffer), counts in slices.items():
        dtype, whole = V.graph.get_dtype(buffers[store, buffer]), int(V.graph.get_numel(buffers[store, buffer]))
        found.append(Access(store, min(sum(counts.values()), whole), whole, dtype))
    return found

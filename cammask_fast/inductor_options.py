"""How Inductor compiles the step, beyond its defaults: passes over the graph that spare arithmetic and memory traffic.

None changes a formula. Equal expressions are computed once; the relevance is given the softmax statistics that attention has
computed; sums of activations are written once, in their own type; bias gradients are summed in the kernel that computes their
terms, and those of a block together. docs/step-static.md has what they are worth.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

aten, prims = torch.ops.aten, torch.ops.prims
PURE = ("aten", "prims", "cammask")
"""Namespaces of the operators that are merged: results depend on the arguments alone, unless tags or the schema say more."""
LOW_PRECISION = (torch.bfloat16, torch.float16)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class MergeEqualNodes(CustomGraphPass):
    """Common-subexpression elimination over an inference graph, which PyTorch runs for training graphs only. The pullbacks of a
    pass recompute the same normalised activations; merged, they are computed and kept once. Stops at the first operator that
    writes to its arguments."""

    def __call__(self, graph: Graph) -> None:
        first: dict[Any, Node] = {}
        for node in _calls(graph):
            if node.target._schema.is_mutable:  # type: ignore[union-attr]
                return
            if not _can_merge(node):
                continue
            leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
            # 1, 1.0 and True are equal, as are 0.0 and -0.0, but they are not the same argument
            same = tuple((type(leaf), repr(leaf) if isinstance(leaf, float) else leaf) for leaf in leaves)
            kept = first.setdefault((node.target, same, structure), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def _can_merge(node: Node) -> bool:
    """Whether an equal node may stand for this one: no random numbers, no memory to be filled, no result of the graph."""
    op: Any = node.target
    is_random = torch.Tag.nondeterministic_seeded in op.tags
    is_result = any(user.op == "output" for user in node.users)
    return op.namespace in PURE and not (is_random or is_result or "empty" in op._opname)


class HandOverLogsumexp(CustomGraphPass):
    """Gives every `cls_relevance` the logsumexp of the attention over the same queries and keys, whose backward keeps it
    anyway: no kernel computes it a second time. Which attention runs is left to PyTorch: flash, memory-efficient, cuDNN's and
    the CPU's return it; where the plain formula was chosen nothing is handed over."""

    def __call__(self, graph: Graph) -> None:
        attentions: dict[tuple[Any, Any], Node] = {}
        for node in _calls(graph):
            if node.target._opname in ATTENTIONS:  # type: ignore[union-attr]
                given = _arguments(node)
                if _is_plain(given):
                    attentions[given["query"], given["key"]] = node
            elif node.target is torch.ops.cammask.cls_relevance.default:
                given = _arguments(node)
                attention = attentions.get((given["q"], given["k"]))
                if given["lse"] is None and attention is not None:
                    with graph.inserting_before(node):
                        given["lse"] = _logsumexp(graph, attention, rows=given["q"].meta["val"].shape[2])
                    node.args, node.kwargs = tuple(given.values()), {}

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


ATTENTIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""PyTorch's fused attentions; the second result is the logsumexp, natural and in float32 (float64 for float64)."""


def _arguments(node: Node) -> dict[str, Any]:
    """Of an operator, by the names and in the order of its schema."""
    op: Any = node.target
    arguments = op._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in arguments}


def _is_plain(given: dict[str, Any]) -> bool:
    """Whether a logsumexp was computed, and is that of softmax(Q K^T / sqrt(d))."""
    masked = given.get("attn_mask") is not None or given.get("attn_bias") is not None or given["is_causal"]
    return given["scale"] is None and not masked and given.get("compute_log_sumexp", True)


def _logsumexp(graph: Graph, attention: Node, *, rows: Any) -> Node:
    """The node of an attention's logsumexp as (N, A, rows): cuDNN's has one more dimension, the efficient one's is padded."""
    lse = _call(graph, operator.getitem, attention, 1)
    found: Tensor = lse.meta["val"]
    if found.ndim == 4:
        lse = _call(graph, aten.squeeze.dim, lse, -1)
    if lse.meta["val"].shape[-1] != rows:
        lse = _call(graph, aten.slice.Tensor, lse, -1, 0, rows)
    return lse


class WriteSumsOnce(CustomGraphPass):
    """Give memory to every activation of a 16-bit type that is a sum or a rounded result and has several readers.

    Inductor inlines a sum of two tensors into each reader, up to four levels deep: a layer norm of the residual stream then
    reads up to five branches, and centred rows are kept in float32 for the backward passes. `as_strided` is an operator whose
    operand Inductor always writes out, and a view without a copy. Shapes must be known: a symbolic batch is left as it is.
    """

    def __call__(self, graph: Graph) -> None:
        for node in _calls(graph):
            value = node.meta.get("val")
            if node.target not in (aten.add.Tensor, prims.convert_element_type.default) or not isinstance(value, Tensor):
                continue
            operands = [argument.meta["val"] for argument in node.args if isinstance(argument, Node)]
            if node.target is aten.add.Tensor:
                made_here = len(operands) == 2 and operands[0].shape == operands[1].shape
            else:
                made_here = operands[0].dtype not in LOW_PRECISION
            is_activation = value.ndim >= 3 and value.dtype in LOW_PRECISION
            known = all(isinstance(size, int) for size in (*value.shape, *value.stride()))
            if not (made_here and is_activation and known and len(node.users) > 1):
                continue
            readers = list(node.users)
            with graph.inserting_after(node):
                written = _call(graph, aten.as_strided.default, node, [*value.shape], [*value.stride()])
            node.replace_all_uses_with(written, readers.__contains__)

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


class SumColumnsInStages(CustomGraphPass):
    """Take the column sums of an activation (N, L, C) over L in float32 first, then over N: the bias gradients of MLP and
    attention.

    Inductor sums over the rows of the view (N * L, C), in a kernel that reads everything again and in a second one that adds
    its parts. A sum over L has the ranges of pointwise operators before it, so that it shares their kernel; what remains is N
    rows, of which `GROUP` sums, as a block has them, are added in one kernel.
    """

    def __call__(self, graph: Graph) -> None:
        found: list[tuple[Node, Node]] = []
        for node in _calls(graph):
            if node.target is not aten.sum.dim_IntList or len(node.args) < 2 or node.args[1] != [0]:
                continue
            view, whole = node.args[0], node.args[0]
            while isinstance(whole, Node) and whole.target in VIEWS:
                whole = whole.args[0]
            if not isinstance(view, Node) or not isinstance(whole, Node) or not isinstance(whole.meta.get("val"), Tensor):
                continue
            rows, value, total = view.meta["val"], whole.meta["val"], node.meta["val"]
            if rows.ndim != 2 or value.ndim != 3 or value.shape[-1] != rows.shape[-1] or total.dtype != value.dtype:
                continue
            wide = torch.promote_types(value.dtype, torch.float32)
            with graph.inserting_before(node):
                found.append((node, _call(graph, aten.sum.dim_IntList, whole, [1], dtype=wide)))
        group: list[tuple[Node, Node]] = []
        for sums in found:
            if group and not _fits(sums, group):
                _sum_together(graph, group)
                group = []
            group.append(sums)
        if group:
            _sum_together(graph, group)

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


GROUP = 4
"""Bias gradients of a block. More would keep the gradients of whole blocks from travelling to other GPUs."""


def _fits(sums: tuple[Node, Node], group: list[tuple[Node, Node]]) -> bool:
    """Whether a sum of as many rows can join a group: its partial sum is there before anything reads the others."""
    new, first = sums[1].meta["val"], group[0][1].meta["val"]
    same = (new.shape[0], new.dtype) == (first.shape[0], first.dtype)
    return len(group) < GROUP and same and all(sums[1] < user for node, _ in group for user in _reads(node)[1])


def _reads(node: Node) -> tuple[list[Node], list[Node]]:
    """What only reshapes or rounds a value, in order, and what reads it then."""
    same, readers, waiting = [], [], list(node.users)
    while waiting:
        user = waiting.pop(0)
        if user.target in (*VIEWS, prims.convert_element_type.default, aten.squeeze.dim, aten.permute.default):
            same.append(user)
            waiting += user.users
        else:
            readers.append(user)
    return same, readers


def _sum_together(graph: Graph, group: list[tuple[Node, Node]]) -> None:
    """Replace column sums by slices of one sum over the rows of all partial sums, (N, C1 + C2 + ...)."""
    sums, partials = zip(*group, strict=True)
    with graph.inserting_before(sums[-1]):
        rows = _call(graph, aten.cat.default, list(partials), 1) if len(partials) > 1 else partials[0]
        summed = _call(graph, aten.sum.dim_IntList, rows, [0])
    first = 0
    for node in sums:
        reshaped, (width, total) = _reads(node)[0], (node.meta["val"].shape[-1], node.meta["val"].dtype)
        with graph.inserting_before(sums[-1]):
            part = summed if len(sums) == 1 else _call(graph, aten.slice.Tensor, summed, 0, first, first + width)
            if part.meta["val"].dtype != total:
                part = _call(graph, prims.convert_element_type.default, part, total)
            if node.meta["val"].ndim == 2:
                part = _call(graph, aten.unsqueeze.default, part, 0)
        node.replace_all_uses_with(part)
        last = part
        for user in reshaped if node is not sums[-1] else ():
            last.append(user)
            last = user
        first += width
    for node in sums:
        graph.erase_node(node)


def _calls(graph: Graph) -> Iterable[Node]:
    return [n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node, with the value that its operands' values give."""
    node = graph.call_function(target, args, kwargs)
    values = pytree.tree_map_only(Node, lambda operand: operand.meta["val"], (args, kwargs))
    node.meta["val"] = target(*values[0], **values[1])
    return node


class StepPasses(CustomGraphPass):
    """Those of the step, in order."""

    def __call__(self, graph: Graph) -> None:
        MergeEqualNodes()(graph)
        HandOverLogsumexp()(graph)
        WriteSumsOnce()(graph)
        SumColumnsInStages()(graph)

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def inductor_options(mode: str) -> dict[str, Any]:
    """Options of torch.compile: those of a mode of it, and the passes of the step."""
    return {**torch._inductor.list_mode_options(mode), "joint_custom_pre_pass": StepPasses()}

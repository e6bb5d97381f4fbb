"""How Inductor compiles the step, beyond its defaults: equal expressions are computed once, and the relevance is given the
softmax statistics that attention has computed."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

PURE = ("aten", "prims", "cammask")
"""Namespaces of the operators that are merged: results depend on the arguments alone, unless tags or the schema say more."""


class MergeEqualNodes(CustomGraphPass):
    """Common-subexpression elimination over an inference graph, which PyTorch runs for training graphs only. The pullbacks of a
    pass recompute the same normalised activations; merged, they are computed and kept once. Stops at the first operator that
    writes to its arguments."""

    def __call__(self, graph: Graph) -> None:
        first: dict[Any, Node] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            if node.target._schema.is_mutable:
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
        for node in list(graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            if node.target._opname in ATTENTIONS:
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

    def added(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        node.meta["val"] = target(*values)
        return node

    lse = added(operator.getitem, attention, 1)
    found: Tensor = lse.meta["val"]
    if found.ndim == 4:
        lse = added(torch.ops.aten.squeeze.dim, lse, -1)
    if lse.meta["val"].shape[-1] != rows:
        lse = added(torch.ops.aten.slice.Tensor, lse, -1, 0, rows)
    return lse


class StepPasses(CustomGraphPass):
    """Those of the step, in order."""

    def __call__(self, graph: Graph) -> None:
        MergeEqualNodes()(graph)
        HandOverLogsumexp()(graph)

    def uuid(self) -> Any:
        """Identifies the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def inductor_options(mode: str) -> dict[str, Any]:
    """Options of torch.compile: those of a mode of it, and the passes of the step."""
    return {**torch._inductor.list_mode_options(mode), "joint_custom_pre_pass": StepPasses()}

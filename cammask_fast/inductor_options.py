"""How Inductor compiles the step, beyond its defaults: equal expressions are computed once."""

from __future__ import annotations

from typing import Any

import torch
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


def inductor_options(mode: str) -> dict[str, Any]:
    """Options of torch.compile: those of a mode of it, and the merging of equal nodes."""
    return {**torch._inductor.list_mode_options(mode), "joint_custom_pre_pass": MergeEqualNodes()}

"""Where a compiled step issues its all-reduces: each as soon as its gradients are there, and all waits after the last product.

Left alone, Inductor may keep the buckets where the source has them, behind the whole backward pass, and wait for each one
next to its launch: its own passes move a collective past its neighbours, but not the copies that fill its bucket.
"""

from __future__ import annotations

from typing import Any

Node = Any
"""Of Inductor's scheduler: one kernel, or several fused ones."""


def overlap_options() -> dict[str, Any]:
    """Options of torch.compile under which Inductor orders a graph's kernels by `overlap_all_reduce`."""
    return {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": [overlap_all_reduce]}


def overlap_all_reduce(nodes: list[Node]) -> list[Node]:
    """Order a graph's kernels so that collectives run beside the products; on any device.

    Kernels that depend on no wait come first, in their order. Of these only the collectives, which keep theirs, and the kernels
    that fill their buckets (casts, sums, copies) move to the earliest place that their inputs allow; products stay, so that
    what they keep alive is what it was. Kernels that depend on a wait come last, in their order: the optimiser's update, which
    needs the norm of all gradients.

    Args:
        nodes: The kernels in an order that can run, as Inductor hands them to `reorder_for_compute_comm_overlap_passes`.

    Returns:
        The same kernels.
    """
    from torch._inductor.utils import contains_collective, contains_wait

    maker = {name: node for node in nodes for name in node.get_buffer_names()}
    needs: dict[Node, set[Node]] = {}
    for node in nodes:  # Inductor keeps collectives in order by fake needs, also of the waits between them
        deps = node.unmet_dependencies
        if contains_collective(node):
            deps = [dep for dep in deps if not getattr(dep, "is_fake", False)]
        needs[node] = {maker[dep.name] for dep in deps if dep.name in maker} - {node}
    late: set[Node] = set()
    for node in nodes:
        if contains_wait(node) or needs[node] & late:
            late.add(node)
    early = [node for node in nodes if node not in late]
    collectives = {node for node in early if contains_collective(node)}
    movable = collectives | _fill_buckets(early, needs, collectives)
    waiting = [node for node in early if node in movable]
    order: dict[Node, None] = {}
    for fixed in (node for node in early if node not in movable):
        order[fixed] = None
        held = False  # behind a collective that is not sent yet: the order is the same on all ranks
        for node in waiting:
            if needs[node] <= order.keys() and not (held and node in collectives):
                order[node] = None
            held = held or (node in collectives and node not in order)
        waiting = [node for node in waiting if node not in order]
    return [*order, *waiting, *(node for node in nodes if node in late)]


def _fill_buckets(early: list[Node], needs: dict[Node, set[Node]], collectives: set[Node]) -> set[Node]:
    """Generated kernels whose results only collectives read, by way of one another or directly."""
    users: dict[Node, set[Node]] = {node: set() for node in early}
    for node in early:
        for needed in needs[node]:
            users[needed].add(node)
    found: set[Node] = set()
    for node in reversed(early):
        if users[node] and users[node] <= collectives | found and not (node.is_extern() or node.is_template()):
            found.add(node)
    return found - collectives

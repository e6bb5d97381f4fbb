"""What processes exchange: sums, gathers, the state of rank 0, a flag, gradients. With one process everything is its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

BUCKET_BYTES = 25 * 2**20

_control_group: Any = None
"""A gloo group for small things on the CPU, beside NCCL's."""


def set_control_group(group: Any) -> None:
    """Use `group` for Python objects and flags."""
    global _control_group
    _control_group = group


def is_initialized() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on every one of them; the tensor itself where there is one process."""
    if is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_stack(tensor: Tensor) -> Tensor:
    """The tensors of all processes, in the order of their ranks: (world size, …)."""
    if not is_initialized():
        return tensor[None]
    out = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out.view(-1, *tensor.shape)


def all_gather_object(item: Any) -> list[Any]:
    """Small picklable things of all processes, in the order of their ranks."""
    if not is_initialized():
        return [item]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, item, group=_control_group)
    return everything


def broadcast_state(saved: tuple[dict[str, Tensor], dict[str, Any]] | None) -> Any:
    """What rank 0 has, on all processes: named tensors on the CPU and what JSON can hold, or None."""
    if not is_initialized():
        return saved
    described = None
    if saved is not None:
        tensors, rest = saved
        described = type(saved), {name: (value.shape, value.dtype) for name, value in tensors.items()}, rest
    box: list[Any] = [described]
    dist.broadcast_object_list(box, src=0, group=_control_group)
    if box[0] is None:
        return None
    kind, shapes, rest = box[0]
    own = saved[0] if saved is not None else {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    for name in shapes:
        dist.broadcast(own[name], src=0, group=_control_group)
    return kind(own, rest)


def check_same_on_all_ranks(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the settings, in a process that was started with others than rank 0."""
    everything = all_gather_object(dict(settings))
    for rank, theirs in enumerate(everything):
        different = [
            f"{name} {theirs.get(name)} instead of {value}"
            for name, value in everything[0].items()
            if theirs.get(name) != value
        ]
        if different:
            raise ValueError(f"rank {rank} was started with other settings than rank 0: {', '.join(different)}")


class AsyncAnyFlag:
    """A flag that any process can raise and that all see raised at the same step.

    A vote is sent at one step and counted at the next, so that no process waits for another, nor the host for the device. A
    process alone sees its flag at once.
    """

    def __init__(self) -> None:
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, raised: bool) -> bool:
        if not is_initialized():
            return raised
        counted = self.count()
        flag = torch.tensor([int(raised)])
        self.pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_control_group, async_op=True), flag
        return counted

    def count(self) -> bool:
        """The votes of the last call, waited for."""
        if self.pending is None:
            return False
        (work, flag), self.pending = self.pending, None
        work.wait()
        return bool(flag)


def sum_gradients(
    gradients: Sequence[Tensor], loss: Tensor, *, bucket_bytes: int = BUCKET_BYTES
) -> tuple[list[Tensor], Tensor]:
    """Sum gradients and a loss over all processes. torch.compile can trace it.

    Gradients travel in flat buckets, those of the last layers first, which a backward pass computes first; all are under way
    before the first is waited for. The loss is in the bucket that is sent last.

    Args:
        gradients: of this process, in the order of the parameters.
        loss: of this process, scalar.
        bucket_bytes: largest size of a bucket with more than one gradient.

    Returns:
        The summed gradients, shaped as given, and the summed loss.
    """
    group, buckets = dist.group.WORLD, in_buckets(gradients, most=bucket_bytes)
    assert group is not None
    flat = [torch.cat([g.flatten() for g in bucket]) for bucket in buckets]
    flat[0] = torch.cat([flat[0], loss.to(flat[0].dtype).view(1)])
    under_way = [functional.all_reduce(bucket, "sum", group) for bucket in reversed(flat)][::-1]
    done = [functional.wait_tensor(bucket) for bucket in under_way]
    total, done[0] = done[0][-1], done[0][:-1]
    parts = [bucket.split([g.numel() for g in like]) for bucket, like in zip(done, buckets, strict=True)]
    return [part.view_as(g) for part, g in zip((p for bucket in parts for p in bucket), gradients, strict=True)], total


def in_buckets(gradients: Sequence[Tensor], *, most: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Consecutive gradients in groups of about `most` bytes."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        if size and size + gradient.nbytes > most:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets

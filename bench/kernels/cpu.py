"""What runs without a GPU: the references against op-by-op PyTorch, in turn in one run: `python -m bench kernels --cpu`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.kernels.op_by_op import counterfactual_op_by_op
from bench.records import cpu_environment, interleaved
from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.viz.tables import markdown_table

THRESHOLD = 0.3
PATCHES = (49, 196)
IMAGES, SIDE = 64, 224
RELEVANCE_IMAGES, HEADS, HEAD_WIDTH = 8, 12, 64
REPEATS = 15


def rollout_op_by_op(relevance: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> Tensor:
    """The CLS row after one layer of the full rollout R += A_bar R, an L x L x L product per image.

    Args:
        relevance: (N, L, L), the rollout of the layers below.
        q: (N, A, L, d).
        k: (N, A, L, d).
        v: (N, A, L, d).
        grad_out: (N, A, L, d).

    Returns:
        (N, L).
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    attended = (torch.softmax(scores, -1) * (grad_out @ v.mT)).clamp(min=0).mean(1)
    return (relevance + torch.bmm(attended, relevance))[:, 0]


@contextmanager
def all_cores() -> Iterator[None]:
    """As many threads as the machine has cores, and the former number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(op: str, ours: Tensor, theirs: Tensor, gold: Tensor) -> None:
    """Check that two providers agree.

    Args:
        op: for the message.
        ours: our result.
        theirs: the other provider's.
        gold: the result in float64.

    Raises:
        ValueError: our error is more than twice the other's and one float32 step.
    """
    error, allowed = (ours.double() - gold).abs().max().item(), (theirs.double() - gold).abs().max().item()
    if not error <= 2 * allowed + torch.finfo(torch.float32).eps * gold.abs().max().item():
        raise ValueError(f"{op}: not timed, the providers disagree (error {error:.2e}, op by op {allowed:.2e})")


def counterfactual_functions(count: int, patches: int, side: int) -> dict[str, Callable[[], Tensor]]:
    """Select, fill and normalise by both formulations, checked against each other.

    Args:
        count: images, N.
        patches: per image, P.
        side: of the images, pixels.

    Returns:
        A function per provider.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    relevance, donors = torch.rand(count, patches, generator=generator), torch.randperm(count, generator=generator)
    functions: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: counterfactual_batch(images, relevance, donors, threshold=THRESHOLD),
        "op-by-op": lambda: counterfactual_op_by_op(images, relevance, donors, THRESHOLD),
    }
    gold = counterfactual_batch(images, relevance, donors, threshold=THRESHOLD, dtype=torch.float64)
    same("counterfactual", functions["reference"](), functions["op-by-op"](), gold)
    return functions


def relevance_functions(count: int, patches: int, heads: int, width: int) -> dict[str, Callable[[], Tensor]]:
    """One layer of the rollout by both formulations, from the identity, checked against each other.

    Args:
        count: images, N.
        patches: per image, P.
        heads: A.
        width: of a head, d.

    Returns:
        A function per provider.
    """
    generator = torch.Generator().manual_seed(0)
    length = patches + 1
    q, k, v, grad = (torch.randn(count, heads, length, width, generator=generator) for _ in range(4))
    row = torch.zeros(count, length)
    row[:, 0] = 1
    square = torch.eye(length).repeat(count, 1, 1)
    functions: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: cls_relevance(row, q, k, v, grad),
        "op-by-op": lambda: rollout_op_by_op(square, q, k, v, grad),
    }
    gold = rollout_op_by_op(square.double(), q.double(), k.double(), v.double(), grad.double())
    same("cls_relevance", functions["reference"](), functions["op-by-op"](), gold)
    return functions


def records(
    *,
    images: int = IMAGES,
    side: int = SIDE,
    patches: Sequence[int] = PATCHES,
    relevance_images: int = RELEVANCE_IMAGES,
    heads: int = HEADS,
    repeats: int = REPEATS,
) -> list[dict[str, Any]]:
    """Time the formulations with all cores.

    Args:
        images: of the counterfactual.
        side: of the images, pixels.
        patches: numbers of patches per image.
        relevance_images: images of the relevance.
        heads: A.
        repeats: timed calls of each function.

    Returns:
        A record per op, provider and number of patches.

    Raises:
        ValueError: the providers disagree.
    """
    found = []
    with all_cores():
        environment = cpu_environment()
        for count in patches:
            jobs = (
                ("counterfactual", images, f"({images}, {side}, {side}, 3)", counterfactual_functions(images, count, side)),
                (
                    "cls_relevance",
                    relevance_images,
                    f"({relevance_images}, {heads}, {count + 1}, {HEAD_WIDTH})",
                    relevance_functions(relevance_images, count, heads, HEAD_WIDTH),
                ),
            )
            for op, batch, shape, functions in jobs:
                for provider, seconds in interleaved(functions, repeats=repeats).items():
                    what = {"op": op, "provider": provider, "mode": "forward", "patches": count, "images": batch}
                    what |= {"shape": shape, "dtype": "float32"}
                    found.append(what | seconds.fields() | environment)
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: milliseconds of both formulations and their ratio."""
    rows = []
    seconds = {(r["op"], r["patches"], r["provider"]): r["seconds_p50"] for r in found}
    for record in found:
        if record["provider"] == "reference":
            ours, theirs = record["seconds_p50"], seconds[record["op"], record["patches"], "op-by-op"]
            names = [record["op"], str(record["patches"]), str(record["images"])]
            rows.append([*names, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{theirs / ours:.1f}x"])
    return markdown_table(["op", "patches", "images", "reference, ms", "op by op, ms", "faster"], rows)

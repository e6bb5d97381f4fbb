"""Whether gradients travel under the backward pass: read off Inductor's code, with no second process and no GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._inductor.graph import GraphLowering

_EVENT = re.compile(
    r"(?P<product>extern_kernels\.(?:mm|addmm|bmm|baddbmm|_int_mm)|(?:triton_tem|cpp)\w*_(?:mm|addmm|bmm)_?\w*\.run)\("
    r"|(?P<all_reduce>_c10d_functional\.all_reduce_?\.default)\(|(?P<wait>_c10d_functional\.wait_tensor\.default)\("
)


class Overlap(NamedTuple):
    """Counts over the calls of a generated graph, in their order."""

    products: int
    all_reduces: int
    products_after_first_all_reduce: int
    waits_before_last_product: int


class _Generated(BaseException):
    """Not an error: carries the code past Inductor's handlers."""


@contextmanager
def two_ranks() -> Iterator[None]:
    """This process as rank 0 of 2 in a process group whose collectives leave tensors as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def generated_code(run: Callable[[], Any]) -> str:
    """The code of the first graph that `run` makes Inductor compile; neither its kernels are built nor is it run."""

    def keep(code: str) -> None:
        raise _Generated(code)

    torch._dynamo.reset()
    with patch.object(GraphLowering, "save_output_code", keep), torch._inductor.config.patch(fx_graph_cache=False):
        try:
            run()
        except _Generated as code:
            return str(code.args[0])
    raise ValueError("generated_code: nothing was compiled by Inductor")


def overlap(code: str) -> Overlap:
    """Count matrix products, all-reduces and waits in generated code."""
    events = [str(match.lastgroup) for match in _EVENT.finditer(code)]
    products = [index for index, event in enumerate(events) if event == "product"]
    sent = [index for index, event in enumerate(events) if event == "all_reduce"]
    last = products[-1] if products else -1
    return Overlap(
        products=len(products),
        all_reduces=len(sent),
        products_after_first_all_reduce=sum(index > sent[0] for index in products) if sent else 0,
        waits_before_last_product=sum(event == "wait" for event in events[: last + 1]),
    )

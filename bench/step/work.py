"""Counted floating-point operations: the same on every machine, with real or fake tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from bench.step.authors import forward
from cammask_fast.model.classifier import Classifier

aten = torch.ops.aten
PRODUCTS = re.compile(r"(mm|mv|dot)(_|$)|matmul|(^|_)linear(_|$)|conv|attention|einsum|cdist|rnn|lstm|gru")
"""What the names of PyTorch's operators have in them that multiply matrices or convolve."""
OF_PYTORCH = ("aten", "prim", "prims", "profiler")
WITHOUT_PRODUCTS = ("cammask::patch_select", "cammask::masked_fill", "cammask::counterfactual_batch", "cammask::normalise")
"""Operators of other libraries than PyTorch's that multiply no matrices."""

if aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:  # torch 2.14 and older count it as nothing

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def _attention_flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q_shape, k_shape, v_shape))

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _attention_backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape))


class UncountedOperator(ValueError):  # noqa: N818  (reads as what happened)
    """An operator multiplies matrices and no formula says how much work that is."""


class _Uncounted(TorchDispatchMode):
    """Names of operators that would count as no work although they may do some: products by their names, and whatever is not
    PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        packet = func.overloadpacket
        full_name = packet._qualified_op_name
        namespace, _, name = full_name.partition("::")
        may_work = bool(PRODUCTS.search(name)) if namespace in OF_PYTORCH else full_name not in WITHOUT_PRODUCTS
        if may_work and packet not in flop_registry:
            self.names.add(full_name)
        return func(*args, **(kwargs or {}))


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of a call, two per multiply-add; what attention recomputes counts.
    Raises UncountedOperator, naming it, where an operator has no formula."""
    with _Uncounted() as uncounted, FlopCounterMode(display=False) as counter:
        function()
    if uncounted.names:
        raise UncountedOperator(f"no formula for the work of {', '.join(sorted(uncounted.names))}: register_flop_formula")
    return int(counter.get_total_flops())


def forward_unit(model: Classifier, images: int) -> int:
    """Operations of one full forward: all tokens in every block, attention materialised."""
    size = model.visual.config.image_size
    with torch.no_grad():
        return count_flops(lambda: forward(model, model.head.weight.new_zeros(images, 3, size, size)))

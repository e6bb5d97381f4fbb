"""PyTorch's attention on its backends at the model's shapes, forward and backward: which one is fastest where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.profiler import attention_of
from bench.gpu.timer import CudaTimer

BATCH, HEAD_WIDTH, COMPARED = 256, 64, 4
BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The default is what the step takes."""


class Shape(NamedTuple):
    """length: tokens. queries: all of them, or the CLS token alone as in the last block."""

    length: int
    heads: int
    queries: int

    def flops(self, batch: int) -> int:
        """Of the forward's two products; the backward has five, of which one is a repetition."""
        return 2 * 2 * batch * self.heads * self.queries * self.length * HEAD_WIDTH


SHAPES = (
    Shape(197, 12, 197),  # ViT-B/16
    Shape(99, 12, 99),  # ViT-B/16, half of the tokens dropped
    Shape(50, 12, 50),  # ViT-B/32
    Shape(257, 16, 257),  # ViT-L/14
    Shape(197, 12, 1),
)


def inputs(shape: Shape, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded q, k and v as views of a packed projection, as in the model.

    Args:
        shape: heads, tokens and queries.
        batch: images, N.
        device: of the tensors.

    Returns:
        bfloat16 (N, A, queries, d), (N, A, L, d) and (N, A, L, d).
    """
    generator = torch.Generator(device).manual_seed(0)
    width = shape.heads * HEAD_WIDTH
    packed = torch.randn(batch, shape.length, 3 * width, generator=generator, device=device).to(torch.bfloat16)
    q, k, v = (part.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
    return q[:, :, : shape.queries], k, v


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Compare the last images with float64.

    Args:
        out: the backend's result, (N, A, queries, d).
        q: (N, A, queries, d).
        k: (N, A, L, d).
        v: (N, A, L, d).

    Returns:
        The relative errors of the backend and of PyTorch's plain formula.

    Raises:
        ValueError: the error is more than twice that of the plain formula in the same dtype.
    """
    q, k, v = (tensor[-COMPARED:] for tensor in (q, k, v))

    def plain(dtype: torch.dtype) -> Tensor:
        queries, keys, values = (tensor.to(dtype) for tensor in (q, k, v))
        return ((queries @ keys.mT * HEAD_WIDTH**-0.5).softmax(-1) @ values).double()

    gold = plain(torch.float64)
    error, allowed = ((found - gold).norm().item() / gold.norm().item() for found in (out[-COMPARED:].double(), plain(q.dtype)))
    if not error <= 2 * allowed:
        raise ValueError(f"wrong output: error {error:.1e} against float64, PyTorch's formula in {q.dtype} has {allowed:.1e}")
    return {"error": error, "error_of_formula": allowed}


def measure(shape: Shape, backend: str, timer: CudaTimer, *, batch: int = BATCH, device: str = "cuda") -> dict[str, Any]:
    """Time one backend on one shape.

    Args:
        shape: heads, tokens and queries.
        backend: key of `BACKENDS`.
        timer: measures calls on the device.
        batch: images.
        device: of the tensors.

    Returns:
        Errors, and seconds and FLOP/s of forward and backward.

    Raises:
        RuntimeError: the backend does not take the shape.
        ValueError: its result is wrong.
    """
    q, k, v = (tensor.requires_grad_() for tensor in inputs(shape, batch, device))
    chosen = BACKENDS[backend]
    gradient = torch.randn_like(q)

    def forward() -> Tensor:
        with nullcontext() if chosen is None else sdpa_kernel([chosen]):
            return F.scaled_dot_product_attention(q, k, v)

    def both() -> Sequence[Tensor]:
        return torch.autograd.grad(forward(), (q, k, v), gradient)

    with torch.no_grad():
        record = {**check(forward(), q, k, v), **attention_of(forward)}
        alone = timer(forward)
    together, flops = timer(both), shape.flops(batch)
    backward = together.seconds.p50 - alone.seconds.p50
    return {
        **record, "forward_seconds": alone.seconds.p50, "backward_seconds": backward, "timing": together.how,
        "calls_per_event_pair": together.calls, "forward_teraflops": flops / alone.seconds.p50 / 1e12,
        "backward_teraflops": 2.5 * flops / backward / 1e12,
    }  # fmt: skip


def run(shapes: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """A record per shape (length, heads, queries) and backend."""
    timer = CudaTimer()
    for shape in (Shape(*sizes) for sizes in shapes):
        for backend in BACKENDS:
            record: dict[str, Any] = {"op": "attention", "provider": backend, "batch": BATCH, **shape._asdict()}
            try:
                record |= measure(shape, backend, timer)
            except ValueError as wrong:
                record["error"] = str(wrong)
            except RuntimeError as error:
                if "CUDA error" in str(error):
                    raise  # the device is lost for this process
                record["unavailable"] = " ".join(str(error).split())[:300]
            yield record

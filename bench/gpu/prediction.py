"""What our compiled step should take on a card, from counted work and the card's own rates: to be judged by the measurement.

    seconds = products / (matrix rate * PRODUCTS) + attention / (matrix rate * ATTENTION) + bytes / (copy rate * TRAFFIC)

The floor is the same with every share at 1. `COUNTED` holds the work of a batch, counted from generated code: Inductor (torch
2.14) made the step's sm_90 code on a machine without a GPU, and the generated wrapper was run on tensors without data: FLOPs of
the matrix products and of attention with the relevance kernels, and the bytes that the Triton kernels read and write, at two
batches each, with a straight line through them. Copies inside libraries' products and attention are not among the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

PRODUCTS, ATTENTION, TRAFFIC = 0.78, 0.20, 0.78
"""Shares of the card's rates that kernels are thought to reach: guesses made before any was measured."""
PROVENANCE = "counted from generated code, torch 2.14"


class Work(NamedTuple):
    """Of one image, and of a step whatever its batch. FLOPs and bytes."""

    products: float
    attention: float
    bytes: float
    bytes_per_step: float


COUNTED: dict[tuple[str, str], Work] = {
    ("ViT-B/16", "masked-object"): Work(249.7e9, 15.47e9, 557.1e6, 4.04e9),
    ("ViT-B/16", "masked-topk"): Work(187.7e9, 11.05e9, 432.7e6, 4.04e9),
    ("ViT-B/32", "masked-object"): Work(64.32e9, 0.996e9, 140.8e6, 4.59e9),
    ("ViT-L/14", "masked-object"): Work(1199e9, 73.9e9, 2007e6, 15.0e9),
}
"""By architecture and method, in bf16, at 64 and 512 images. With one batch counted, bytes per step are taken as proportional
to the parameters: top-k (256 images) and L/14 (128 images; 4 and 8 layers were counted and continued to 24)."""


class Prediction(NamedTuple):
    """Seconds of one step, and of its three terms at the card's full rates."""

    seconds: float
    floor: float
    products: float
    attention: float
    traffic: float

    def fields(self, batch: int) -> dict[str, object]:
        """For a record."""
        return {
            "seconds": self.seconds, "images_per_second": batch / self.seconds, "floor_seconds": self.floor,
            "floor_images_per_second": batch / self.floor, "products_seconds": self.products,
            "attention_seconds": self.attention, "traffic_seconds": self.traffic, "provenance": PROVENANCE,
        }  # fmt: skip


def predict(arch: str, method: str, batch: int, *, matrix_rate: float, copy_rate: float) -> Prediction | None:
    """Predict the time of our compiled step in bf16.

    Args:
        arch: name of the architecture.
        method: key of `METHODS`.
        batch: images.
        matrix_rate: bf16 FLOP/s, as measured on the card.
        copy_rate: bytes/s, read and written, as measured on the card.

    Returns:
        Seconds of the step and its parts; None where its work is not counted.
    """
    work = COUNTED.get((arch, method))
    if work is None:
        return None
    products, attention = batch * work.products / matrix_rate, batch * work.attention / matrix_rate
    traffic = static_bytes(work, batch) / copy_rate
    seconds = products / PRODUCTS + attention / ATTENTION + traffic / TRAFFIC
    return Prediction(seconds, products + attention + traffic, products, attention, traffic)


def static_bytes(work: Work, batch: int) -> float:
    """That the Triton kernels of a step read and write."""
    return work.bytes_per_step + batch * work.bytes

"""The baseline of the race computes what our step computes, with the work that the authors' code does."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.step.authors import build_authors_step, relevance
from bench.step.work import count_flops, forward_unit
from cammask_fast.cam import mm_cam
from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.kernels.reference import normalise, normalise_relevance
from cammask_fast.masking import MaskRandomness
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps, VisionTransformer, ViTConfig
from cammask_fast.step import build_step
from tests.test_step import CONFIGS, batch, draws_for, pair, wrong_gradients

B32 = ViTConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, output_dim=512)
B16 = ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512)
SHARED = [name for name in CONFIGS if name not in ("grad-cam", "late-layers", "bilinear")]
"""The baseline has MM-CAM over all layers and nearest up-sampling, as the authors' code."""


@pytest.mark.parametrize("name", SHARED)
def test_same_losses_and_gradients_as_our_step(name: str) -> None:
    config, data, (student, teacher) = CONFIGS[name], batch(), pair()
    draws = draws_for(config, data)
    theirs = build_authors_step(student, teacher, config)(data, draws)
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    ours = build_step(student, teacher, config)(data, draws)
    assert ours.total.item() == pytest.approx(theirs.total.item(), rel=1e-12)
    assert ours.distill.item() == pytest.approx(theirs.distill.item(), rel=1e-12)
    assert wrong_gradients(student, expected) == {}


def test_same_relevance() -> None:
    student, data = pair()[0], batch()
    pixels = data.images.permute(0, 3, 1, 2).double() / 255
    taps = Taps()
    ours = mm_cam(student(normalise(data.images, dtype=torch.float64), taps=taps).logits, data.labels, taps)
    assert torch.allclose(relevance(student, pixels, data.labels), normalise_relevance(ours), rtol=0, atol=1e-13)


def fake_pair(vit: ViTConfig, *, classes: int = 1000) -> tuple[Classifier, Classifier]:
    """To be called inside FakeTensorMode: shapes only."""
    student = Classifier(VisionTransformer(vit), torch.zeros(classes, vit.output_dim))
    return student, student.frozen_copy()


def forward_units(vit: ViTConfig, config: TrainConfig, *, authors: bool, count: int = 2) -> float:
    """Counted work of one step over that of one full forward of all tokens in every block."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = fake_pair(vit)
        data = Batch(
            torch.zeros(count, vit.image_size, vit.image_size, 3, dtype=torch.uint8),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
        )
        draws = MaskRandomness(donors=torch.zeros(count, dtype=torch.int64))
        step = (build_authors_step if authors else build_step)(student, teacher, config)
        return count_flops(lambda: step(data, draws)) / forward_unit(student, count)


@pytest.mark.parametrize("vit", [B32, B16], ids=["B/32", "B/16"])
def test_the_authors_step_costs_nine_forwards(vit: ViTConfig) -> None:
    units = forward_units(vit, TrainConfig(method="masked-object"), authors=True)
    assert units == pytest.approx(9.0, abs=0.1)


def test_the_authors_feature_distillation_costs_seven_forwards() -> None:
    assert forward_units(B32, TrainConfig(method="ft-fd"), authors=True) == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize(
    ("vit", "method", "masking", "most"),
    [
        (B32, "masked-object", "", 7.5),
        (B16, "masked-object", "", 7.6),
        (B32, "ft", "", 2.85),
        (B16, "ft", "", 2.85),
        (B32, "ft-fd", "", 3.85),
        (B16, "ft-fd", "", 3.85),
        (B16, "masked-topk", "", 5.7),
        (B32, "masked-object", "ObjMaskMultiFill(top=50%)", 7.5),
    ],
)
def test_our_step_does_the_least_work(vit: ViTConfig, method: str, masking: str, most: float) -> None:
    """In forward units; the eager step on a CPU, whose attention backward recomputes the probabilities."""
    config = TrainConfig(method=method, masking=masking)
    assert forward_units(vit, config, authors=False) <= most

"""The baseline of the race computes what our step computes, with the work that the authors' code does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.step import race
from bench.step.authors import build_authors_step, forward, relevance
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
PAPERS = ("mm-cam", 0, "none", "nearest")
SHARED = [n for n, c in CONFIGS.items() if (c.cam, c.cam_start_layer, c.cam_contrast, c.upsample) == PAPERS]
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


class Dispatched(TorchDispatchMode):
    """Every operator that runs, forward and backward, and the types of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        return out


@pytest.mark.parametrize("name", SHARED)
def test_the_baseline_has_no_loop_over_images_and_no_float64(name: str) -> None:
    """It would be slower without more counted work: in float32 all is float32, and eight images take the operators of two."""
    seen = []
    for count in (2, 8):
        student, teacher = (model.float() for model in pair())
        data = batch(count)
        draws = draws_for(CONFIGS[name], data)
        with Dispatched() as dispatched:
            build_authors_step(student, teacher, CONFIGS[name])(data, draws)
        assert torch.float64 not in dispatched.dtypes
        seen.append(Counter(dispatched.operators))
    assert seen[0] == seen[1]
    assert seen[0].total() > 100


def test_the_baselines_cam_forward_is_its_plain_forward() -> None:
    """Keeping the probabilities takes no operator more."""
    student, pixels, kept = pair()[0].float(), torch.rand(2, 3, 12, 12), list[torch.Tensor]()
    with Dispatched() as plain:
        forward(student, pixels)
    with Dispatched() as with_cam:
        forward(student, pixels, attention=kept)
    assert len(kept) == 3
    assert with_cam.operators == plain.operators


@pytest.mark.parametrize(
    ("arch", "method", "megabytes"),
    [("tiny", "masked-object", 21.81), ("tiny", "ft", 11.22), ("ViT-B/16", "masked-object", 2770.8)],
)
def test_the_baselines_activations_are_pinned(arch: str, method: str, megabytes: float) -> None:
    """Of a batch of 8: probabilities kept twice, or in float64, would make its memory, and with it our gain, larger."""
    one = race.Race(arch=arch, config=TrainConfig(method=method), batch=8)
    assert race.counted(one, "authors")["activation_mb"] == pytest.approx(megabytes, rel=0.02)


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

"""The compiled step on a real GPU: no synchronisation, and the losses of the eager step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.state import TrainState
from cammask_fast.step import Losses, build_strategy, build_train_step, sample_step_randomness

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VIT = ViTConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2, output_dim=32)
STEPS, QUIET_FROM = 6, 3
MASKINGS = [
    "ObjMaskSingleFill(0.3)",
    "CtxMaskMultiFill(0.5)",
    "ObjMaskNoFill(top=50%)",
    "ObjMaskNoFill(0.3)",
    "RandMaskNoFill(0.75)",
]


def losses(config: TrainConfig, *, compiled: bool) -> list[Losses]:
    """Of every step; from the fourth on a synchronisation raises."""
    torch.manual_seed(0)
    teacher = Classifier(VisionTransformer(VIT), torch.randn(10, 32)).cuda().frozen_copy()
    state = TrainState.create(teacher.frozen_copy().train(), config, steps_per_epoch=STEPS, compiled=compiled)
    step, strategy, found = build_train_step(state, teacher, config), build_strategy(config), []
    data = Batch(torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8), torch.arange(8), torch.arange(8)).to("cuda")
    for number in range(STEPS):
        torch.cuda.set_sync_debug_mode("error" if number >= QUIET_FROM else "default")
        try:
            found.append(step([(data, sample_step_randomness(strategy, data, VIT.patches, state.generator))]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [Losses(*(part.clone() for part in one)) for one in found]


@pytest.mark.parametrize("masking", MASKINGS)
def test_no_synchronisation_and_the_losses_of_the_eager_step(masking: str) -> None:
    config = TrainConfig(masking=masking, epochs=1, precision="fp32", optim=OptimConfig(lr=1e-4))
    for ours, eager in zip(losses(config, compiled=True), losses(config, compiled=False), strict=True):
        assert ours.total.item() == pytest.approx(eager.total.item(), rel=1e-3)
    in_bf16 = losses(replace(config, precision="bf16"), compiled=True)
    assert all(one.total.isfinite() for one in in_bf16)

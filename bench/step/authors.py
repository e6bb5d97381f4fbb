"""The authors' training step as an algorithm, written from the mathematics: the baseline of the race.

float32, attention probabilities materialised in every layer, the rollout as products of (L, L) matrices, all tokens in the last
block, one clean forward for the CAM and another one for the task, filled images by resize, clone, full-index gather and where.
No loop over images or heads. Parameters are those of a `Classifier`, so gradients can be compared by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.losses import feature_distillation, logit_distillation
from cammask_fast.masking import MaskRandomness, Strategy
from cammask_fast.model.classifier import Classifier, Prediction
from cammask_fast.model.vit import Block
from cammask_fast.step import Losses, build_strategy


def forward(
    model: Classifier,
    pixels: Tensor,
    *,
    key_mask: Tensor | None = None,
    kept_tokens: Tensor | None = None,
    attention: list[Tensor] | None = None,
) -> Prediction:
    """The authors' forward: all tokens in all blocks.

    Args:
        model: the classifier.
        pixels: (N, 3, H, W) in [0, 1].
        key_mask: bool (N, P), True = no query may attend to that patch.
        kept_tokens: int64 (N, n_keep + 1), the tokens to keep.
        attention: filled with the (N, A, L, L) probabilities.

    Returns:
        Features and logits.
    """
    visual = model.visual
    mean, std = (torch.tensor(c, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    x = visual.conv1((pixels - mean) / std).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)  # (N, L, D)
    if kept_tokens is not None:
        x = x.gather(1, kept_tokens[..., None].expand(-1, -1, x.shape[-1]))
    for block in visual.transformer.resblocks:
        assert isinstance(block, Block)
        x = x + _attend(block, block.ln_1(x), key_mask, attention)
        hidden = block.mlp.c_fc(block.ln_2(x))
        quick = visual.config.activation == "quick_gelu"
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden))
    features = visual.ln_post(x[:, 0]) @ visual.proj
    return Prediction(features, model.head(F.normalize(features, dim=-1)))


def _attend(block: Block, x: Tensor, key_mask: Tensor | None, attention: list[Tensor] | None) -> Tensor:
    attn = block.attn
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (N, A, L, d)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(F.pad(key_mask, (1, 0))[:, None, None, :], -torch.inf)
    probabilities = scores.softmax(-1)  # (N, A, L, L)
    if attention is not None:
        attention.append(probabilities)
    return attn.out_proj((probabilities @ v).transpose(1, 2).flatten(2))


def relevance(model: Classifier, pixels: Tensor, labels: Tensor) -> Tensor:
    """MM-CAM by the rollout R += mean over heads of relu(P * dP) R over all layers.

    Args:
        model: the classifier.
        pixels: (N, 3, H, W) in [0, 1].
        labels: int64 (N,).

    Returns:
        (N, P), divided by its maximum.
    """
    attention: list[Tensor] = []
    logits = forward(model, pixels, attention=attention).logits
    gradients = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), attention)
    with torch.no_grad():
        length = attention[0].shape[-1]
        rollout = torch.eye(length, dtype=pixels.dtype, device=pixels.device).expand(len(pixels), length, length)
        for probabilities, gradient in zip(attention, gradients, strict=True):
            rollout = rollout + (probabilities * gradient).clamp(min=0).mean(1) @ rollout
        cam = rollout[:, 0, 1:]
        return cam / (cam.amax(1, keepdim=True) + 1e-8)


def fill(pixels: Tensor, mask_NP: Tensor, donors: Tensor) -> Tensor:
    """The authors' fill: resize the mask, clone, gather along the batch with a full index, where.

    Args:
        pixels: (N, 3, H, W).
        mask_NP: bool (N, P), True = filled.
        donors: int64 (N,) or (N, P).

    Returns:
        (N, 3, H, W).
    """
    count, _, height, width = pixels.shape
    grid = round(mask_NP.shape[1] ** 0.5)
    mask = F.interpolate(mask_NP.view(count, 1, grid, grid).to(pixels.dtype), size=(height, width)) > 0.5
    per_patch = donors.view(count, 1).expand(mask_NP.shape) if donors.ndim == 1 else donors
    index = F.interpolate(per_patch.reshape(count, 1, grid, grid).to(pixels.dtype), size=(height, width)).long()
    filling = pixels.clone().gather(0, index.expand(count, 3, height, width))
    return torch.where(mask, filling, pixels)


def patch_mask(strategy: Strategy, cam: Tensor | None, draws: MaskRandomness, patches: int) -> Tensor:
    """The patches that a strategy masks.

    Args:
        strategy: which patches are masked.
        cam: (N, P), divided by its maximum; None for random masks.
        draws: random numbers of the batch.
        patches: per image, P.

    Returns:
        bool (N, P), True = masked.
    """
    if strategy.selection == "random":
        assert draws.uniform is not None
        assert strategy.threshold is not None
        return draws.uniform < strategy.threshold
    assert cam is not None
    if strategy.threshold is not None:
        mask = cam > strategy.threshold
    else:
        order = cam.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(cam, dtype=torch.bool).scatter(1, order[:, : strategy.k(patches)], True)
    return ~mask if strategy.selection == "context" else mask


plain_forward = forward
Step = Callable[[Batch, MaskRandomness | None], Losses]


def build_authors_step(student: Classifier, teacher: Classifier, config: TrainConfig, *, compiled: bool = False) -> Step:
    """The authors' step of FT, FT_FD / FT_KD and every masked distillation.

    No-fill masks keys over all tokens, as the authors do; random no-fill drops tokens.

    Args:
        student: its gradients are added to `.grad`.
        teacher: frozen.
        config: settings of the method.
        compiled: compile the forwards of the task, the teacher and the masked student; that of the CAM stays eager, because
            gradients at the attention maps of a compiled forward cannot be had.

    Returns:
        A function of a batch and its random numbers.
    """
    strategy, patches = build_strategy(config), student.visual.config.patches
    forward: Callable[..., Prediction] = torch.compile(plain_forward) if compiled else plain_forward

    def step(batch: Batch, draws: MaskRandomness | None) -> Losses:
        pixels = batch.images.permute(0, 3, 1, 2).to(student.head.weight.dtype) / 255
        shown, key_mask, kept_tokens = pixels, None, None
        if strategy is not None:
            assert draws is not None
            cam = relevance(student, pixels, batch.labels) if strategy.needs_cam else None
            if strategy.selection == "random" and strategy.fill == "none":
                kept_tokens = draws.kept_tokens
            elif strategy.fill == "none":
                key_mask = patch_mask(strategy, cam, draws, patches)
            else:
                assert draws.donors is not None
                shown = fill(pixels, patch_mask(strategy, cam, draws, patches), draws.donors)
        task = F.cross_entropy(forward(student, pixels).logits, batch.labels)
        if config.resolved.distill == "none":
            (config.w_task * task).backward()
            return Losses.of(config.w_task * task, task, torch.zeros_like(task))
        with torch.no_grad():
            theirs = forward(teacher, shown, key_mask=key_mask, kept_tokens=kept_tokens)
        ours = forward(student, shown, key_mask=key_mask, kept_tokens=kept_tokens)
        if config.resolved.distill == "fd":
            distill = feature_distillation(ours.features, theirs.features)
        else:
            distill = logit_distillation(ours.logits, theirs.logits, temperature=config.kd_temperature)
        total = config.w_task * task + config.w_distill * distill
        total.backward()
        return Losses.of(total, task, distill)

    return step

"""Our eager step with one identity switched off at a time, so that the gain of each can be seen.

The step here is written in the bench's own words from the same pieces; with nothing switched off it does the work of the real
one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.step import authors
from cammask_fast.cam import class_score, cls_rollout
from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.losses import feature_distillation
from cammask_fast.masking import MaskRandomness, masked_input
from cammask_fast.model.classifier import Classifier, Prediction
from cammask_fast.model.vit import Block, Taps
from cammask_fast.precision import compute_dtype
from cammask_fast.step import Losses, build_strategy


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The identities; all on is our step."""

    shared_forward: bool = True
    """One clean forward serves the CAM and the task loss."""
    cls_last_block: bool = True
    """The last block at the CLS token only."""
    fused_attention: bool = True
    """Attention probabilities are never kept."""
    cls_row: bool = True
    """The rollout as vector-matrix products of the CLS row; off: (L, L) matrices, which need the probabilities."""
    fused_fill: bool = True
    """Selection, fill and normalisation in one pass over the pixels."""
    early_backward: bool = True
    """The clean backward runs before the masked forward: one graph lives at a time."""


ABLATIONS = {
    "without-shared-forward": Switches(shared_forward=False),
    "without-cls-last-block": Switches(cls_last_block=False),
    "without-fused-attention": Switches(fused_attention=False),
    "without-cls-row": Switches(fused_attention=False, cls_row=False),
    "without-fused-fill": Switches(fused_fill=False),
    "without-early-backward": Switches(early_backward=False),
}
"""`without-cls-row` has materialised attention too: the (L, L) rollout reads it; compare it with `without-fused-attention`."""


def forward(
    model: Classifier,
    patches: Tensor,
    switches: Switches,
    *,
    kept_tokens: Tensor | None = None,
    taps: Taps | None = None,
    probabilities: list[Tensor] | None = None,
) -> Prediction:
    """The forward with some of its savings switched off.

    Args:
        model: the classifier.
        patches: normalised, (N, P, 3 * p * p).
        switches: which savings are on.
        kept_tokens: see `VisionTransformer.forward`.
        taps: see `VisionTransformer.forward`.
        probabilities: filled with the (N, A, L, L) attention probabilities.

    Returns:
        Features and logits.
    """
    visual = model.visual
    x = F.linear(patches, visual.conv1.weight.flatten(1))
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    if kept_tokens is not None:
        x = x.gather(1, kept_tokens[..., None].expand(-1, -1, x.shape[-1]))
    last = len(visual.transformer.resblocks) - 1
    for layer, block in enumerate(visual.transformer.resblocks):
        assert isinstance(block, Block)
        cls_only = switches.cls_last_block and layer == last
        if switches.fused_attention:
            x = block(x, key_mask=None, cls_only=cls_only, taps=taps)
        else:
            x = _materialised(block, x, cls_only, taps, probabilities)
    features = visual.ln_post(x[:, 0]) @ visual.proj
    return Prediction(features, model.head(F.normalize(features, dim=-1)))


def _materialised(block: Block, x: Tensor, cls_only: bool, taps: Taps | None, probabilities: list[Tensor] | None) -> Tensor:
    attn, normed = block.attn, block.ln_1(x)
    width = x.shape[-1]
    weights, biases = attn.in_proj_weight.split([width, 2 * width]), attn.in_proj_bias.split([width, 2 * width])
    q = F.linear(normed[:, :1] if cls_only else normed, weights[0], biases[0])
    k, v = F.linear(normed, weights[1], biases[1]).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    kept = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    out = kept @ v
    if taps is not None:
        taps.queries.append(q)
        taps.keys.append(k)
        taps.values.append(v)
        taps.outputs.append(out)
    if probabilities is not None:
        probabilities.append(kept)
    x = (x[:, :1] if cls_only else x) + attn.out_proj(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


def build_ablated_step(student: Classifier, teacher: Classifier, config: TrainConfig, switches: Switches) -> authors.Step:
    """The step of a masked feature distillation, with some of its savings switched off.

    Args:
        student: its gradients are added to `.grad`.
        teacher: frozen.
        config: settings of the method.
        switches: which savings are on.

    Returns:
        A function of a batch and its random numbers.

    Raises:
        ValueError: for another method, no-fill by threshold, or a compute dtype that is not that of the weights.
    """
    strategy, vit = build_strategy(config), student.visual.config
    if strategy is None or config.resolved.distill != "fd" or not strategy.needs_cam:
        raise ValueError("ablations: expected a feature distillation with an object or context mask")
    if strategy.fill == "none" and strategy.threshold is not None:
        raise ValueError("ablations: no-fill by threshold has none")
    if compute_dtype(config.precision, student.head.weight) != student.head.weight.dtype:
        raise ValueError("ablations: products are in the type of the weights; use --precision fp32 or tf32")

    def relevance(images: Tensor, labels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The map, and the logits, whose graph is alive with a shared forward."""
        taps = Taps()
        probabilities: list[Tensor] | None = None if switches.cls_row else []
        one = switches if switches.cls_row else replace(switches, cls_last_block=False)
        logits = forward(student, patches, one, taps=taps, probabilities=probabilities).logits
        if probabilities is None:
            gradients = torch.autograd.grad(class_score(logits, labels), taps.outputs, retain_graph=switches.shared_forward)
            with torch.no_grad():
                return cls_rollout(taps, gradients), logits
        gradients = torch.autograd.grad(class_score(logits, labels), probabilities, retain_graph=switches.shared_forward)
        with torch.no_grad():
            length = vit.patches + 1
            rollout = torch.eye(length, dtype=patches.dtype, device=patches.device).expand(len(images), length, length)
            for kept, gradient in zip(probabilities, gradients, strict=True):
                rollout = rollout + (kept * gradient).clamp(min=0).mean(1) @ rollout
            return rollout[:, 0, 1:].contiguous(), logits

    def shown(images: Tensor, cam: Tensor, draws: MaskRandomness, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        if switches.fused_fill or strategy.fill == "none":
            masked = masked_input(images, cam, strategy, draws, grid=vit.grid, dtype=patches.dtype, layout="patches")
            return patches if masked.pixels is None else masked.pixels, masked.kept_tokens
        assert draws.donors is not None
        pixels = images.permute(0, 3, 1, 2).to(patches.dtype) / 255
        mask = authors.patch_mask(strategy, normalise_relevance(cam), draws, vit.patches)
        filled = authors.fill(pixels, mask, draws.donors)
        return normalise(filled, dtype=patches.dtype, layout="patches", patch_size=vit.patch_size), None

    def step(batch: Batch, draws: MaskRandomness | None) -> Losses:
        assert draws is not None
        patches = normalise(batch.images, dtype=student.head.weight.dtype, layout="patches", patch_size=vit.patch_size)
        cam, logits = relevance(batch.images, batch.labels, patches)
        if not switches.shared_forward:
            del logits
            logits = forward(student, patches, switches).logits
        task = F.cross_entropy(logits, batch.labels)
        if switches.early_backward:
            (config.w_task * task).backward()
            task = task.detach()
        del logits
        seen, kept_tokens = shown(batch.images, cam, draws, patches)
        with torch.no_grad():
            theirs = forward(teacher, seen, switches, kept_tokens=kept_tokens)
        ours = forward(student, seen, switches, kept_tokens=kept_tokens)
        distill = feature_distillation(ours.features, theirs.features)
        rest = config.w_distill * distill
        (rest if switches.early_backward else rest + config.w_task * task).backward()
        task, distill = task.detach(), distill.detach()
        return Losses.of(config.w_task * task + config.w_distill * distill, task, distill)

    return step

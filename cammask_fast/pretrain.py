"""Contrastive pre-training of the tiny CLIP on the benchmark's web split: how the shipped weights were made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch.nn.utils import clip_grad_norm_

from cammask_fast.config import OptimConfig
from cammask_fast.data.batch import ArrayLoader
from cammask_fast.data.texture_digits import Split, captions, draw, render
from cammask_fast.kernels.reference.masked_fill import normalise
from cammask_fast.model.tiny_clip import build_tiny_clip, tokenizer
from cammask_fast.optim import build_optimizer, build_schedule


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """`cammask pretrain`'s settings; the defaults made the shipped weights."""

    images: int = 24_000
    epochs: int = 12
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    outlined: float = 0.08
    """Share of the web that has the downstream look."""
    sketched: float = 0.10


def web_split(config: PretrainConfig) -> Split:
    """The pre-training images: every background, mostly solid bright strokes."""
    return Split(
        name="web", images=config.images, seed=config.seed, scans="web", placement="any",
        outlined=config.outlined, sketched=config.sketched,
    )  # fmt: skip


def contrastive_loss(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross entropy. Features (N, E), normalised; logit_scale is the factor, not its logarithm."""
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(config: PretrainConfig, *, progress: Callable[[str], None]) -> CLIP:
    """Train a tiny CLIP from scratch; the same seed and thread count give the same weights."""
    torch.manual_seed(config.seed)
    clip = build_tiny_clip()
    scenes = draw(web_split(config))
    tokens = tokenizer()(captions(scenes))
    loader = ArrayLoader(
        render(scenes), torch.from_numpy(scenes.labels), batch_size=config.batch_size, shuffle=True, seed=config.seed
    )
    optim = OptimConfig(lr=config.lr, pct_start=0.1)
    optimizer = build_optimizer(clip.parameters(), optim)
    schedule = build_schedule(optimizer, optim, total_steps=config.epochs * len(loader))
    started = time.perf_counter()
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        total = torch.zeros(())
        for batch in loader:
            image_features = F.normalize(clip.visual(normalise(batch.images)), dim=-1)
            text_features = clip.encode_text(tokens[batch.sample_ids], normalize=True)
            loss = contrastive_loss(image_features, text_features, clip.logit_scale.exp())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_grad_norm_(clip.parameters(), optim.clip_norm)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(max=4.6052)  # CLIP caps the scale at 100
            total += loss.detach()
        seconds = time.perf_counter() - started
        progress(f"epoch {epoch + 1}/{config.epochs}  loss {total.item() / len(loader):.3f}  {seconds:.0f} s")
    return clip.eval()

"""Contrastive pre-training of the tiny CLIP on the benchmark's web split: how the shipped weights were made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_

from cammask_fast import __version__
from cammask_fast.config import OptimConfig
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, TEMPLATES, Split, captions, render, sample_scenes
from cammask_fast.data.datasets.texture_digits_splits import evaluation_splits, rendered
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.evaluate import accuracy
from cammask_fast.kernels.reference.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.tiny_clip import build_tiny_clip, tokenizer
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.model.zero_shot import TINY_WEIGHTS, zero_shot_weights
from cammask_fast.optim import build_optimizer, build_schedule


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """`cammask pretrain`'s settings; the defaults made the shipped weights."""

    images: int = 24_000
    epochs: int = 14
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    outlined: float = 0.04
    """Share of the web that has the downstream look."""
    sketched: float = 0.10


def web_split(config: PretrainConfig) -> Split:
    """The pre-training images: every background, mostly solid bright strokes."""
    return Split(
        name="web", images=config.images, seed=config.seed, scans="web", placement="any",
        outlined=config.outlined, sketched=config.sketched,
    )  # fmt: skip


def contrastive_loss(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy.

    Args:
        image_features: (N, E), normalised.
        text_features: (N, E), normalised; row n belongs to image n.
        logit_scale: the factor, not its logarithm.

    Returns:
        Scalar, differentiable.
    """
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(config: PretrainConfig, *, progress: Callable[[str], None]) -> CLIP:
    """Train a tiny CLIP from scratch; the same seed and thread count give the same weights."""
    torch.manual_seed(config.seed)
    clip = build_tiny_clip()
    scenes = sample_scenes(web_split(config))
    tokens = tokenizer()(captions(scenes))
    loader = ArrayLoader(
        render(scenes),
        torch.from_numpy(scenes.labels),
        ResumableDistributedSampler(len(render(scenes)), batch_size=config.batch_size, shuffle=True, seed=config.seed),
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


def zero_shot_accuracies(clip: CLIP) -> dict[str, float]:
    """Zero-shot accuracy in percent on held-out web images and on the downstream evaluation sets."""
    assert isinstance(clip.visual, VisionTransformer)
    model = Classifier(clip.visual, zero_shot_weights(clip, tokenizer(), CLASS_NAMES, TEMPLATES)).eval()
    web = replace(web_split(PretrainConfig()), name="web-test", images=2000, scans="test")
    images, labels = rendered(web)
    loaders = {
        "web": ArrayLoader(images, labels, ResumableDistributedSampler(len(images), batch_size=500)),
        **evaluation_splits(),
    }
    return {name: round(accuracy(model, loader), 2) for name, loader in loaders.items()}


def save_pretrained(folder: Path, clip: CLIP, config: PretrainConfig, *, command: str) -> dict[str, float]:
    """Write tiny_clip.safetensors (half precision) and tiny_clip.json, its provenance.

    Args:
        folder: created when it is missing.
        clip: the trained model; its weights are rounded to half precision.
        config: settings of the pre-training.
        command: that made it, for the provenance.

    Returns:
        Zero-shot accuracies of the rounded weights in percent, by evaluation set.

    Raises:
        ValueError: the folder cannot be written.
    """
    halves = {name: value.detach().half().contiguous() for name, value in clip.state_dict().items()}
    clip.load_state_dict({name: value.float() for name, value in halves.items()})
    scores = zero_shot_accuracies(clip)
    provenance = {
        "command": command,
        "config": asdict(config),
        "data": {"split": asdict(web_split(config)), "draws_sha256": sample_scenes(web_split(config)).digest()},
        "zero_shot_accuracy": scores,
        "class_names": CLASS_NAMES,
        "templates": TEMPLATES,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__, "cammask_fast": __version__},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(halves, folder / TINY_WEIGHTS, {"quick_gelu": "true"})
        (folder / "tiny_clip.json").write_text(json.dumps(provenance, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from None
    return scores

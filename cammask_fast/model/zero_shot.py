"""The zero-shot head from class names and prompt templates, and the shipped tiny CLIP as a classifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cammask_fast.data.datasets.texture_digits import TEMPLATES
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.files import load_exactly, read_safetensors
from cammask_fast.model.templates import template_fault
from cammask_fast.model.tiny_clip import TINY_VIT, build_tiny_clip, tokenizer
from cammask_fast.model.vit import VisionTransformer

if TYPE_CHECKING:
    from open_clip.model import CLIP

TINY_WEIGHTS = "tiny_clip.safetensors"
PROMPTS_IN_MEMORY = 8192
"""Prompts, of whole classes, that are tokenised and sorted by length at a time."""
TOKENS_OF_A_BATCH = {"cpu": 2**12, "cuda": 2**17}
"""Tokens of one forward of the text tower, by kind of device."""

Progress = Callable[[int, int], None]
"""Called with the prompts done and in total."""


@torch.no_grad()
def zero_shot_weights(
    clip: CLIP,
    tokenize: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Head weights, exp(logit_scale) included: per class the mean over templates of the normalised text embeddings, normalised
    again.

    Args:
        clip: both towers; its text tower is moved to the device and back.
        tokenize: texts to int64 (n, context length).
        class_names: K names.
        templates: format strings with one `{}`.
        device: where the text tower runs.
        progress: called while prompts are embedded.

    Returns:
        float32 (K, E), on the CPU.

    Raises:
        ValueError: no classes, or a template without a `{}` for the name.
    """
    if not class_names or not templates:
        raise ValueError("class names and templates: expected at least one of each")
    for template in templates:
        fault = template_fault(template)
        if fault:
            raise ValueError(f"prompt template {template!r}: {fault}")
    visual, home = clip.visual, clip.logit_scale.device
    del clip.visual  # it need not travel
    try:
        clip.to(device)
        rows, per_block, total = [], max(1, PROMPTS_IN_MEMORY // len(templates)), len(class_names) * len(templates)
        for first in range(0, len(class_names), per_block):
            names = class_names[first : first + per_block]
            tokens = tokenize([template.format(name) for name in names for template in templates])
            after_others = None if progress is None else partial(_progress_after, progress, first * len(templates), total)
            embedded = encode_texts(clip, tokens, after_others)
            rows.append(F.normalize(embedded.view(len(names), len(templates), -1).mean(1), dim=-1).cpu())
        return torch.cat(rows) * clip.logit_scale.exp().float().cpu()
    finally:
        clip.visual = visual
        clip.to(home)


def _progress_after(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def encode_texts(clip: CLIP, tokens: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
    """The text tower's normalised embeddings of texts.

    In a tower with causal attention, as in OpenAI's and open_clip's CLIPs, nothing behind a text's end changes its embedding.
    So texts of similar length run together, cut off behind the longest: a fifth of the work for prompts of 15 tokens in a
    context of 77.

    Args:
        clip: its text tower is used.
        tokens: int64 (n, context length), on the CPU.
        progress: called with the number of texts that are done.

    Returns:
        float32 (n, E), on the tower's device.
    """
    device, lengths = clip.logit_scale.device, tokens.argmax(1) + 1
    if not _can_be_cut(clip):
        lengths = torch.full_like(lengths, tokens.shape[1])
    lengths, order = lengths.sort(stable=True)
    budget = TOKENS_OF_A_BATCH["cuda" if device.type == "cuda" else "cpu"]
    found, done = torch.empty(0), 0
    while done < len(tokens):
        rest = lengths[done : done + budget]
        count = max(1, int((rest * torch.arange(1, len(rest) + 1) <= budget).sum()))  # padded to the longest of the batch
        chosen = order[done : done + count]
        part = tokens[chosen, : int(rest[count - 1])].to(device)
        embedded = F.normalize(_encode(clip, part).float(), dim=-1)
        if not done:
            found = embedded.new_empty(len(tokens), embedded.shape[1])
        found[chosen.to(device)] = embedded
        done += count
        if progress is not None:
            progress(done)
    return found


def _can_be_cut(clip: CLIP) -> bool:
    """Whether texts may be cut off behind their last token: causal attention, and the embedding is that of the end's token."""
    mask = clip.attn_mask
    if clip.text_pool_type != "argmax" or mask is None:
        return False
    return torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))


def _encode(clip: CLIP, tokens: Tensor) -> Tensor:
    """open_clip's `encode_text` for tokens (n, L) that may be fewer than the context."""
    length = tokens.shape[1]
    if length == len(clip.positional_embedding):
        return clip.encode_text(tokens)
    dtype = clip.transformer.get_cast_dtype()
    x = clip.token_embedding(tokens).to(dtype) + clip.positional_embedding[:length].to(dtype)
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    ends = x[torch.arange(len(x), device=x.device), tokens.argmax(1)]
    projection = clip.text_projection
    if projection is None:
        return ends
    return projection(ends) if isinstance(projection, torch.nn.Linear) else ends @ projection


def load_tiny_clip() -> CLIP:
    """The shipped two-tower CLIP in float32, evaluation mode."""
    clip = build_tiny_clip()
    with as_file(files("cammask_fast.assets").joinpath(TINY_WEIGHTS)) as path:
        weights, _ = read_safetensors(path)
        load_exactly(clip, {name: value.float() for name, value in weights.items()}, path)
    return clip.eval()


def load_tiny_tower() -> tuple[VisionTransformer, str]:
    """The shipped image tower alone, in float32 and evaluation mode, and a digest of the weights of both towers."""
    with as_file(files("cammask_fast.assets").joinpath(TINY_WEIGHTS)) as path:
        weights, _ = read_safetensors(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        visual = VisionTransformer(TINY_VIT)
        own = {name.removeprefix("visual."): value.float() for name, value in weights.items() if name.startswith("visual.")}
        load_exactly(visual, own, path)
    return visual.eval(), digest


def tiny_provenance() -> dict[str, Any]:
    """Command, seed, data hash, versions and zero-shot accuracies of the shipped weights."""
    return json.loads(files("cammask_fast.assets").joinpath("tiny_clip.json").read_text())


def tiny_classifier(class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Classifier:
    """The shipped CLIP as a zero-shot classifier over `class_names`."""
    clip = load_tiny_clip()
    assert isinstance(clip.visual, VisionTransformer)
    return Classifier(clip.visual, zero_shot_weights(clip, tokenizer(), class_names, templates)).eval()

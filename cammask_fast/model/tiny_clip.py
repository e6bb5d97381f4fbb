"""The two-tower CLIP that ships with the package: our image tower, open_clip's text tower and tokenizer at small size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from cammask_fast.model.vit import VisionTransformer, ViTConfig

if TYPE_CHECKING:  # open_clip's import takes seconds: it is paid where texts are embedded
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

TINY_VIT = ViTConfig(image_size=48, patch_size=8, width=96, layers=4, heads=3, output_dim=64)
CONTEXT_LENGTH = 20
TEXT_CONFIG = {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def build_tiny_clip() -> CLIP:
    """A randomly initialised tiny CLIP; `.visual` is ours, the rest is open_clip's, state-dict names are open_clip's."""
    from open_clip.model import CLIP

    vision = {"image_size": 48, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32}
    clip = CLIP(embed_dim=TINY_VIT.output_dim, vision_cfg=vision, text_cfg=TEXT_CONFIG, quick_gelu=True)
    clip.visual = VisionTransformer(TINY_VIT)
    nn.init.normal_(clip.token_embedding.weight, std=0.3)  # CLIP's 0.02 leaves so short a training at the start
    nn.init.normal_(clip.positional_embedding, std=0.15)
    return clip


def tokenizer() -> SimpleTokenizer:
    """open_clip's byte-pair tokenizer at the tiny context length: texts -> int64 (n, 20)."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)

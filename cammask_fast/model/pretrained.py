"""Pre-trained CLIPs: the shipped tiny one, open_clip's by name and tag, or a local state dict."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPVisionCfg
from torch import Tensor

from cammask_fast.data.datasets.texture_digits import TEMPLATES
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.files import load_exactly, read_safetensors
from cammask_fast.model.tiny_clip import TINY_VIT, build_tiny_clip, tokenizer
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.model.zero_shot import load_tiny_clip, zero_shot_weights

OPENAI_ARCHITECTURES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
}
_VISION_FIELDS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "output_tokens"}
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class PretrainedClip:
    """Both towers of a CLIP; `clip.visual` is our VisionTransformer."""

    clip: CLIP
    tokenize: Callable[[list[str]], Tensor]
    templates: tuple[str, ...]
    """The prompt templates that belong to the model, each with one `{}`."""

    @property
    def visual(self) -> VisionTransformer:
        assert isinstance(self.clip.visual, VisionTransformer)
        return self.clip.visual

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = ()) -> Classifier:
        """The zero-shot classifier over `class_names`, with the model's own templates unless others are given."""
        weights = zero_shot_weights(self.clip, self.tokenize, class_names, templates or self.templates)
        return Classifier(self.visual, weights).eval()


def open_clip_name(arch: str) -> str:
    """open_clip's model name for `--arch`. Raises ValueError on an unknown one."""
    name = OPENAI_ARCHITECTURES.get(arch, arch)
    if name not in open_clip.list_models():
        raise ValueError(
            f"unknown architecture {arch!r}; known: tiny, {', '.join(OPENAI_ARCHITECTURES)}, or an open_clip ViT name"
        )
    return name


def vit_config(arch: str) -> ViTConfig:
    """The image tower of an architecture. Raises ValueError for towers that are no plain CLIP ViT with a CLS output."""
    return TINY_VIT if arch == "tiny" else _vit_config(arch, _model_config(arch))


def _model_config(arch: str) -> dict[str, Any]:
    """open_clip's configuration of a supported two-tower model."""
    config: dict[str, Any] = open_clip.get_model_config(open_clip_name(arch))
    text = config["text_cfg"]
    for field in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(field):
            raise ValueError(f"{arch}: a text tower or tokenizer from Hugging Face ({field}) is not supported")
    for field in ("custom_text", "multimodal_cfg"):
        if config.get(field):
            raise ValueError(f"{arch}: not a plain two-tower CLIP ({field})")
    return config


def _vit_config(arch: str, config: dict[str, Any]) -> ViTConfig:
    vision = CLIPVisionCfg(**config["vision_cfg"])
    unsupported = [f.name for f in fields(vision) if f.name not in _VISION_FIELDS and getattr(vision, f.name) != f.default]
    if isinstance(vision.layers, (tuple, list)):
        unsupported.insert(0, "ResNet layers")
    if not isinstance(vision.image_size, int):
        unsupported.append("image_size that is not square")
    if unsupported:
        raise ValueError(f"{arch}: its image tower is not a plain ViT with a CLS output ({', '.join(unsupported)})")
    return ViTConfig(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.width // vision.head_width,
        output_dim=config["embed_dim"],
        activation="quick_gelu" if config.get("quick_gelu", False) else "gelu",
        mlp_ratio=vision.mlp_ratio,
    )


def default_pretrained(arch: str) -> str:
    """`tiny` for the shipped model, `openai` for the models that OpenAI released. Raises ValueError for any other."""
    if arch == "tiny":
        return "tiny"
    tags = open_clip.list_pretrained_tags_by_model(open_clip_name(arch))
    if arch in OPENAI_ARCHITECTURES or arch in OPENAI_ARCHITECTURES.values():
        return "openai"
    raise ValueError(f"{arch}: choose its weights with --pretrained FILE or TAG; tags: {', '.join(tags) or 'none'}")


def load_pretrained(arch: str, pretrained: str = "") -> PretrainedClip:
    """Both towers of `--arch` with the weights of `--pretrained`, in float32 and evaluation mode.

    pretrained: `tiny`, a tag of open_clip (`openai`), or a file with an open_clip state dict (safetensors, or a .pt of plain
    tensors); empty: `default_pretrained`. Raises ValueError on architectures we cannot run, unknown tags, weights that cannot
    be downloaded or read, belong to another activation or preprocessing, or do not fit.
    """
    pretrained = pretrained or default_pretrained(arch)
    if arch == "tiny" and pretrained == "tiny":
        return PretrainedClip(clip=load_tiny_clip(), tokenize=tokenizer(), templates=TEMPLATES)
    path = Path(pretrained)
    if arch == "tiny":
        clip = build_tiny_clip()
        load_exactly(clip, read_weights(path), path)
        return PretrainedClip(clip=clip.eval(), tokenize=tokenizer(), templates=TEMPLATES)
    config = _model_config(arch)
    vit = _vit_config(arch, config)
    if not path.is_file():
        path = _download(arch, pretrained, quick_gelu=config.get("quick_gelu", False))
    clip = _build(config, vit)
    load_exactly(clip, read_weights(path), path)
    templates = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    return PretrainedClip(clip=clip.eval(), tokenize=open_clip.get_tokenizer(open_clip_name(arch)), templates=templates)


def _build(config: dict[str, Any], vit: ViTConfig) -> CLIP:
    """open_clip's text tower and our image tower; open_clip's own image tower is a one-layer stand-in that is thrown away."""
    stand_in = {"image_size": 8, "patch_size": 8, "width": 64, "layers": 1}
    clip = CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=stand_in,
        text_cfg=config["text_cfg"],
        quick_gelu=config.get("quick_gelu", False),
    )
    clip.visual = VisionTransformer(vit)
    return clip


def _download(arch: str, tag: str, *, quick_gelu: bool) -> Path:
    name = open_clip_name(arch)
    tags = open_clip.list_pretrained_tags_by_model(name)
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        raise ValueError(f"--pretrained {tag}: neither a file nor a tag of {name}; tags: {', '.join(tags) or 'none'}")
    if config.get("quick_gelu", False) != quick_gelu:
        other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
        raise ValueError(f"the weights {tag!r} were trained with the other activation: use --arch {other}")
    if (tuple(config["mean"]), tuple(config["std"])) != (CLIP_MEAN, CLIP_STD):
        raise ValueError(f"the weights {tag!r} of {name} expect other pixel statistics than CLIP's: not supported")
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its retries are reported as our one error
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # the hub clients raise errors of three HTTP libraries
        raise ValueError(
            f"could not download the weights {tag!r} of {name} ({type(error).__name__}): connect to the network, or pass "
            "--pretrained FILE with an open_clip state dict"
        ) from None
    finally:
        hub_log.setLevel(level)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state-dict file in float32 under open_clip's names.

    safetensors, or any other suffix through torch.load(weights_only=True): files that would run code are refused. Raises
    ValueError when it is missing, refused or damaged.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        loaded: Any = read_safetensors(path)[0]
    else:
        try:
            with warnings.catch_warnings(action="ignore"):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged or hostile file can raise anything
            raise ValueError(
                f"{path} is not a plain state dict of tensors and was not loaded, since pickled code could run: "
                "convert it to safetensors"
            ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no state dict: expected parameter names and tensors")
    weights = {name.removeprefix("module."): value.float() for name, value in loaded.items() if name not in _OPENAI_EXTRAS}
    if "logit_scale" in weights:
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    return weights


def to_open_clip(visual: VisionTransformer) -> dict[str, Tensor]:
    """Fine-tuned weights under open_clip's names, `visual.*`: `model.load_state_dict(..., strict=False)` takes them."""
    return {f"visual.{name}": value.detach().clone() for name, value in visual.state_dict().items()}

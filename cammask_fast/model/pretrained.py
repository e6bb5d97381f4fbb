"""Pre-trained CLIPs: the shipped tiny one, open_clip's by name and tag, or weights in a file or folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cammask_fast.data.datasets.texture_digits import TEMPLATES
from cammask_fast.model.beside import config_beside, refuse_other_preprocessing
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.files import load_exactly
from cammask_fast.model.head_cache import MANY_PROMPTS, TenthsOf, head_key, kept_head, shipped_head_key
from cammask_fast.model.layouts import architectures_with, shape_of
from cammask_fast.model.names import OPENAI_ARCHITECTURES, unknown_architecture
from cammask_fast.model.tiny_clip import TINY_VIT, build_tiny_clip, tokenizer
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.model.weights import Weights, read_weights
from cammask_fast.model.zero_shot import Progress, load_tiny_clip, load_tiny_tower, zero_shot_weights
from cammask_fast.runtime.notices import notice, say

if TYPE_CHECKING:  # open_clip's import takes seconds, and the shipped model with a kept head does without
    from open_clip.model import CLIP

Tokenize = Callable[[list[str]], Tensor]
"""Texts to int64 (n, context length)."""
_VISION_FIELDS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "output_tokens"}
_ACTIVATIONS = {"quick_gelu": "QuickGELU", "gelu": "GELU"}


@dataclass(frozen=True, kw_only=True)
class PretrainedClip:
    """Both towers of a CLIP."""

    visual: VisionTransformer
    """The image tower."""
    load: Callable[[], tuple[CLIP, Tokenize]]
    """Both towers, `visual` among them, and their tokenizer; called once, when texts are embedded."""
    templates: tuple[str, ...]
    """The prompt templates that belong to the model, each with one `{}`."""
    digest: str = ""
    """Of the weights of both towers and the tokenizer, where it is known without them; heads of any size are kept by it."""

    @classmethod
    def of(cls, clip: CLIP, tokenize: Tokenize, templates: Sequence[str]) -> PretrainedClip:
        """Wrap a CLIP that is in memory.

        Args:
            clip: both towers; `clip.visual` is our VisionTransformer.
            tokenize: texts to int64 (n, context length).
            templates: that belong to the model, each with one `{}`.

        Returns:
            The CLIP.
        """
        assert isinstance(clip.visual, VisionTransformer)
        return cls(visual=clip.visual, load=lambda: (clip, tokenize), templates=tuple(templates))

    @cached_property
    def _loaded(self) -> tuple[CLIP, Tokenize]:
        return self.load()

    @property
    def clip(self) -> CLIP:
        """Both towers; `clip.visual` is `visual`."""
        return self._loaded[0]

    @property
    def tokenize(self) -> Tokenize:
        """The tokenizer of the text tower."""
        return self._loaded[1]

    def head(self, class_names: Sequence[str], templates: Sequence[str] = (), *, device: str = "cpu") -> Tensor:
        """The zero-shot head over the classes.

        With many prompts, progress is printed while they are embedded, and the head is kept in a folder of the user (see
        `kept_head`).

        Args:
            class_names: K names.
            templates: with one `{}` each (default: the model's own).
            device: where the text tower runs.

        Returns:
            float32 (K, E) on the CPU.
        """
        templates = tuple(templates) or self.templates

        def build(progress: Progress | None = None) -> Tensor:
            return zero_shot_weights(self.clip, self.tokenize, class_names, templates, device=device, progress=progress)

        if len(class_names) * len(templates) < MANY_PROMPTS:
            return (
                kept_head(shipped_head_key(self.digest, class_names, templates), build, quiet=True) if self.digest else build()
            )
        return kept_head(head_key(self.clip, self.tokenize, class_names, templates), lambda: build(TenthsOf("zero-shot head")))

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = (), *, device: str = "cpu") -> Classifier:
        """The zero-shot classifier over the classes; see `head`.

        Args:
            class_names: K names.
            templates: with one `{}` each (default: the model's own).
            device: of the result.

        Returns:
            The classifier in evaluation mode.
        """
        return Classifier(self.visual, self.head(class_names, templates, device=device)).to(device).eval()


def open_clip_name(arch: str) -> str:
    """open_clip's model name for `--arch`. Raises ValueError on an unknown one."""
    import open_clip

    name = OPENAI_ARCHITECTURES.get(arch, arch)
    if name not in open_clip.list_models():
        raise unknown_architecture(arch, open_clip.list_models())
    return name


def vit_config(arch: str) -> ViTConfig:
    """The image tower of an architecture. Raises ValueError for towers that are no plain CLIP ViT with a CLS output."""
    return TINY_VIT if arch == "tiny" else _vit_config(arch, _model_config(arch))


def _model_config(arch: str) -> dict[str, Any]:
    """open_clip's configuration of a supported two-tower model."""
    import open_clip

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
    from open_clip.model import CLIPVisionCfg

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
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(open_clip_name(arch))
    if arch in OPENAI_ARCHITECTURES or arch in OPENAI_ARCHITECTURES.values():
        return "openai"
    raise ValueError(f"{arch}: choose its weights with --pretrained FILE or TAG; tags: {', '.join(tags) or 'none'}")


def load_pretrained(arch: str, pretrained: str = "") -> PretrainedClip:
    """Both towers of `--arch` with the weights of `--pretrained`, in float32 and evaluation mode.

    pretrained: `tiny`, a tag of open_clip (`openai`), or a file or folder with weights in any layout of `read_weights`; empty:
    `default_pretrained`. Says in a line what a file was recognised as, and warns where its activation cannot be known. Raises
    ValueError on architectures we cannot run, unknown tags, weights that cannot be downloaded or read, belong to another
    activation or preprocessing, or do not fit, then with the architectures that do.
    """
    pretrained = pretrained or default_pretrained(arch)
    if arch == "tiny" and pretrained == "tiny":
        return _shipped()
    path = Path(pretrained)
    if arch == "tiny":
        clip = build_tiny_clip()
        _load(clip, read_weights(path), "tiny", said=True)
        return PretrainedClip.of(clip.eval(), tokenizer(), TEMPLATES)
    import open_clip

    config = _model_config(arch)
    vit = _vit_config(arch, config)
    is_tag = pretrained in open_clip.list_pretrained_tags_by_model(open_clip_name(arch)) and not path.is_file()
    own = not is_tag and path.exists()
    weights = read_weights(path if own else _download(arch, pretrained, quick_gelu=config.get("quick_gelu", False)))
    if own:
        _check_origin(weights, arch, vit)
    clip = _build(config, vit)
    _load(clip, weights, arch, said=own)
    templates = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    return PretrainedClip.of(clip.eval(), open_clip.get_tokenizer(open_clip_name(arch)), templates)


def _shipped() -> PretrainedClip:
    """The shipped model, whose text tower is read when texts are embedded."""
    visual, digest = load_tiny_tower()

    def load() -> tuple[CLIP, Tokenize]:
        clip = load_tiny_clip()
        clip.visual = visual
        return clip, tokenizer()

    return PretrainedClip(visual=visual, load=load, templates=TEMPLATES, digest=digest)


def _load(clip: CLIP, weights: Weights, arch: str, *, said: bool) -> None:
    try:
        load_exactly(clip, weights.tensors, weights.path)
    except ValueError as error:
        raise ValueError(f"{error}{_advice(weights, arch)}") from None
    if said:
        say(f"weights: {weights.recognised}")


def _advice(weights: Weights, arch: str) -> str:
    """Which `--arch` the shapes belong to."""
    shape = shape_of(weights.tensors)
    if not shape:
        return ""
    fitting = [name for name in architectures_with(shape) if is_supported(name)]
    if fitting:
        return f"; they fit --arch {' or '.join(fitting)}"
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
    return f"; no known --arch has their shapes ({sizes})" if arch != "tiny" else ""


def is_supported(name: str) -> bool:
    """Whether this is an architecture that we can run."""
    try:
        vit_config(name)
    except ValueError:
        return False
    return True


def _check_origin(weights: Weights, arch: str, vit: ViTConfig) -> None:
    """Activation and preprocessing of weights from a file, which shapes cannot tell: refuse what is known to differ, warn where
    nothing is known."""
    beside = config_beside(weights.path, shape_of(weights.tensors))
    known, source = (None, "") if beside is None else (beside.activation, str(beside.source))
    if weights.layout == "OpenAI's CLIP":
        known, source = "quick_gelu", "OpenAI's own archive"
    if beside is not None:
        refuse_other_preprocessing(beside.preprocessing, f"{weights.path} (by {beside.source})")
    other = _with_other_activation(arch)
    here, there = _ACTIVATIONS[vit.activation], _ACTIVATIONS["gelu" if vit.activation == "quick_gelu" else "quick_gelu"]
    if known is not None and known != vit.activation:
        use = f"use --arch {other}" if other else "no supported --arch has it with these shapes"
        raise ValueError(
            f"{weights.path} was trained with {_ACTIVATIONS.get(known, known)} ({source}), and {arch} computes {here}: {use}"
        )
    if known is None and other:
        notice(
            f"the activation cannot be known from {weights.path}: {arch} computes {here}; if the weights were trained with "
            f"{there}, use --arch {other} (OpenAI's, MetaCLIP's and DFN's have QuickGELU, LAION's and DataComp's GELU)"
        )


def _with_other_activation(arch: str) -> str | None:
    """open_clip's model that differs in the activation alone, if there is one."""
    import open_clip

    name = open_clip_name(arch)
    other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    return other if other in open_clip.list_models() else None


def _build(config: dict[str, Any], vit: ViTConfig) -> CLIP:
    """open_clip's text tower and our image tower; open_clip's own image tower is a one-layer stand-in that is thrown away."""
    from open_clip.model import CLIP

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
    import open_clip

    name = open_clip_name(arch)
    tags = open_clip.list_pretrained_tags_by_model(name)
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        raise ValueError(f"--pretrained {tag}: neither a file or folder nor a tag of {name}; tags: {', '.join(tags) or 'none'}")
    if config.get("quick_gelu", False) != quick_gelu:
        raise ValueError(
            f"the weights {tag!r} were trained with the other activation: use --arch {_with_other_activation(arch)}"
        )
    refuse_other_preprocessing(config, f"the weights {tag!r} of {name}")
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its retries are reported as our one error
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # the hub clients raise errors of three HTTP libraries
        raise ValueError(
            f"could not download the weights {tag!r} of {name} ({type(error).__name__}): connect to the network, or pass "
            "--pretrained FILE with the weights"
        ) from None
    finally:
        hub_log.setLevel(level)


def to_open_clip(visual: VisionTransformer) -> dict[str, Tensor]:
    """Fine-tuned weights under open_clip's names, `visual.*`: `model.load_state_dict(..., strict=False)` takes them."""
    return {f"visual.{name}": value.detach().clone() for name, value in visual.state_dict().items()}

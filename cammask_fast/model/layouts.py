"""Names of a CLIP's parameters: prefixes removed, transformers' layout converted; which architectures have the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
"""Numbers beside the weights in OpenAI's own archives."""
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROOTS = ("visual.conv1.weight", "vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight")
_NO_PARAMETERS = ("position_ids", "attn_mask")

_TRANSFORMERS = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_TRANSFORMERS_ENDS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelled so there
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSFORMERS_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")

_FOREIGN = (
    (
        r"\.lora_[AB]\b",
        "adapters of LoRA without the model: merge them first (peft: merge_and_unload) and save the whole model",
    ),
    (r"vision_model\.head\.probe", "transformers' SiglipModel, whose image tower pools by attention: not supported"),
    (r"visual\.trunk\.", "an image tower of timm inside a CLIP: not supported"),
    (r"visual\.layer1\.0\.", "a CLIP with a ResNet: only ViTs are supported"),
    (r"(^|\.)patch_embed\.proj\.", "a ViT in timm's layout without a text tower: not supported"),
    (r"(^|\.)(layer1|conv1|features)\.", "a network that is no CLIP"),
)


def without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, int]:
    """Remove what DistributedDataParallel, FSDP, torch.compile, Lightning and other modules put before a CLIP's names.

    Returns:
        tensors: those of the CLIP under their own names.
        prefix: words for what was removed, such as `module._orig_mod.`; empty where nothing was.
        outside: how many tensors lay outside the CLIP and were left aside.

    Raises:
        ValueError: with several CLIPs in one file.
    """
    cleaned: dict[str, Tensor] = {}
    removed = ""
    for name, value in tensors.items():
        parts = name.split(".")
        wrappers = [part for part in parts if part in _WRAPPERS]
        if len(wrappers) > removed.count("."):
            removed = ".".join(wrappers) + "."
        cleaned[".".join(part for part in parts if part not in _WRAPPERS)] = value
    roots = {name.removesuffix(root) for root in _ROOTS for name in cleaned if name == root or name.endswith("." + root)}
    if not roots or "" in roots:
        return cleaned, removed, 0
    chosen = next(iter(roots)) if len(roots) == 1 else "model."
    if chosen not in roots:
        raise ValueError(f"holds several CLIPs, under {', '.join(sorted(roots))}: save the one that is meant by itself")
    inside = {name.removeprefix(chosen): value for name, value in cleaned.items() if name.startswith(chosen)}
    return inside, removed + chosen, len(cleaned) - len(inside)


def to_open_clip_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A CLIP's tensors under open_clip's names, float32, and the name of the layout they had.

    Raises:
        ValueError: with the reason (without the file's name), for layouts that are no plain CLIP with both towers.
    """
    tensors = {name: value for name, value in tensors.items() if not name.endswith(_NO_PARAMETERS)}
    quantised = [value.dtype for value in tensors.values() if value.ndim > 1 and not value.is_floating_point()]
    if quantised:
        raise ValueError(
            f"holds quantised weights ({str(quantised[0]).removeprefix('torch.')}): save them in float16 or float32"
        )
    for pattern, words in _FOREIGN[:4]:
        if any(re.search(pattern, name) for name in tensors):
            raise ValueError(f"holds {words}")
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        converted, layout = _from_transformers(tensors), "transformers' CLIPModel"
    else:
        layout = "OpenAI's CLIP" if OPENAI_EXTRAS[0] in tensors else "open_clip's CLIP"
        if "text.token_embedding.weight" in tensors:  # open_clip's CustomTextCLIP
            tensors = {name.removeprefix("text."): value for name, value in tensors.items()}
        converted = {name: value for name, value in tensors.items() if name not in OPENAI_EXTRAS}
    has = [any(name.startswith("visual.") for name in converted), "token_embedding.weight" in converted]
    if not all(has):
        what = "only an image tower" if has[0] else "only a text tower" if has[1] else None
        foreign = [words for pattern, words in _FOREIGN[4:] if any(re.search(pattern, name) for name in converted)]
        if what is None:
            example = ", ".join(list(converted)[:2]) or "nothing"
            raise ValueError(f"holds {foreign[0] if foreign else f'no CLIP (its names begin with {example})'}")
        raise ValueError(f"holds {what} of a CLIP: both are needed, the text tower for the zero-shot head")
    weights = {name: value.float() for name, value in converted.items()}
    if "logit_scale" in weights:
        weights["logit_scale"] = weights["logit_scale"].reshape(())
    return weights, layout


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to open_clip's: queries, keys and values in one matrix, projections transposed."""
    converted: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer = _TRANSFORMERS_LAYER.fullmatch(name)
        if name in _TRANSFORMERS_ENDS:
            converted[_TRANSFORMERS_ENDS[name]] = value
        elif name in ("visual_projection.weight", "text_projection.weight"):
            converted["visual.proj" if name[0] == "v" else "text_projection"] = value.T.contiguous()
        elif layer is None:
            converted[name] = value  # reported as unexpected
        else:
            tower, number, part, kind = layer.groups()
            block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            if part in _TRANSFORMERS:
                converted[f"{block}.{_TRANSFORMERS[part]}.{kind}"] = value
            elif part == "self_attn.q_proj":
                joined = [tensors.get(name.replace("q_proj", f"{one}_proj")) for one in "qkv"]
                if any(one is None for one in joined):
                    raise ValueError(f"holds {name} without its keys or values: the file is not whole")
                converted[f"{block}.attn.in_proj_{kind}"] = torch.cat([one for one in joined if one is not None])
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                converted[name] = value
    return converted


def shape_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The numbers of a CLIP that its shapes tell, from tensors under open_clip's names; empty where some are missing."""
    try:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        tokens = len(weights["visual.positional_embedding"])
        context, text_width = weights["positional_embedding"].shape
        return {
            "image_size": round((tokens - 1) ** 0.5) * patch, "patch_size": patch, "width": width,
            "layers": _layers(weights, "visual.transformer.resblocks."), "embed_dim": weights["visual.proj"].shape[1],
            "context_length": context, "vocab_size": len(weights["token_embedding.weight"]), "text_width": text_width,
            "text_layers": _layers(weights, "transformer.resblocks."),
        }  # fmt: skip
    except (KeyError, ValueError, IndexError):
        return {}


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def shape_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`shape_of` from one of open_clip's model configurations."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return {
        "image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", 16),
        "width": vision.get("width", 768), "layers": vision.get("layers", 12), "embed_dim": config["embed_dim"],
        "context_length": text.get("context_length", 77), "vocab_size": text.get("vocab_size", 49408),
        "text_width": text.get("width", 512), "text_layers": text.get("layers", 12),
    }  # fmt: skip


def architectures_with(shape: Mapping[str, int]) -> list[str]:
    """open_clip's models of exactly these numbers, in their order there."""
    import open_clip

    return [] if not shape else [
        name for name in open_clip.list_models() if shape_of_config(open_clip.get_model_config(name)) == shape
    ]  # fmt: skip

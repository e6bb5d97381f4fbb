"""Both towers under other tools' names: open_clip's and transformers'. The text tower is the pre-trained model's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from cammask_fast.checkpoint import Description
from cammask_fast.export import Exported, largest_difference, preprocessing, write_head
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import load_pretrained, open_clip_name
from cammask_fast.model.tiny_clip import TEXT_CONFIG
from cammask_fast.model.vit import ViTConfig
from cammask_fast.runtime.files import write_text

MODEL = "open_clip_model.safetensors"


def export_open_clip(model: Classifier, description: Description, out: Path, pretrained: str) -> Exported:
    """Write `open_clip_model.safetensors` and `open_clip_config.json`, for open_clip's `create_model_and_transforms`.

    Args:
        model: the classifier, whose image tower is exported.
        description: of the checkpoint.
        out: folder.
        pretrained: weights of the text tower; empty: those that the run started from.

    Returns:
        The files, how to load them, and the largest difference on random pixels.
    """
    clip = _with_tuned_images(model, description, pretrained)
    weights, config = out / MODEL, out / "open_clip_config.json"
    save_file({name: value.detach().contiguous() for name, value in clip.state_dict().items()}, weights)
    described = {
        "model_cfg": _open_clip_config(description.arch),
        "preprocess_cfg": preprocessing(model.visual.config.image_size),
    }
    write_text(config, json.dumps(described, indent=1) + "\n")
    head = write_head(model, description, out)
    if description.arch == "tiny":
        name, arguments = f"local-dir:{out}", f'"local-dir:{out}"'
        loaded = open_clip.create_model(name)
    else:
        name, arguments = open_clip_name(description.arch), f'"{open_clip_name(description.arch)}", pretrained="{weights}"'
        loaded = open_clip.create_model(name, pretrained=str(weights))
    loaded.eval()
    difference = largest_difference(model, lambda images: {"features": loaded.encode_image(images)})
    usage = f"open_clip.create_model_and_transforms({arguments})"
    return Exported((weights, config, *head), usage, difference)


def export_hf(model: Classifier, description: Description, out: Path, pretrained: str) -> Exported:
    """Write weights, configuration, tokenizer and image processor for transformers' CLIPModel.

    Args:
        model: the classifier, whose image tower is exported.
        description: of the checkpoint.
        out: folder.
        pretrained: weights of the text tower; empty: those that the run started from.

    Returns:
        The files, how to load them, and the largest difference on random pixels.

    Raises:
        ValueError: transformers is not installed, or did not read every weight.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("--to hf needs transformers: pip install 'cammask-fast[export]'") from None
    clip = _with_tuned_images(model, description, pretrained)
    text = _open_clip_config(description.arch)["text_cfg"]
    config = transformers.CLIPConfig(**_hf_config(model.visual.config, text, clip))
    with warnings.catch_warnings(action="ignore"):
        theirs = transformers.CLIPModel(config)
        theirs.load_state_dict(hf_state_dict(clip.state_dict()), strict=False)
        theirs.save_pretrained(out)
        _write_tokenizer(out, text["context_length"])
        _write_processor(out, model.visual.config.image_size)
        loaded, report = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"transformers did not read every weight of {out}: {report}")
    head = write_head(model, description, out)
    loaded.eval()

    def call(images: Tensor) -> Mapping[str, Tensor]:
        return {"features": loaded.visual_projection(loaded.vision_model(pixel_values=images).pooler_output)}

    files = tuple(sorted(path for path in out.iterdir() if path.is_file() and path not in head))
    return Exported((*files, *head), f'transformers.CLIPModel.from_pretrained("{out}")', largest_difference(model, call))


def hf_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A two-tower CLIP's weights from open_clip's names to those of transformers' CLIPModel."""
    found = {
        "logit_scale": weights["logit_scale"],
        "visual_projection.weight": weights["visual.proj"].T,
        "text_projection.weight": weights["text_projection"].T,
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }  # fmt: skip
    parts = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if module in norms:
            found[f"{norms[module]}.{kind}"] = value
        tower, separator, rest = name.partition("transformer.resblocks.")
        if not separator:
            continue
        layer, _, part = rest.partition(".")
        prefix = f"{'vision_model' if tower == 'visual.' else 'text_model'}.encoder.layers.{layer}"
        if part.startswith("attn.in_proj_"):
            for which, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{prefix}.self_attn.{which}_proj.{part.removeprefix('attn.in_proj_')}"] = piece
        else:
            of_part, _, kind = part.rpartition(".")
            found[f"{prefix}.{parts[of_part]}.{kind}"] = value
    return {name: value.detach().contiguous() for name, value in found.items()}


def _with_tuned_images(model: Classifier, description: Description, pretrained: str) -> CLIP:
    """The pre-trained two towers with the tuned image tower instead of their own."""
    started_from = pretrained or description.run.get("pretrained") or ""
    clip = load_pretrained(description.arch, started_from).clip
    clip.visual.load_state_dict(model.visual.state_dict())
    return clip


def _open_clip_config(arch: str) -> dict[str, Any]:
    if arch == "tiny":
        vision = {"image_size": 48, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32}
        return {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": dict(TEXT_CONFIG)}
    config: dict[str, Any] = open_clip.get_model_config(open_clip_name(arch))
    return config


def _hf_config(vit: ViTConfig, text: Mapping[str, Any], clip: CLIP) -> dict[str, Any]:
    activation = {"quick_gelu": "quick_gelu", "gelu": "gelu"}[vit.activation]
    hidden = clip.transformer.resblocks[0].mlp.c_fc.out_features
    vision_config = {
        "hidden_size": vit.width, "intermediate_size": round(vit.width * vit.mlp_ratio), "num_hidden_layers": vit.layers,
        "num_attention_heads": vit.heads, "image_size": vit.image_size, "patch_size": vit.patch_size, "hidden_act": activation,
        "projection_dim": vit.output_dim,
    }  # fmt: skip
    text_config = {
        "hidden_size": text["width"], "intermediate_size": hidden, "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"], "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"], "hidden_act": activation, "projection_dim": vit.output_dim,
        "bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1, "pad_token_id": text["vocab_size"] - 1,
    }  # fmt: skip
    return {"vision_config": vision_config, "text_config": text_config, "projection_dim": vit.output_dim}


def _write_tokenizer(out: Path, context_length: int) -> None:
    """CLIP's byte-pair vocabulary under transformers' names."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    write_text(out / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    write_text(out / "merges.txt", "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges))
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "bos_token": start, "eos_token": end,
        "unk_token": end, "pad_token": end, "do_lower_case": True,
    }  # fmt: skip
    write_text(out / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def _write_processor(out: Path, size: int) -> None:
    settings = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "do_convert_rgb": True,
    }  # fmt: skip
    write_text(out / "preprocessor_config.json", json.dumps(settings, indent=1) + "\n")

"""What a configuration beside weights says of them: their activation and how images are prepared for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.model.layouts import shape_of_config
from cammask_fast.runtime.notices import notice

_TRANSFORMERS_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
OURS: Mapping[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
"""How both loaders prepare images: the short side to the model's size, the centre cut out."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """activation: `quick_gelu`, `gelu`, another word of the file's, or None where nothing says. preprocessing: the keys of
    `OURS` that are known. source: the file that says so."""

    activation: str | None = None
    preprocessing: Mapping[str, Any]
    source: Path


def config_beside(file: Path, shape: Mapping[str, int]) -> Beside | None:
    """The configuration in the folder of a weights file: open_clip's `open_clip_config.json`, else transformers' `config.json`
    with `preprocessor_config.json`.

    Args:
        file: the weights.
        shape: their `shape_of`; a configuration of another shape belongs to other weights and is passed over with a notice.

    Raises:
        ValueError: a configuration that is no JSON.
    """
    own = file.with_name("open_clip_config.json")
    if own.is_file():
        read = _json(own)
        config, preprocessing = read.get("model_cfg"), read.get("preprocess_cfg", {})
        if isinstance(config, dict) and {"vision_cfg", "text_cfg", "embed_dim"} <= set(config):
            if shape and shape_of_config(config) != shape:
                notice(f"{own} describes a model of another shape than {file.name}: it was passed over")
                return None
            known = {key: value for key, value in preprocessing.items() if key in OURS}
            return Beside(activation="quick_gelu" if config.get("quick_gelu") else "gelu", preprocessing=known, source=own)
    theirs = file.with_name("config.json")
    if theirs.is_file():
        read = _json(theirs)
        if str(read.get("model_type", "")) in ("clip", "clip_vision_model") or "vision_config" in read:
            return _of_transformers(theirs, read, file, shape)
    return None


def _of_transformers(source: Path, config: Mapping[str, Any], file: Path, shape: Mapping[str, int]) -> Beside | None:
    # what equals transformers' default may be left out of the file
    vision: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
        "hidden_act": "quick_gelu",
    }
    vision |= config.get("vision_config") or {}
    names = {"hidden_size": "width", "num_hidden_layers": "layers", "patch_size": "patch_size", "image_size": "image_size"}
    if shape and any(vision[theirs] != shape[ours] for theirs, ours in names.items()):
        notice(f"{source} describes a model of another shape than {file.name}: it was passed over")
        return None
    preprocessing: dict[str, Any] = {}
    processor = source.with_name("preprocessor_config.json")
    if processor.is_file():
        read = _json(processor)
        size = read.get("size", {})
        squashed = isinstance(size, dict) and {"height", "width"} <= set(size) and not read.get("do_center_crop", True)
        found = {
            "mean": read.get("image_mean"), "std": read.get("image_std"), "resize_mode": "squash" if squashed else "shortest",
            "interpolation": _TRANSFORMERS_RESAMPLING.get(read.get("resample", 3), "bicubic"),
        }  # fmt: skip
        preprocessing = {key: value for key, value in found.items() if value is not None}
    return Beside(activation=vision["hidden_act"], preprocessing=preprocessing, source=source)


def refuse_other_preprocessing(expected: Mapping[str, Any], who: str) -> None:
    """Raise ValueError where weights expect images prepared in another way than the loaders do it.

    Args:
        expected: keys of `OURS`; others are not looked at, and missing ones are taken for equal.
        who: the weights, as the error's subject.
    """
    different = []
    for key, ours in OURS.items():
        theirs = expected.get(key)
        if theirs is None or theirs == ours:
            continue
        if key in ("mean", "std") and len(theirs) == 3 and all(map(_close, theirs, ours)):
            continue
        different.append(f"{key} {theirs if isinstance(theirs, str) else tuple(theirs)} instead of {ours}")
    if different:
        raise ValueError(f"{who} expect images prepared in another way, which is not supported: {'; '.join(different)}")


def _close(one: Any, other: Any) -> bool:
    return math.isclose(one, other, abs_tol=1e-4)


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} beside the weights ({error})") from None
    return read if isinstance(read, dict) else {}

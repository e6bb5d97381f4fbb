"""Fine-tuned classifiers in and out of files: safetensors with their description in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cammask_fast.model.classifier import Classifier
from cammask_fast.model.files import load_exactly, read_safetensors, refuse_mismatch
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.runtime.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint says about itself, in its safetensors header."""

    arch: str
    vit: ViTConfig
    class_names: tuple[str, ...]
    run: dict[str, Any] = field(default_factory=dict)
    """The run's settings, versions and validation accuracy."""


def save_classifier(path: Path, model: Classifier, description: Description) -> None:
    """Write a classifier as safetensors, to a temporary name first, so that a reader never sees half a file.

    Args:
        path: of the file; its folder is created.
        model: its weights, which are copied to the CPU.
        description: architecture, class names and run, stored in the header.

    Raises:
        ValueError: the file cannot be written.
    """
    header = {
        "format": "cammask-classifier-1",
        "arch": description.arch,
        "vit": json.dumps(description.vit.to_dict()),
        "class_names": json.dumps(description.class_names),
        "run": json.dumps(description.run),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            save_file({name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}, part, header)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def load_classifier(path: Path, *, expect_vit: ViTConfig | None = None) -> tuple[Classifier, Description]:
    """Read a checkpoint of `save_classifier`.

    Raises ValueError when the file is missing, is no such checkpoint, or holds another architecture than `expect_vit`
    (activation included, which silently ruins a CLIP).
    """
    weights, header = read_safetensors(path)
    if header.get("format") != "cammask-classifier-1":
        raise ValueError(f"{path} is not a classifier saved by cammask train")
    try:
        description = Description(
            arch=header["arch"],
            vit=ViTConfig.from_dict(json.loads(header["vit"])),
            class_names=tuple(json.loads(header["class_names"])),
            run=json.loads(header["run"]),
        )
        if not isinstance(description.run, dict) or not all(isinstance(name, str) for name in description.class_names):
            raise ValueError("run is no table, or a class has no name")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header ({error})") from None
    if expect_vit is not None:
        refuse_mismatch(description.vit, expect_vit, path)
    if "head.weight" not in weights:
        raise ValueError(f"{path}: damaged, head.weight is missing")
    model = Classifier(VisionTransformer(description.vit), weights["head.weight"])
    load_exactly(model, weights, path)
    return model.eval(), description


def describe_run(config: Mapping[str, Any], validation: float | None, class_names: Sequence[str]) -> dict[str, Any]:
    """The `run` field of a description.

    Args:
        config: settings of the run.
        validation: accuracy on the validation images in percent, None without any.
        class_names: of the head.

    Returns:
        Settings, versions and accuracy, for JSON.
    """
    return {
        "config": dict(config),
        "validation_accuracy": validation,
        "classes": len(class_names),
        "torch": torch.__version__,
    }

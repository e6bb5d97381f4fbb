"""Fine-tuned weights for other tools: open_clip, transformers, ONNX Runtime, torch.export.

Every export reads its files back with the tool that they are for and compares a batch with our own forward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cammask_fast.checkpoint import Description, load_classifier
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.files import write_text

BATCHES = (1, 3)
"""Batch sizes of the comparison: a graph whose batch is fixed fails at the second."""


class Exported(NamedTuple):
    """A finished export.

    files: what was written. usage: a line of Python that loads it. difference: largest absolute difference of the features
    (graphs: also of the logits) between the files read back and our forward, over normal random pixels.
    """

    files: tuple[Path, ...]
    usage: str
    difference: float


Exporter = Callable[[Classifier, Description, Path, str], Exported]


def export(checkpoint: Path, to: str, out: Path, *, pretrained: str = "") -> Exported:
    """Write a checkpoint of `cammask train` in another tool's format.

    Args:
        checkpoint: a file that `cammask train` wrote.
        to: `open-clip` or `hf` (both towers, the text tower being the pre-trained model's, and the classifier's head beside
            them), `onnx` or `torch-export` (images to logits and features, any batch size).
        out: folder, created when it is missing; files of an earlier export are replaced.
        pretrained: weights of the text tower (default: those that the run started from).

    Returns:
        The files, how to load them, and the largest difference on random pixels.

    Raises:
        ValueError: for an unknown format, a checkpoint that cannot be read, a tool that is not installed, or a folder that
            cannot be written.
    """
    exporters = _exporters()
    if to not in exporters:
        raise ValueError(f"--to: expected one of {', '.join(exporters)}, got {to!r}")
    model, description = load_classifier(checkpoint)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return exporters[to](model.requires_grad_(False).eval(), description, out, pretrained)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror or error}") from None


def _exporters() -> Mapping[str, Exporter]:
    from cammask_fast.export.graph import export_onnx, export_program
    from cammask_fast.export.towers import export_hf, export_open_clip

    return {"open-clip": export_open_clip, "hf": export_hf, "onnx": export_onnx, "torch-export": export_program}


def write_head(model: Classifier, description: Description, out: Path) -> tuple[Path, Path]:
    """Write the classifier's head beside the towers; logits = normalise(features) @ weight.T + bias.

    Args:
        model: the classifier.
        description: has the class names.
        out: folder.

    Returns:
        `head.safetensors` (weight (K, E), bias (K,)) and `classes.json`.
    """
    head, classes = out / "head.safetensors", out / "classes.json"
    save_file({name: value.contiguous() for name, value in model.head.state_dict().items()}, head)
    folders = description.run.get("class_folders", description.class_names)
    names = [{"folder": folder, "name": name} for folder, name in zip(folders, description.class_names, strict=True)]
    write_text(classes, json.dumps(names, indent=1) + "\n")
    return head, classes


def preprocessing(image_size: int) -> dict[str, object]:
    """How an image becomes the model's input, as open_clip's configuration names it."""
    return {
        "size": image_size, "mode": "RGB", "mean": list(CLIP_MEAN), "std": list(CLIP_STD),
        "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip


def largest_difference(model: Classifier, call: Callable[[Tensor], Mapping[str, Tensor]]) -> float:
    """Largest absolute difference between `call` and the model's features and logits, over batches of random pixels.

    call: normalised images (N, 3, S, S) to some of `features` (N, E) and `logits` (N, K).
    """
    size, generator, largest = model.visual.config.image_size, torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES:
        images = torch.randn(batch, 3, size, size, generator=generator)
        with torch.no_grad():
            ours = model(images)._asdict()
            theirs = call(images)
        assert theirs
        largest = max(largest, *((ours[name] - value).abs().max().item() for name, value in theirs.items()))
    return largest

"""The classifier as one graph with a free batch size: ONNX and torch.export."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cammask_fast.checkpoint import Description
from cammask_fast.export import Exported, largest_difference, preprocessing
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.files import write_text


class ImageClassifier(nn.Module):
    """Normalised images (N, 3, S, S) to logits (N, K) and features (N, E)."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and features (N, E) of normalised images (N, 3, H, W)."""
        prediction = self.model(images)
        return prediction.logits, prediction.features


def export_program(model: Classifier, description: Description, out: Path, pretrained: str) -> Exported:
    """Write `model.pt2`, for `torch.export.load`, in the dtype of the weights, on the CPU.

    Args:
        model: the classifier.
        description: of the checkpoint.
        out: folder.
        pretrained: not needed, as the text tower is not exported.

    Returns:
        The files, how to load them, and the largest difference on random pixels.
    """
    path = out / "model.pt2"
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(_program(model), path)
        loaded = torch.export.load(path).module()
    usage = f'torch.export.load("{path}").module()(images)  # logits, features'
    difference = largest_difference(model, lambda images: dict(zip(("logits", "features"), loaded(images), strict=True)))
    return Exported((path, _write_description(model, description, out)), usage, difference)


def export_onnx(model: Classifier, description: Description, out: Path, pretrained: str) -> Exported:
    """Write `model.onnx` with the input `images` and the outputs `logits` and `features`, and run it once in ONNX Runtime on
    the CPU.

    Args:
        model: the classifier.
        description: of the checkpoint.
        out: folder.
        pretrained: not needed, as the text tower is not exported.

    Returns:
        The files, how to load them, and the largest difference on random pixels.

    Raises:
        ValueError: onnxruntime or onnxscript is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(f"--to onnx needs {error.name}: pip install 'cammask-fast[export]'") from None
    path = out / "model.onnx"
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                _program(model), input_names=["images"], output_names=["logits", "features"], dynamo=True, verbose=False
            )
            assert program is not None
            program.save(str(path), external_data=False)
    finally:
        quiet.setLevel(level)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(images: Tensor) -> Mapping[str, Tensor]:
        names = ["logits", "features"]
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    usage = f'onnxruntime.InferenceSession("{path}").run(["logits", "features"], {{"images": pixels}})'
    difference = largest_difference(model, call)
    return Exported((path, _write_description(model, description, out)), usage, difference)


def _program(model: Classifier) -> torch.export.ExportedProgram:
    size = model.visual.config.image_size
    example, batch = torch.zeros(2, 3, size, size), torch.export.Dim("batch")
    return torch.export.export(ImageClassifier(model).eval(), (example,), dynamic_shapes={"images": {0: batch}})


def _write_description(model: Classifier, description: Description, out: Path) -> Path:
    """`model.json`: what the graph expects of its pixels, and the classes of its logits."""
    path = out / "model.json"
    size = model.visual.config.image_size
    text = {
        "arch": description.arch, "input": {"images": ["batch", 3, size, size], "preprocessing": preprocessing(size)},
        "class_names": description.class_names,
        "class_folders": description.run.get("class_folders", description.class_names),
    }  # fmt: skip
    write_text(path, json.dumps(text, indent=1) + "\n")
    return path

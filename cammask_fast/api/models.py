"""Models to hold in one's hand: pre-trained CLIPs and fine-tuned classifiers."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.source import find_checkpoint
from cammask_fast.data.class_names import tell_twins
from cammask_fast.data.iterables import to_uint8
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import PretrainedClip, load_pretrained
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.viz.mask_images import photograph

IMAGES = "expected paths, PIL images, uint8 arrays (H, W, 3), or one tensor or array of all"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A CLIP classifier: a pre-trained one (`clip`), a fine-tuned one, or both. See `load`."""

    arch: str
    clip: PretrainedClip | None = None
    """Both towers, where the model was loaded by architecture."""
    classifier: Classifier | None = None
    """Image tower and head; None until classes are known."""
    class_names: tuple[str, ...] = ()
    class_folders: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def image_size(self) -> int:
        """Pixels per side of the model's input."""
        return self.visual.config.image_size

    @property
    def visual(self) -> VisionTransformer:
        """The image tower."""
        return self._clip().visual if self.classifier is None else self.classifier.visual

    @torch.inference_mode(False)  # the caller's would make weights that nothing can be differentiated through
    def with_classes(self, names: Sequence[str], templates: Sequence[str] = ()) -> Model:
        """The zero-shot classifier over class names, with the model's own prompt templates unless others are given.

        Raises ValueError for a fine-tuned model, which has no text tower and keeps its classes.
        """
        chosen, prompts = texts(names, "classes"), texts(templates, "templates")
        tell_twins(chosen, chosen)
        classifier = self._clip().classifier(chosen, prompts, device=self.device)
        return replace(self, classifier=classifier, class_names=chosen, class_folders=chosen)

    def predict(self, images: Any, *, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image with their probabilities.

        images: paths, PIL images, or a tensor as `to_uint8` takes it, already of the model's size.
        """
        if not isinstance(top, int) or top < 1:
            raise ValueError(f"top: expected 1 or more classes, got {top}")
        classifier, names = self.with_head(), self.class_names
        with torch.no_grad():
            logits = classifier(normalise(self.pixels(images))).logits
        probabilities, classes = logits.softmax(1).topk(min(top, len(names)), 1)
        rows = zip(probabilities.tolist(), classes.tolist(), strict=True)
        return [[(names[c], p) for p, c in zip(*row, strict=True)] for row in rows]

    def _clip(self) -> PretrainedClip:
        if self.clip is None:
            raise ValueError("this model was loaded from a run and has no text tower: load it by architecture for new classes")
        return self.clip

    def with_head(self) -> Classifier:
        """The classifier. Raises ValueError while the model has no classes."""
        if self.classifier is None:
            raise ValueError('this model has no classes yet: cf.load("…", classes=["cat", "dog"]) or model.with_classes([...])')
        return self.classifier

    def pixels(self, images: Any) -> Tensor:
        """uint8 (N, S, S, 3) on the model's device."""
        if isinstance(images, (Tensor, np.ndarray)):
            found = to_uint8(images)
        else:
            if not isinstance(images, (str, Path, Image.Image, Iterable)):
                raise ValueError(f"images: {IMAGES}, got {type(images).__name__}")
            listed = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
            if not listed:
                raise ValueError("images: expected at least one")
            found = torch.stack([_decoded(image, self.image_size) for image in listed])
        if found.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"images: this model takes {self.image_size} pixels, got {tuple(found.shape[1:3])}")
        return found.to(self.device)

    def _repr_html_(self) -> str:
        classes = (
            f"{len(self.class_names)} classes: {', '.join(self.class_names[:8])}" if self.class_names else "no classes yet"
        )
        return f"<b>{html.escape(self.arch)}</b>, {self.image_size} pixels, {html.escape(classes)}"


@torch.inference_mode(False)  # as above
def load(
    source: str | Path,
    *,
    pretrained: str = "",
    classes: Sequence[str] = (),
    templates: Sequence[str] = (),
    device: str | None = None,
) -> Model:
    """A pre-trained CLIP or a fine-tuned classifier.

    Args:
        source: an architecture (`tiny`, `ViT-B/32`, `ViT-B/16`, `ViT-L/14`, an open_clip ViT name), a run folder of
            `cammask train` (its best checkpoint), or a checkpoint file.
        pretrained: weights of an architecture: a tag of open_clip or a file (default: its own, `openai`).
        classes: class names of the zero-shot head; may come later, with the data.
        templates: prompt templates with one `{}` (default: the model's own).
        device: `cpu` or `cuda` (default: cuda where there is one).

    Returns:
        The model on its device.

    Raises:
        ValueError: for an unknown architecture, weights that cannot be had, or a file that is no checkpoint.
    """
    if not isinstance(source, (str, Path)):
        raise ValueError(f"source: expected an architecture, a run folder or a checkpoint, got {type(source).__name__}")
    device = _device(device)
    if Path(source).exists():
        classifier, description = load_classifier(find_checkpoint(source, "source"))
        folders = tuple(description.run.get("class_folders", description.class_names))
        return Model(
            arch=description.arch, classifier=classifier.to(device), class_names=description.class_names,
            class_folders=folders, device=device,
        )  # fmt: skip
    model = Model(arch=str(source), clip=load_pretrained(str(source), pretrained), device=device)
    return model.with_classes(classes, templates) if classes else model


def as_model(model: Any, what: str = "model") -> Model:
    """The model itself. Raises ValueError for anything else."""
    if not isinstance(model, Model):
        raise ValueError(f"{what}: expected a model from cf.load or cf.fine_tune, got {type(model).__name__}")
    return model


def texts(given: Any, what: str) -> tuple[str, ...]:
    """Several texts as a tuple. Raises ValueError for a single one, for empty ones, and for what is no text."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{what}: expected a list of texts, got {given!r}")
    found = tuple(given)
    for text in found:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what}: expected texts that are not empty, got {text!r}")
    return found


def _device(name: str | None) -> str:
    """Raises ValueError for a device that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; use device='cpu'")
    return str(name)


def _decoded(image: Any, size: int) -> Tensor:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return decode(buffer.getvalue(), Transform(size=size))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return _decoded(Image.fromarray(image), size)
    if not isinstance(image, (str, Path)):
        shape = f" {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else ""
        raise ValueError(f"images: {IMAGES}, got {type(image).__name__}{shape}")
    return photograph(Path(image), size)

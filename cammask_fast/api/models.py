"""Models to hold in one's hand: pre-trained CLIPs and fine-tuned classifiers."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.source import find_checkpoint
from cammask_fast.data.iterables import to_uint8
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import PretrainedClip, load_pretrained
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.viz.mask_images import photograph


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

    def with_classes(self, names: Sequence[str], templates: Sequence[str] = ()) -> Model:
        """The zero-shot classifier over class names, with the model's own prompt templates unless others are given.

        Raises ValueError for a fine-tuned model, which has no text tower and keeps its classes.
        """
        classifier = self._clip().classifier(tuple(names), tuple(templates)).to(self.device)
        return replace(self, classifier=classifier, class_names=tuple(names), class_folders=tuple(names))

    def predict(self, images: Any, *, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image with their probabilities.

        images: paths, PIL images, or a tensor as `to_uint8` takes it, already of the model's size.
        """
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
        if isinstance(images, Tensor):
            found = to_uint8(images)
        else:
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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if Path(source).exists():
        classifier, description = load_classifier(find_checkpoint(source, "source"))
        folders = tuple(description.run.get("class_folders", description.class_names))
        return Model(
            arch=description.arch, classifier=classifier.to(device), class_names=description.class_names,
            class_folders=folders, device=device,
        )  # fmt: skip
    model = Model(arch=str(source), clip=load_pretrained(str(source), pretrained), device=device)
    return model.with_classes(classes, templates) if classes else model


def _decoded(image: Any, size: int) -> Tensor:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return decode(buffer.getvalue(), Transform(size=size))
    if not isinstance(image, (str, Path)):
        raise ValueError(f"images: expected paths, PIL images or a tensor, got {type(image).__name__}")
    return photograph(Path(image), size)

"""Fine-tune, evaluate and export from Python, on data of any kind."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cammask_fast.api.models import Model, as_model, texts
from cammask_fast.checkpoint.source import find_checkpoint
from cammask_fast.config import TrainConfig
from cammask_fast.data.augment import Augment
from cammask_fast.data.factory import DataSubset, folders_of, names_of, open_evaluation, open_training
from cammask_fast.data.iterables import IterableLoader, to_labels, to_uint8
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.types import Batch, Loader
from cammask_fast.evaluate import Score
from cammask_fast.evaluate import evaluate as evaluate_models
from cammask_fast.export import Exported
from cammask_fast.export import export as export_checkpoint
from cammask_fast.fitting import fitted_config, given_config
from cammask_fast.masking.kept import kept_relevance
from cammask_fast.model.classifier import Classifier
from cammask_fast.precision import compute_dtype
from cammask_fast.step import Losses, build_step, build_strategy, sample_step_randomness
from cammask_fast.train import fine_tune as train

Data = Any
"""A folder name, `texture-digits`, a torchvision ImageFolder, or an iterable of (images, labels); see `fine_tune`."""


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What `fine_tune` returns. Accuracies are in percent, None without validation images."""

    model: Model
    last: Model
    zero_shot_accuracy: float | None
    accuracy: float | None
    config: TrainConfig

    def _repr_html_(self) -> str:
        before, after = (_percent(value) for value in (self.zero_shot_accuracy, self.accuracy))
        return (
            f"<table><tr><th>{html.escape(self.config.method)}</th><th>zero-shot</th><th>fine-tuned</th></tr>"
            f"<tr><td>validation accuracy</td><td>{before}</td><td>{after}</td></tr></table>"
        )


def fine_tune(
    model: Model,
    data: Data,
    *,
    method: str = "masked-object",
    validation: Data = None,
    class_names: Sequence[str] = (),
    progress: Callable[[str, int, int, float, float], None] | None = None,
    **settings: Any,
) -> FineTuned:
    """Fine-tune a copy of a model; the model itself, which is also the teacher, stays as it is.

    Args:
        model: from `load`; its classes must be those of the data, or come from it.
        data: a folder name (class folders, perhaps in train/ and val/), tar shards, `texture-digits`, a torchvision
            ImageFolder (its root is read), or an iterable of (images, labels), such as a DataLoader: images as
            `data.iterables.to_uint8` takes them, labels int (N,), the batches being the optimiser's.
        method: what trains and what is distilled, a key of `METHODS`.
        validation: data of the same kinds (default: val/ or a tenth of a folder; nothing for an iterable).
        class_names: names for the prompts, for iterables and models without classes.
        progress: called as (phase, images done, images in total, mean loss, share of the time spent waiting for data).
        **settings: fields of `TrainConfig` and `OptimConfig`, such as epochs=3, lr=1e-5; what is not given fits the model and
            the number of images (see `fitting`).

    Returns:
        The best and the last model, and the validation accuracies before and after.

    Raises:
        ValueError: for unknown settings, data that cannot be used, or classes that do not fit.
    """
    model = as_model(model)
    given = {"method": method, **settings}
    config = given_config(given)
    shares = config.accumulate
    if class_names:
        class_names = texts(class_names, "class_names")
    data, validation = folder_of(data), folder_of(validation)
    if isinstance(data, str):

        def fitting_batch(images: int) -> int:
            nonlocal config
            config, _ = fitted_config(model.arch, images, given, shares=shares)
            return config.batch_size

        opened = open_training(
            data, image_size=model.image_size, batch_size=fitting_batch, seed=config.seed, subset=DataSubset(),
            augment=Augment(), class_names=None, loader_config=LoaderConfig(device=model.device),
        )  # fmt: skip
        train_loader: Loader = opened.train
        held_out: Loader | None = opened.validation
        names, folders = tuple(class_names) or opened.class_names, opened.class_folders
    else:
        names = tuple(class_names) or model.class_names
        if not names:
            raise ValueError("class_names: this data does not name its classes, and the model has none")
        batches = IterableLoader(data, image_size=model.image_size, classes=len(names), drop_last=True)
        config, _ = fitted_config(model.arch, batches.images, {**given, "batch_size": batches.batch_size}, shares=shares)
        train_loader, held_out, folders = batches, None, ()
        folders = names
    started = with_data_classes(model, names, folders, renamed=bool(class_names))
    if validation is not None:
        held_out = _evaluation(started, validation)[0]
    classifier = started.with_head()
    before = None if held_out is None else _accuracy(classifier, held_out, model.device)
    tuned = train(classifier, train_loader, held_out, config, progress=progress)
    after = None if held_out is None else _accuracy(tuned.best, held_out, model.device)
    best, last = (replace(started, classifier=found.eval()) for found in (tuned.best, tuned.last))
    return FineTuned(model=best, last=last, zero_shot_accuracy=before, accuracy=after, config=config)


class Scores(dict[str, Score]):
    """A score per evaluation set."""

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{score.images}</td><td>{_percent(score.top1)}</td></tr>"
            for name, score in self.items()
        )
        return f"<table><tr><th>data</th><th>images</th><th>top-1</th></tr>{rows}</table>"


def evaluate(model: Model, data: Data) -> Scores:
    """Top-1 and top-5 accuracy and calibration of a model.

    data: as for `fine_tune`, and ImageNet's family; a folder's classes must be the model's. Raises ValueError on data that
    cannot be used.
    """
    model, data = as_model(model), folder_of(data)
    if isinstance(data, str) and model.classifier is None:
        folders = folders_of([data])
        model = with_data_classes(model, folders if data == "texture-digits" else names_of(None, folders), folders)
    found = _evaluation_sets(model, data)
    scores = Scores()
    for name, (loader, groups, classes) in found.items():
        scores[name] = evaluate_models([model.with_head()], loader, groups=groups, classes=classes, device=model.device)[0]
    return scores


def train_step(
    student: Model | Classifier, teacher: Model | Classifier, *, method: str = "masked-object", seed: int = 0, **settings: Any
) -> Callable[[Tensor, Tensor], Losses]:
    """The gradients of a method, for a training loop of one's own. Clipping and the optimiser's step are the caller's.

    Args:
        student: trains; its parameters are made trainable as the method says.
        teacher: frozen; usually a copy of the student before training.
        method: what trains and what is distilled.
        seed: of the donors and random masks.
        **settings: fields of `TrainConfig`, such as masking="CtxMaskMultiFill(0.3)", w_distill=8.

    Returns:
        A function of (images, labels) that adds the gradients of one batch to the student's `.grad` and returns the losses
        (total, task, distill; scalars on the device).

    Raises:
        ValueError: for unknown settings, and for models that do not fit each other.
    """
    ours, frozen = (
        m if isinstance(m, Classifier) else as_model(m, what).with_head()
        for m, what in ((student, "student"), (teacher, "teacher"))
    )
    if ours.head.weight.shape != frozen.head.weight.shape:
        raise ValueError("student and teacher differ in their classes or width: use a copy of the student")
    config = TrainConfig.from_flat({"method": method, "seed": seed, **settings})
    if config.cam_every > 1 or config.teacher_outputs == "kept":
        raise ValueError("cam_every and teacher_outputs: batches without ids that stay cannot be remembered: leave them out")
    ours.requires_grad_(config.resolved.trained == "all")
    ours.head.requires_grad_(True)
    device = ours.head.weight.device
    stored = frozen.frozen_copy().stored_in(compute_dtype(config.precision, ours.head.weight))
    step, strategy = build_step(ours, stored, config), build_strategy(config)
    generator, patches = torch.Generator(device).manual_seed(config.seed), ours.visual.config.patches
    size = ours.visual.config.image_size

    def run(images: Tensor, labels: Tensor) -> Losses:
        pixels = to_uint8(images).to(device)
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"images: this model takes {size} x {size} pixels, got {pixels.shape[1]} x {pixels.shape[2]}")
        ids = torch.arange(len(pixels), device=device)
        batch = Batch(pixels, to_labels(labels, images=len(pixels), classes=len(ours.head.weight)).to(device), ids)
        if config.cam_source == "teacher":
            batch = batch._replace(relevance=kept_relevance(stored, batch.images, batch.labels, config))
        return step(batch, sample_step_randomness(strategy, batch, patches, generator))

    return run


def export(run: str | Path, to: str, out: str | Path, *, pretrained: str = "") -> Exported:
    """Write a run's weights for another tool; see `cammask export`.

    Args:
        run: a run folder (its best checkpoint) or a checkpoint file.
        to: `open-clip`, `hf`, `onnx` or `torch-export`.
        out: folder, created when it is missing.
        pretrained: weights of the text tower (default: those that the run started from).

    Returns:
        The files, how to load them, and the largest difference on random pixels.

    Raises:
        ValueError: for an unknown format, a checkpoint that cannot be read, a tool that is not installed, or a folder that
            cannot be written.
    """
    return export_checkpoint(find_checkpoint(run, "run"), to, Path(out), pretrained=pretrained)


def folder_of(data: Data) -> Data:
    """The folder behind a name, a path or a torchvision ImageFolder; anything else as it is."""
    if isinstance(data, (str, Path)):
        return str(data)
    if hasattr(data, "classes") and hasattr(data, "samples") and hasattr(data, "root"):
        return str(data.root)
    return data


def with_data_classes(model: Model, names: tuple[str, ...], folders: tuple[str, ...], *, renamed: bool = False) -> Model:
    """The model over the data's classes.

    Args:
        model: with or without classes.
        names: of the data's classes.
        folders: of the data's classes.
        renamed: the caller has named them.

    Returns:
        The model with these classes.

    Raises:
        ValueError: it already has others.
    """
    if model.classifier is None:
        return replace(model.with_classes(names), class_folders=folders)
    if names != model.class_names and (renamed or folders != model.class_folders):
        raise ValueError(
            f"the model has the classes {', '.join(model.class_names[:5])}… and the data {', '.join(names[:5])}…: they differ"
        )
    return model


def _evaluation_sets(model: Model, data: Data) -> dict[str, tuple[Loader, Tensor | None, int | None]]:
    if not isinstance(data, str):
        classes = len(model.with_head().head.weight)
        return {"data": (IterableLoader(data, image_size=model.image_size, classes=classes), None, None)}
    opened = open_evaluation(
        [data], image_size=model.image_size, class_folders=model.class_folders, loader_config=LoaderConfig(device=model.device)
    )
    return {name: (one.loader, one.groups, len(one.class_folders)) for name, one in opened.items()}


def _evaluation(model: Model, data: Data) -> tuple[Loader, Tensor | None, int | None]:
    return next(iter(_evaluation_sets(model, folder_of(data)).values()))


def _accuracy(classifier: Classifier, loader: Loader, device: str) -> float:
    return evaluate_models([classifier], loader, device=device)[0].top1


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"

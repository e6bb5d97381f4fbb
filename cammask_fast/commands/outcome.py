"""What a finished training says of itself: zero-shot against fine-tuned, alarms, and `report.html`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cammask_fast.audit.run import AuditConfig, audit_models
from cammask_fast.audit.subject import benchmark_groups, load_subject
from cammask_fast.checkpoint.heads import Classes
from cammask_fast.config import TrainConfig
from cammask_fast.data.factory import AnyLoader, EvaluationSet, TrainingData
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.loaders.reading import ReadError
from cammask_fast.data.loaders.torch_loader import UNREADABLE
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.data.types import ArrayLoader
from cammask_fast.evaluate import PredictionLog, evaluate
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.notices import warn
from cammask_fast.viz.audit_report import left_out_lines, verdicts, view
from cammask_fast.viz.run_report import SHOWN, counterfactuals, spread_over_classes, thumbnail, worst_images, write_run_report

AUDIT = "audit.json"
MOST_SKIPPED = 0.01
"""Share of the steps that may be skipped before a run says so."""


def alarms(
    before: float | None, after: float | None, *, skipped: int, steps: int, started_from: str = "the zero-shot model"
) -> list[str]:
    """Sentences about a run that did not do what it should.

    Args:
        before: accuracy on the validation images of what the run started from, percent; None without any.
        after: that of the best checkpoint.
        skipped: steps whose loss or gradient was not finite.
        steps: of the run.
        started_from: words for what the run started from.

    Returns:
        The sentences; none for a run that went well.
    """
    found = []
    if before is not None and after is not None and after <= before:
        found.append(
            f"nothing was learnt: the best checkpoint has {after:.2f} % on the validation images and {started_from} "
            f"{before:.2f} %; try a higher --lr, more --epochs or a lower --w-distill"
        )
    if skipped > MOST_SKIPPED * steps:
        found.append(f"{skipped} of {steps} steps were skipped, as their loss or gradients were not finite: try a lower --lr")
    return found


def validated(before: float | None, after: float | None) -> str:
    """The two accuracies in words, empty without validation images."""
    if after is None:
        return ""
    if before is None:
        return f"validation accuracy {after:.2f} %, "
    return f"validation accuracy {after:.2f} % (zero-shot {before:.2f} %), "


def report(
    out: Path, record: Mapping[str, Any], zero_shot: Classifier, best: Classifier, data: TrainingData, config: TrainConfig,
    *, audit: LoaderConfig | None = None,
) -> list[str]:  # fmt: skip
    """Print the alarms of a run and write its report. A report that cannot be made never costs the run.

    All processes of a run call it, as they share the validation images; the main process prints and writes.

    Args:
        out: folder of the run.
        record: what `run.json` holds; empty on processes other than the main one.
        zero_shot: the model before training.
        best: the best checkpoint.
        data: loaders and classes of the run.
        config: settings of the run.
        audit: how the audited images are loaded; None: no audit.

    Returns:
        The alarms.
    """
    predicted = None
    if data.validation is not None:
        device = best.head.weight.device
        log = PredictionLog(torch.arange(len(data.class_names), device=device))
        evaluate([best], data.validation, device=device, seen=log)
        predicted = log.result()
    if not record:
        return []
    said = []
    if config.resolved.trained != "none":
        started, after = (record[name].get("validation") for name in ("start" if "init" in record else "zero_shot", "accuracy"))
        name, steps = record.get("init", "the zero-shot model"), config.epochs * len(data.train)
        said = alarms(started, after, started_from=name, skipped=record["skipped_steps"], steps=steps)
    for line in said:
        print(f"cammask: {line}", file=sys.stderr)
    try:
        gallery = counts = None
        wrong = []
        if predicted is not None and data.validation is not None:
            counts = predicted.confusion(len(data.class_names))[:, :-1]
            size = best.visual.config.image_size
            chosen = predicted.sample_ids[spread_over_classes(predicted.labels, SHOWN)].tolist()
            images = images_of(data.validation, chosen, size)
            shown = [index for index in chosen if index in images]
            if shown:
                labels = data.validation.labels[shown]
                pixels = torch.stack([images[index] for index in shown]).to(best.head.weight.device)
                gallery = counterfactuals(zero_shot, best, pixels, labels.to(pixels.device), data.class_names, config)
            texts = dict(worst_images(predicted, data.class_names))
            wrong = [thumbnail(image, texts[index]) for index, image in images_of(data.validation, list(texts), size).items()]
        found = None if audit is None else audit_of_run(out, zero_shot, best, data, config, audit)
        write_run_report(out, record, gallery=gallery, counts=counts, wrong=wrong, alarms=said, audit=found)
    except Exception as error:  # the weights are written: pictures must not turn success into failure
        warn(f"no {out / 'report.html'} ({type(error).__name__}: {error})")
    return said


def audit_of_run(
    out: Path, before: Classifier, best: Classifier, data: TrainingData, config: TrainConfig, loader_config: LoaderConfig
) -> dict[str, Any] | None:
    """Audit a run's validation images: the best checkpoint against the model before training, on the same counterfactuals.

    Prints what was found and writes `audit.json`. An audit that cannot be made is a warning.

    Args:
        out: folder of the run.
        before: the model before training.
        best: the best checkpoint.
        data: loaders and classes of the run.
        config: settings of the run, of which map and seed count.
        loader_config: how the images are loaded.

    Returns:
        What the report shows; None where the images cannot be audited.
    """
    assert data.validation is not None
    classes = Classes(data.class_names, data.class_folders)
    one = EvaluationSet(data.validation, data.validation.labels, data.class_folders, torch.arange(len(data.class_names)))
    settings = AuditConfig(cam=config.cam, start_layer=config.cam_start_layer, seed=config.seed)
    try:
        groups = benchmark_groups() if isinstance(data.validation, ArrayLoader) else None
        subject, _ = load_subject(one, classes, settings, loader_config, groups=groups)
        models = [("fine-tuned", best), *([] if before is best else [("before training", before)])]
        audited = audit_models(models, subject, settings)
    except ValueError as error:
        warn(f"no audit: {error}")
        return None
    for line in [*left_out_lines(audited), *verdicts(audited)]:
        print(f"audit: {line}")
    write_text(out / AUDIT, json.dumps(audited.to_dict(), indent=1) + "\n")
    return view(audited)


def images_of(loader: AnyLoader | None, sample_ids: Sequence[int], size: int) -> dict[int, Tensor]:
    """Images of a loader as evaluation sees them; those that cannot be read are left out.

    Args:
        loader: of validation images.
        sample_ids: which ones.
        size: of the model, in pixels.

    Returns:
        uint8 (size, size, 3) by sample id.
    """
    found = {}
    for index in sample_ids if loader is not None else ():
        if isinstance(loader, ArrayLoader):
            found[index] = loader.images[index].cpu()
            continue
        assert loader is not None
        with contextlib.suppress(*UNREADABLE, ReadError):
            found[index] = decode(loader.source.read(index), Transform(size=size))
    return found

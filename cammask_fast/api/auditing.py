"""What a model looks at, from Python."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cammask_fast.api.models import Model, as_model
from cammask_fast.api.training import Data, folder_of, with_data_classes
from cammask_fast.audit.run import AuditConfig, Audited, Subject, audit_models
from cammask_fast.audit.subject import benchmark_groups, load_subject, read_groups
from cammask_fast.audit.trials import choose_images
from cammask_fast.checkpoint.heads import Classes
from cammask_fast.data.factory import BENCHMARK, EvaluationSet, folders_of, names_of, open_benchmark, open_evaluation
from cammask_fast.data.iterables import IterableLoader
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.runtime.files import write_text
from cammask_fast.viz.audit_report import audit_page, classes_table, reliance_table, tests_table, verdicts


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found; see `audit`. audited: the tests, the answers and all figures."""

    audited: Audited

    @property
    def context_reliance(self) -> float | None:
        """Drop of the true class's probability under other classes' context, beyond that under its own class's."""
        return self.audited.findings[0].context_reliance

    @property
    def object_reliance(self) -> float | None:
        """Drop of the true class's probability without the object, beyond that with as many random patches filled."""
        return self.audited.findings[0].object_reliance

    def to_dict(self) -> dict[str, Any]:
        """What `cammask audit --json` prints."""
        return self.audited.to_dict()

    def save(self, path: str | Path) -> None:
        """Write the page of `cammask audit --html`."""
        write_text(Path(path), audit_page(self.audited, {}))

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in verdicts(self.audited))
        for table in (tests_table(self.audited), reliance_table(self.audited), classes_table(self.audited)):
            rows = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows]
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
            said += f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else ""
        return said


@torch.inference_mode(False)
def audit(
    model: Model,
    data: Data,
    *,
    against: Model | None = None,
    masks: str | Path | Tensor | None = None,
    maps_by: Model | None = None,
    groups: Any = None,
    images: int = 500,
    contexts: int = 4,
    kind: str = "mm-cam",
    start_layer: int = 0,
    object_share: float = 0.5,
    seed: int = 0,
) -> Audit:
    """Find out whether a model looks at the object or at its context; see `cammask audit`.

    Args:
        model: from `load` or `fine_tune`.
        data: as for `evaluate`; of a folder one set.
        against: a second model with the same classes, asked the same counterfactuals.
        masks: a folder of mask images; for an iterable of batches bool or float (M, S, S), the object's share of each pixel.
        maps_by: whose maps tell object from context, without masks (default: the model's own).
        groups: a file as for `--groups`, or int64 (C,) with one number for classes that share a context.
        images: at most so many, evenly over the classes.
        contexts: of other images, per image and test.
        kind: which map, as for `cam`.
        start_layer: first layer of the map.
        object_share: share of the patches that are the object, those with the highest map.
        seed: of all draws.

    Returns:
        The figures; `save` writes them as a page.

    Raises:
        ValueError: data, masks or models that do not fit each other, or images that cannot be audited.
    """
    data, device = folder_of(data), as_model(model).device
    config = AuditConfig(
        cam=kind, start_layer=start_layer, share=object_share, donors=contexts, images=images, seed=seed
    )  # fmt: skip
    if isinstance(data, str):
        if model.classifier is None:
            folders = folders_of([data])
            model = with_data_classes(model, folders if data == BENCHMARK else names_of(None, folders), folders)
        one = _one_set(data, model)
        if isinstance(masks, Tensor):
            raise ValueError("masks: expected the folder of their images, as the data is a folder")
        chosen = _groups(groups, one.class_folders, data)
        classes, given = Classes(model.class_names, model.class_folders), None if masks is None else Path(masks)
        subject, _ = load_subject(one, classes, config, LoaderConfig(device=device), masks=given, groups=chosen)
    else:
        subject = _subject_of(model, data, config, masks, groups)
    models = [("the model", model.with_head())]
    if against is not None:
        models.append(("the other model", _same_classes(as_model(against, "against"), model, "against")))
    shown = None if maps_by is None else _same_classes(as_model(maps_by, "maps_by"), model, "maps_by")
    return Audit(audited=audit_models(models, subject, config, maps_by=shown))


def _one_set(data: str, model: Model) -> EvaluationSet:
    if data == BENCHMARK:
        return open_benchmark(["id"], model.image_size, model.class_folders, LoaderConfig(device=model.device))["id"]
    sets = open_evaluation(
        [data], image_size=model.image_size, class_folders=model.class_folders, loader_config=LoaderConfig(device=model.device),
        allow_incomplete=True,
    )  # fmt: skip
    if len(sets) > 1:
        raise ValueError(f"data {data}: holds several sets, {', '.join(sets)}: name the folder of one")
    return next(iter(sets.values()))


def _groups(given: Any, folders: tuple[str, ...], data: Any) -> Tensor | None:
    if given is None:
        return benchmark_groups() if isinstance(data, str) and data == BENCHMARK else None
    if isinstance(given, (str, Path)):
        return read_groups(Path(given), folders)
    numbers = torch.as_tensor(given)
    if numbers.shape != (len(folders),) or numbers.dtype != torch.int64 or int(numbers.min()) < 0:
        raise ValueError(f"groups: expected a file, or a whole number from 0 for each of the {len(folders)} classes")
    return numbers


def _subject_of(model: Model, data: Any, config: AuditConfig, masks: Any, groups: Any) -> Subject:
    """The images of an iterable of batches."""
    names = model.class_names
    loader = IterableLoader(data, image_size=model.image_size, classes=len(model.with_head().head.weight))
    batches = [(batch.images.cpu(), batch.labels.cpu()) for batch in loader]
    pixels, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    size = model.image_size
    if masks is not None and (not isinstance(masks, Tensor) or masks.shape != (len(labels), size, size)):
        raise ValueError(f"masks: expected bool or float ({len(labels)}, {size}, {size}), as the data is no folder")
    chosen = choose_images(labels, config.images, seed=config.seed)
    return Subject(
        images=pixels[chosen], labels=labels[chosen], class_names=names, groups=_groups(groups, names, data),
        coverage=None if masks is None else masks[chosen].float().cpu(),
    )  # fmt: skip


def _same_classes(other: Model, model: Model, what: str) -> Any:
    """The classifier of a second model. Raises ValueError where it has other classes, or these in another order."""
    if other.classifier is None:
        other = replace(other.with_classes(model.class_names), class_folders=model.class_folders)
    if other.class_names != model.class_names:
        raise ValueError(f"{what}: expected a model with the same classes in the same order")
    return other.with_head()

"""The images of an audit from an evaluation set: which ones, their names, their masks, and classes that share a context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.audit.run import AuditConfig, Subject
from cammask_fast.audit.trials import choose_images
from cammask_fast.checkpoint.heads import Classes
from cammask_fast.data.class_names import match_names, some
from cammask_fast.data.datasets.texture_digits import GROUPS
from cammask_fast.data.factory import AnyLoader, EvaluationSet
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.object_masks import read_images, read_masks
from cammask_fast.data.text_files import read_numbered_lines
from cammask_fast.runtime.notices import remark


class LoadedSubject(NamedTuple):
    """The images, and the loader that read them, which knows what cannot be read."""

    subject: Subject
    loader: AnyLoader


def load_subject(
    one: EvaluationSet, classes: Classes, config: AuditConfig, loader_config: LoaderConfig, *, masks: Path | None = None,
    groups: Tensor | None = None,
) -> LoadedSubject:  # fmt: skip
    """Read the images of an audit, and their masks where these are given.

    Args:
        one: the set.
        classes: of the model.
        config: says how many images.
        loader_config: how they are loaded.
        masks: folder of their masks, see `read_masks`.
        groups: int64 (C,), of classes that share a context.

    Returns:
        The images.

    Raises:
        ValueError: nothing can be read.
    """
    chosen = choose_images(one.labels, config.images, seed=config.seed)
    if len(chosen) < len(one.labels):
        kept, known = one.labels[chosen].unique(), one.labels.unique()
        some_classes = f", from {len(kept)} of {len(known)} classes" if len(kept) < len(known) else ""
        remark(f"{len(chosen)} of {len(one.labels)} images are audited{some_classes}; --images takes more")
    batch, loader = read_images(one.loader, chosen, loader_config)
    coverage = None if masks is None else read_masks(masks, one.loader, batch.sample_ids.tolist())
    subject = Subject(
        images=batch.images, labels=batch.labels, class_names=shown_names(one.class_folders, classes), logits=one.groups,
        groups=groups, coverage=coverage,
    )  # fmt: skip
    return LoadedSubject(subject, loader)


def benchmark_groups() -> Tensor:
    """int64 (10,): the benchmark's digits by the background that they share, which is a remark."""
    remark("digits 0-4 share a background, and so do 5-9: they are two groups")
    return torch.tensor(GROUPS)


def shown_names(folders: Sequence[str], classes: Classes) -> tuple[str, ...]:
    """The model's names of class folders, or the folders themselves where two would be called the same."""
    name_of = dict(zip(classes.folders, classes.names, strict=True))
    names = tuple(name_of.get(folder, folder) for folder in folders)
    return names if len(set(names)) == len(names) else tuple(folders)


def read_groups(file: Path, folders: Sequence[str]) -> Tensor:
    """Read `--groups`: a line per class, its folder and its group with a tab or a comma between them.

    A class without a line is a group of its own. Returns int64 (C,). Raises ValueError for other lines and for classes that are
    not there.
    """
    pairs: dict[str, str] = {}
    for number, line in read_numbered_lines(file):
        folder, mark, group = line.rpartition("\t" if "\t" in line else ",")
        if not mark or not folder.strip() or not group.strip():
            raise ValueError(f"--groups {file}: line {number}: expected FOLDER<TAB>GROUP, got {line!r}")
        pairs[folder.strip()] = group.strip()
    matched, unknown = match_names(list(pairs), folders)
    if unknown:
        raise ValueError(f"--groups {file}: no class {some(unknown)}; the classes are {some(folders)}")
    group_of = dict(zip(matched, pairs.values(), strict=True))
    alone = [folder for folder in folders if folder not in group_of]
    if alone:
        remark(f"--groups {file}: classes that are groups of their own: {len(alone)}, {some(alone)}")
    names = [("group", group_of[folder]) if folder in group_of else ("class", folder) for folder in folders]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])

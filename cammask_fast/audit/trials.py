"""The counterfactual images of an audit: which images take part, whose context each of them gets, and the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cammask_fast.kernels.masked_fill import masked_fill
from cammask_fast.kernels.reference import fill_pixels
from cammask_fast.kernels.reference.pixels import grid_of

TESTS = ("clean", "same_context", "other_context", "object_filled", "random_filled")
"""In the order of the tables."""
NO_OBJECT, NO_CONTEXT = "a mask that covers nothing", "a mask that covers everything"
ALONE = "no other image of the class to take a context from"
CHUNK_PIXELS = 64 * 224 * 224
"""Pixels of a batch of counterfactuals."""


LEAST = 4
"""Images of a class, at least, where not all classes fit into an audit."""


def choose_images(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Choose images for an audit, as many of each class as can be; of too many classes some, from all over their list.

    Args:
        labels: int64 (M,).
        count: images that are wanted.
        seed: of the choice within a class.

    Returns:
        int64 (up to count,), indices in rising order.

    Raises:
        ValueError: fewer than two images wanted.
    """
    if count < 2:
        raise ValueError(f"images: expected 2 or more to audit, got {count}")
    if len(labels) <= count:
        return torch.arange(len(labels))
    present = labels.unique()
    few = min(len(present), max(2, count // LEAST))
    kept = present[torch.linspace(0, len(present) - 1, few).round().long()] if few < len(present) else present
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.isin(labels[order], kept)]
    order = order[labels[order].argsort(stable=True)]
    first = torch.searchsorted(labels[order], labels[order])
    turn = torch.arange(len(order)) - first  # the first of every class, then the second …
    return order[turn.argsort(stable=True)][:count].sort().values


class Selected(NamedTuple):
    """order: int64 (M,), indices of the images with an object and a context, the audited ones first. audited: how many these
    are, N. left_out: bool (all,) by reason, images that are not audited; a reason without images is not there."""

    order: Tensor
    audited: int
    left_out: dict[str, Tensor]


def select_images(labels: Tensor, masks: Tensor, groups: Tensor) -> Selected:
    """Find the images that can be audited: those with an object, a context, and another such image in their group.

    Args:
        labels: int64 (M,).
        masks: bool (M, P), True on the object.
        groups: int64 (C,), for each label the group of classes that share a context.

    Returns:
        The images and why others are left out.
    """
    covered = masks.sum(1)
    empty, full = covered == 0, covered == masks.shape[1]
    usable = ~(empty | full)
    group = groups[labels]
    counts = torch.bincount(group[usable], minlength=int(groups.max()) + 1)
    alone = usable & (counts[group] < 2)
    audited = usable & ~alone
    order = torch.cat([audited.nonzero()[:, 0], (usable & ~audited).nonzero()[:, 0]])
    reasons = {NO_OBJECT: empty, NO_CONTEXT: full, ALONE: alone}
    return Selected(order, int(audited.sum()), {reason: who for reason, who in reasons.items() if who.any()})


def draw_same(groups_M: Tensor, audited: int, donors: int, generator: torch.Generator) -> Tensor:
    """Draw other images of the same group, without replacement as far as they go.

    Args:
        groups_M: int64 (M,), the group of every image.
        audited: the first N images, which get donors; each group among them has two images or more.
        donors: per image, D.
        generator: advances.

    Returns:
        int64 (N, D), indices into the M images.
    """
    drawn = torch.empty(audited, donors, dtype=torch.int64)
    for group in groups_M[:audited].unique().tolist():
        members = (groups_M == group).nonzero()[:, 0]
        own = members[members < audited]
        keys = torch.rand(len(own), len(members), generator=generator)
        keys[own[:, None] == members] = torch.inf  # never the image itself
        drawn[own] = members[_first(keys, len(members) - 1, donors)]
    return drawn


def draw_other(labels_M: Tensor, groups_M: Tensor, audited: int, donors: int, generator: torch.Generator) -> Tensor | None:
    """Draw images of other groups: a class each, every class as likely, without replacement as far as they go; then an image.

    Args:
        labels_M: int64 (M,).
        groups_M: int64 (M,), the group of every image.
        audited: the first N images, which get donors.
        donors: per image, D.
        generator: advances.

    Returns:
        int64 (N, D), indices into the M images; None where all are of one group.
    """
    if len(groups_M.unique()) < 2:
        return None
    _, inverse, counts = labels_M.unique(return_inverse=True, return_counts=True)
    by_class = inverse.argsort(stable=True)
    first = counts.cumsum(0) - counts
    group_of_class = groups_M[by_class[first]]
    drawn = torch.empty(audited, donors, dtype=torch.int64)
    for group in groups_M[:audited].unique().tolist():
        own = (groups_M[:audited] == group).nonzero()[:, 0]
        others = (group_of_class != group).nonzero()[:, 0]
        chosen = others[_first(torch.rand(len(own), len(others), generator=generator), len(others), donors)]
        offset = (torch.rand(chosen.shape, generator=generator) * counts[chosen]).long()
        drawn[own] = by_class[first[chosen] + offset]
    return drawn


def _first(keys: Tensor, available: int, count: int) -> Tensor:
    """int64 (n, count): the columns of the lowest keys in rising order, from the beginning again after `available`."""
    return keys.argsort(1)[:, torch.arange(count) % available]


def covered_objects(images: Tensor, masks: Tensor, generator: torch.Generator) -> Tensor:
    """Cover each image's object with patches of its own context, in random order.

    Args:
        images: uint8 (M, H, W, 3).
        masks: bool (M, P), True on the object; every image has a context.
        generator: advances.

    Returns:
        uint8 (M, H, W, 3): context everywhere.
    """
    count, patches = masks.shape
    side = images.shape[1]
    grid = grid_of(patches, side)
    size = side // grid
    keys = torch.rand(count, patches, generator=generator).masked_fill(masks, torch.inf)
    turn = (masks.cumsum(1) - 1) % (~masks).sum(1, keepdim=True)
    source = torch.where(masks, keys.argsort(1).gather(1, turn), torch.arange(patches))
    cut = images.view(count, grid, size, grid, size * 3).transpose(2, 3).reshape(count, patches, size * size * 3)
    moved = torch.stack([one[where] for one, where in zip(cut, source, strict=True)]) if count else cut
    return moved.view(count, grid, grid, size, size * 3).transpose(2, 3).reshape(images.shape)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The counterfactual tests of N images. A donor is an index into `pool`."""

    pool: Tensor
    """uint8 (2 M, H, W, 3): M images, the audited ones first, then the same with their objects covered."""
    labels: Tensor
    """int64 (M,)."""
    groups: Tensor
    """int64 (C,), for each label the group of classes that share a context."""
    masks: dict[str, Tensor]
    """bool (N, P) by test: the patches that are filled; none for `clean`."""
    donors: dict[str, Tensor]
    """int64 (N, D) by test, at least M; `other_context` is not there where all images are of one group."""
    images: Tensor
    """int64 (N,), the audited images' indices among those that were given."""
    given_labels: Tensor
    """int64 (all that were given,)."""
    left_out: dict[str, Tensor]
    """bool (all that were given,) by reason: images that are not audited."""

    @property
    def audited(self) -> int:
        """Images, N."""
        return len(self.images)

    def counts(self, classes: int) -> Tensor:
        """int64 (classes,), images that were given, by label."""
        return torch.bincount(self.given_labels, minlength=classes)

    def draws(self, test: str) -> int:
        """Counterfactuals per image."""
        return self.donors[test].shape[1] if test in self.donors else 1

    def donor_labels(self, test: str) -> Tensor:
        """int64 (N, D), the class whose context an image gets."""
        return self.labels[self.donors[test] - len(self.labels)]

    def batches(self, test: str, draw: int, *, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The pixels of one draw of a test, a chunk of images at a time.

        Args:
            test: one of `TESTS` that is in `masks`.
            draw: which donor, 0 to D - 1.
            dtype: of the pixels.

        Yields:
            The chunk's position among the N images, and normalised pixels (n, 3, H, W) on the pool's device.
        """
        pool, device = self.pool, self.pool.device
        mask = self.masks[test].to(device)
        donors = self.donors[test][:, draw].to(device) if test in self.donors else torch.arange(self.audited, device=device)
        size = max(1, CHUNK_PIXELS // pool[0, ..., 0].numel())
        for start in range(0, self.audited, size):
            chunk = slice(start, min(start + size, self.audited))
            first = torch.full((), start, dtype=torch.int64, device=device)
            yield chunk, masked_fill(pool, mask[chunk], donors[chunk], dtype=dtype, first=first)

    def picture(self, test: str, image: int, draw: int = 0) -> Tensor:
        """One counterfactual before normalisation.

        Args:
            test: one of `TESTS` that is in `masks`.
            image: 0 to N - 1.
            draw: which donor, 0 to D - 1.

        Returns:
            uint8 (H, W, 3).
        """
        donor = self.donors[test][image, draw] if test in self.donors else torch.tensor(image)
        pair = torch.stack([self.pool[image], self.pool[donor]])
        return fill_pixels(pair, self.masks[test][image : image + 1], torch.tensor([1]), first=torch.tensor(0))[0]


def build_trials(
    images: Tensor, labels: Tensor, masks: Tensor, *, classes: int, donors: int = 4, seed: int = 0, groups: Tensor | None = None
) -> Trials:
    """Design the counterfactual tests of labelled images whose objects are known.

    Args:
        images: uint8 (M, H, W, 3).
        labels: int64 (M,).
        masks: bool (M, P), True on the object, row-major patches.
        classes: number of labels, C.
        donors: contexts per image and test, D.
        seed: of donors, random masks and covered objects.
        groups: int64 (C,), for each label the group of classes that share a context; None: every class is one.

    Returns:
        The tests.

    Raises:
        ValueError: shapes that do not fit, no donors, or no image that can be audited, with the reasons.
    """
    if masks.dtype != torch.bool or masks.ndim != 2 or not len(images) == len(labels) == len(masks):
        raise ValueError(f"masks: expected bool ({len(images)}, P) and a label each, got {masks.dtype} {tuple(masks.shape)}")
    if donors < 1:
        raise ValueError(f"donors: expected 1 or more per image, got {donors}")
    if not len(labels):
        raise ValueError("there are no images to audit")
    groups = torch.arange(classes) if groups is None else groups
    chosen = select_images(labels, masks, groups)
    if not chosen.audited:
        said = "; ".join(f"{int(who.sum())} images: {reason}" for reason, who in chosen.left_out.items())
        raise ValueError(f"no image can be audited: {said}")
    generator = torch.Generator().manual_seed(seed)
    given, (images, labels, masks) = labels, (one[chosen.order] for one in (images, labels, masks))
    own_groups, count = groups[labels], chosen.audited
    same = draw_same(own_groups, count, donors, generator)
    other = draw_other(labels, own_groups, count, donors, generator)
    own = masks[:count]
    order = torch.rand(own.shape, generator=generator).argsort(1).argsort(1)
    filled = {
        "clean": torch.zeros_like(own), "same_context": ~own, "other_context": ~own, "object_filled": own,
        "random_filled": order < own.sum(1, keepdim=True),
    }  # fmt: skip
    of_test = {"same_context": same, "other_context": other, "object_filled": same, "random_filled": same}
    return Trials(
        pool=torch.cat([images, covered_objects(images, masks, generator)]), labels=labels, groups=groups,
        masks={name: mask for name, mask in filled.items() if name != "other_context" or other is not None},
        donors={name: drawn + len(labels) for name, drawn in of_test.items() if drawn is not None},
        images=chosen.order[:count], given_labels=given, left_out=chosen.left_out,
    )  # fmt: skip

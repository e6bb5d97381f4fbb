"""The audit's tests and figures: on classifiers that are known to look at the object or at the background alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap as scipy_bootstrap
from torch import Tensor

from cammask_fast.audit import TESTS, Findings, Trials, ask, build_trials, compare, findings, object_masks
from cammask_fast.audit.figures import CONTEXT, OBJECT, bootstrap, calibration_error
from cammask_fast.audit.run import AuditConfig, Subject, audit_models
from cammask_fast.audit.trials import (
    ALONE,
    NO_CONTEXT,
    NO_OBJECT,
    choose_images,
    covered_objects,
    draw_other,
    draw_same,
    select_images,
)
from cammask_fast.cam import relevance_of
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.evaluate import AccuracyMeter
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.model.zero_shot import tiny_classifier

NAMES = ("cow", "sheep", "whale")
SIDE, GRID = 32, 4
CENTRE = [5, 6, 9, 10]
"""Patches of the object."""


def scenes(count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Images whose background tells the class in red and whose object in green, with a little noise; labels; masks."""
    labels = torch.arange(len(NAMES)).repeat(count)
    images = torch.zeros(len(labels), SIDE, SIDE, 3, dtype=torch.uint8)
    images[..., 0] = (60 + 80 * labels + torch.randint(0, 9, labels.shape))[:, None, None]
    green = 60 + 80 * labels + torch.randint(0, 9, labels.shape)
    images[:, 8:24, 8:24] = torch.stack([green * 0, green, green * 0], 1).to(torch.uint8)[:, None, None]
    masks = torch.zeros(len(labels), GRID * GRID, dtype=torch.bool)
    masks[:, CENTRE] = True
    return images, labels, masks


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Images of the benchmark and their labels."""
    chosen = sample_scenes(evaluation_specifications()["id"])[slice(0, count)]
    return render(chosen), torch.from_numpy(chosen.labels)


def looks_at(channel: int, where: slice) -> Callable[[Tensor], Tensor]:
    """A classifier that compares the mean of a channel in a square with each class's level."""

    def logits(pixels: Tensor) -> Tensor:
        level = 255 * (pixels[:, channel, where, where].mean((1, 2)) * CLIP_STD[channel] + CLIP_MEAN[channel])
        return -(level[:, None] - torch.tensor([64.0, 144.0, 224.0])).abs() / 4

    return logits


BACKGROUND, THING = looks_at(0, slice(0, 8)), looks_at(1, slice(12, 20))


def audited(model: Callable[[Tensor], Tensor], **changes: Any) -> tuple[Trials, Findings]:
    torch.manual_seed(3)
    images, labels, masks = scenes()
    trials = build_trials(images, labels, masks, classes=len(NAMES), **changes)
    return trials, findings(trials, ask(model, trials), NAMES)


def test_a_classifier_of_the_background_is_recognised() -> None:
    trials, found = audited(BACKGROUND)
    assert trials.audited == 24
    assert found.context_reliance == pytest.approx(1, abs=0.01)
    assert found.object_reliance == pytest.approx(0, abs=0.01)
    shown = {test: one.value for test, one in found.accuracy.items()}
    assert shown == {"clean": 100, "same_context": 100, "other_context": 0, "object_filled": 100, "random_filled": 100}
    cow = found.classes["cow"]
    assert cow.captured_by == {"sheep": 1.0, "whale": 1.0}
    assert cow.captures == 1.0
    assert sum(cow.confused_with.values()) == pytest.approx(1)
    assert set(cow.confused_with) == {"sheep", "whale"}
    bounds = found.reliance[CONTEXT].bounds()
    assert bounds is not None
    assert bounds[0] > 0.98


def test_a_classifier_of_the_object_is_recognised() -> None:
    _, found = audited(THING)
    assert found.context_reliance == pytest.approx(0, abs=0.01)
    assert found.object_reliance is not None
    assert found.object_reliance > 0.3
    shown = {test: one.value or 0.0 for test, one in found.accuracy.items()}
    assert [shown[test] for test in TESTS[:3]] == [100, 100, 100]
    assert shown["object_filled"] < 40 < shown["random_filled"]
    assert all(one.captured_by == {} and one.confused_with == {} and one.captures == 0 for one in found.classes.values())


def test_the_figures_are_what_their_definitions_say() -> None:
    """Recomputed image by image, draw by draw."""
    mixed = lambda pixels: 0.3 * BACKGROUND(pixels) + 0.1 * THING(pixels)  # noqa: E731
    trials, found = audited(mixed, donors=3)
    truth: dict[str, list[float]] = {}
    for test in TESTS:
        means = []
        for image in range(trials.audited):
            draws = []
            for draw in range(trials.draws(test)):
                pixels = (trials.picture(test, image, draw).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
                draws.append(float(mixed(pixels.permute(2, 0, 1)[None]).softmax(1)[0, trials.labels[image]]))
            means.append(sum(draws) / len(draws))
        truth[test] = means
    drop = {test: np.mean(truth["clean"]) - np.mean(truth[test]) for test in TESTS}
    assert found.context_reliance == pytest.approx(drop["other_context"] - drop["same_context"], abs=1e-6)
    assert found.object_reliance == pytest.approx(drop["object_filled"] - drop["random_filled"], abs=1e-6)
    assert found.probability["other_context"].value == pytest.approx(np.mean(truth["other_context"]), abs=1e-6)


def test_what_a_counterfactual_is_made_of() -> None:
    torch.manual_seed(3)
    images, labels, masks = scenes()
    trials = build_trials(images, labels, masks, classes=3)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[8:24, 8:24] = True
    for image in range(5):
        own, kept, removed = (trials.picture(test, image, 1) for test in ("clean", "other_context", "object_filled"))
        assert torch.equal(own, images[image])
        assert torch.equal(kept[inside], own[inside]), "the object is kept"
        red = 60 + 80 * int(trials.donor_labels("other_context")[image, 1])
        assert kept[~inside][:, 0].min() >= red, "the context is the donor's"
        assert kept[~inside][:, 0].max() < red + 9
        assert torch.equal(removed[~inside], own[~inside])
        assert removed[..., 1].max() == 0, "no donor brings its object along"
        assert (trials.donor_labels("same_context")[image] == labels[image]).all()
        assert (trials.donor_labels("other_context")[image] != labels[image]).all()
    assert (trials.masks["random_filled"].sum(1) == 4).all()
    assert len(trials.masks["random_filled"].unique(dim=0)) > 5
    chunk, pixels = next(trials.batches("other_context", 1, dtype=torch.float32))
    assert chunk == slice(0, 24)
    expected = (trials.picture("other_context", 7, 1).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels[7], expected.permute(2, 0, 1))


def test_donors_are_drawn_by_class_and_never_the_image_itself() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    same = draw_same(labels, 7, 4, generator)
    assert (labels[same] == labels[:7, None]).all()
    assert (same != torch.arange(7)[:, None]).all()
    assert all(len(row.unique()) == 4 for row in same[:5]), "without replacement while there are others"
    assert same[5:].tolist() == [[6] * 4, [5] * 4]
    other = draw_other(labels, labels, 7, 3, generator)
    assert other is not None
    assert all(sorted(labels[row].tolist()) == [1, 2, 3] for row in other[:5]), "every other class once"
    assert draw_other(labels, labels * 0, 7, 3, generator) is None
    grouped = draw_other(labels, (labels > 1).long(), 7, 4, generator)
    assert grouped is not None
    assert set(labels[grouped].flatten().tolist()) == {2, 3}, "classes of the own group give no context"
    many = draw_other(torch.tensor([0] * 50 + [1] * 2), torch.tensor([0] * 50 + [1] * 2), 50, 4, generator)
    assert many is not None
    assert set(many.flatten().tolist()) == {50, 51}


def test_images_that_cannot_be_audited_are_counted_by_reason() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    masks = torch.zeros(7, 16, dtype=torch.bool)
    masks[:, 3] = True
    masks[0], masks[1] = False, True
    chosen = select_images(labels, masks, torch.arange(3))
    assert chosen.order.tolist() == [2, 3, 5, 6, 4]
    assert chosen.audited == 4
    assert {reason: who.nonzero()[:, 0].tolist() for reason, who in chosen.left_out.items()} == {
        NO_OBJECT: [0], NO_CONTEXT: [1], ALONE: [4],
    }  # fmt: skip
    images = torch.randint(0, 255, (7, SIDE, SIDE, 3), dtype=torch.uint8)
    found = findings(trials := build_trials(images, labels, masks, classes=3), ask(BACKGROUND, trials), NAMES)
    assert trials.images.tolist() == [2, 3, 5, 6]
    assert {name: (one.images, one.left_out) for name, one in found.classes.items()} == {
        "cow": (2, 2), "sheep": (0, 1), "whale": (2, 0),
    }  # fmt: skip
    assert found.classes["sheep"].to_dict()[CONTEXT] is None
    assert found.classes["sheep"].captures is not None, "an image without a partner still donates"
    with pytest.raises(ValueError, match="no image can be audited: 7 images: a mask that covers nothing"):
        build_trials(images, labels, masks & False, classes=3)
    with pytest.raises(ValueError, match="no image can be audited: 2 images: no other image of the class"):
        build_trials(images[3:5], labels[3:5], masks[3:5], classes=3)
    with pytest.raises(ValueError, match="no images to audit"):
        build_trials(images[:0], labels[:0], masks[:0], classes=3)
    with pytest.raises(ValueError, match="donors: expected 1 or more"):
        build_trials(images, labels, masks, classes=3, donors=0)
    with pytest.raises(ValueError, match="masks: expected bool"):
        build_trials(images, labels, masks.float(), classes=3)


def test_a_single_class_has_no_context_reliance() -> None:
    images, labels, masks = scenes()
    rows = labels == 1
    trials = build_trials(images[rows], labels[rows], masks[rows], classes=3)
    found = findings(trials, ask(THING, trials), NAMES)
    assert found.context_reliance is None
    assert "other_context" not in found.accuracy
    assert found.object_reliance is not None
    record = found.to_dict()
    assert set(record) == {"accuracy", "context_reliance", "object_reliance", "interval", "classes"}
    assert record["classes"]["sheep"]["captured_by"] == {}
    assert record["classes"]["sheep"]["captures"] is None


def test_the_same_seed_gives_the_same_tests() -> None:
    images, labels, masks = scenes()
    one, again, other = (build_trials(images, labels, masks, classes=3, seed=seed) for seed in (1, 1, 2))
    for test in TESTS[1:]:
        assert torch.equal(one.donors[test], again.donors[test])
        assert torch.equal(one.masks[test], again.masks[test])
    assert torch.equal(one.pool, again.pool)
    assert not torch.equal(one.donors["other_context"], other.donors["other_context"])
    assert not torch.equal(one.masks["random_filled"], other.masks["random_filled"])


def test_an_objects_cover_is_its_own_context() -> None:
    images = (
        torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1).repeat_interleave(2, 1).repeat_interleave(2, 2).repeat(3, 1, 1, 3)
    )
    masks = torch.zeros(3, 16, dtype=torch.bool)
    masks[0, :4], masks[1, 1:] = True, True
    covered = covered_objects(images, masks, torch.Generator().manual_seed(0))[:, ::2, ::2, 0].flatten(1)
    assert covered[0, 4:].tolist() == list(range(4, 16))
    assert len(set(covered[0, :4].tolist())) == 4, "each patch once while there are others"
    assert covered[0, :4].min() >= 4
    assert covered[1].tolist() == [0] * 16
    assert torch.equal(covered[2], torch.arange(16, dtype=torch.uint8))


def test_calibration_and_groups_of_logits_agree_with_evaluation() -> None:
    """Four logits, two of which are right for class 1 and one of which does not count."""
    images, labels, masks = scenes()
    weights = torch.randn(3, 4)
    groups = torch.tensor([0, 1, 1, -1])
    keep = labels < 2
    trials = build_trials(images[keep], labels[keep], masks[keep], classes=2)
    model = lambda pixels: pixels.mean((2, 3)) @ weights  # noqa: E731
    answers = ask(model, trials, groups=groups)
    meter, summed = AccuracyMeter(groups, 2), []
    for chunk, pixels in trials.batches("clean", 0, dtype=torch.float32):
        meter.add(model(pixels), trials.labels[: trials.audited][chunk])
        shares = model(pixels)[:, :3].double().softmax(1)
        summed.append(torch.where(trials.labels[: trials.audited][chunk] == 0, shares[:, 0], shares[:, 1] + shares[:, 2]))
    score, found = meter.score(), findings(trials, answers, NAMES[:2])
    assert found.accuracy["clean"].value == pytest.approx(score.top1)
    assert found.calibration_error["clean"] == pytest.approx(score.calibration_error, abs=1e-4)
    assert calibration_error(answers["clean"], trials.labels[: trials.audited]) == found.calibration_error["clean"]
    torch.testing.assert_close(answers["clean"].truth[:, 0], torch.cat(summed))
    with pytest.raises(ValueError, match="logits are not finite"):
        ask(lambda pixels: model(pixels) * torch.nan, trials, groups=groups)


def test_intervals_are_those_of_the_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=60)
    found = bootstrap({"a": values, "b": values + 1}, seed=0, resamples=20000)
    known = scipy_bootstrap((values,), np.mean, n_resamples=20000, method="percentile").confidence_interval
    assert found["a"].value == pytest.approx(values.mean())
    assert found["a"].bounds() == pytest.approx([known.low, known.high], abs=0.02)
    assert found["b"].bounds() == pytest.approx([1 + bound for bound in found["a"].bounds() or ()]), "the same images"
    assert bootstrap({"a": values}, seed=1)["a"] == bootstrap({"a": values}, seed=1)["a"]
    assert bootstrap({"a": values}, seed=1)["a"].bounds() != bootstrap({"a": values}, seed=2)["a"].bounds()
    assert bootstrap({"a": values[:1]}, seed=0)["a"].bounds() is None


def test_confusions_and_captures_start_from_right_answers() -> None:
    """Of three cows one is wrong from the beginning, and says what its donors are; captures look at groups of classes."""
    images, labels, masks = scenes(3)
    trials = build_trials(images, labels, masks, classes=3, donors=2)
    donors = trials.donor_labels("other_context")
    assert all(sorted(row) == [1, 2] for row in donors[labels == 0].tolist())
    answers = ask(THING, trials)
    clean, other = answers["clean"].predicted.clone(), answers["other_context"].predicted.clone()
    cows = (labels == 0).nonzero()[:, 0].tolist()
    clean[cows[0]] = 1
    other[cows[0]] = donors[cows[0]]
    other[cows[1]] = torch.tensor([2, 2])
    answers["clean"] = answers["clean"]._replace(predicted=clean)
    answers["other_context"] = answers["other_context"]._replace(predicted=other)
    cow = findings(trials, answers, NAMES).classes["cow"]
    assert cow.confused_with == {"whale": 0.5}, "2 of the 4 counterfactuals of cows that were right"
    assert cow.captured_by == {"whale": pytest.approx(2 / 3)}, "the first cow was taken for a sheep before"
    assert findings(trials, answers, NAMES).classes["whale"].captures == pytest.approx(2 / 6)
    shared = build_trials(images, labels, masks, classes=3, donors=2, groups=torch.tensor([0, 1, 1]))
    by_group = findings(shared, answers, NAMES).classes["cow"]
    drawn = shared.donor_labels("other_context")[cows[1]].unique().tolist()
    assert set(by_group.captured_by) >= {NAMES[donor] for donor in drawn}, "a sheep's context captures for whales, too"


def test_two_models_are_compared_image_by_image() -> None:
    torch.manual_seed(3)
    images, labels, masks = scenes()
    trials = build_trials(images, labels, masks, classes=3)
    one, other = (findings(trials, ask(model, trials), NAMES) for model in (BACKGROUND, THING))
    difference = compare(one, other)
    assert difference.differences[CONTEXT].value == pytest.approx(1, abs=0.02)
    assert difference.differences[OBJECT].value == pytest.approx(-(other.object_reliance or 0), abs=0.02)
    assert difference.differences["accuracy other_context"].bounds() == [-100, -100]
    assert difference.classes["cow"][CONTEXT] == pytest.approx(1, abs=0.02)
    same = compare(one, one)
    assert all(found.bounds() == [0, 0] for found in same.differences.values())
    fewer = build_trials(images[:12], labels[:12], masks[:12], classes=3)
    with pytest.raises(ValueError, match="different tests"):
        compare(one, findings(fewer, ask(THING, fewer), NAMES))


def test_objects_are_where_the_map_is_highest() -> None:
    model = tiny_classifier(CLASS_NAMES)
    images, labels = digits(5)
    masks = object_masks(model, images, labels, share=0.3)
    relevance = relevance_of(model, images, labels, "mm-cam")
    assert masks.sum(1).tolist() == [10] * 5
    for mask, values in zip(masks, relevance, strict=True):
        assert values[mask].min() >= values[~mask].max()
    assert object_masks(model, images, labels, share=0.01).sum(1).tolist() == [1] * 5
    assert object_masks(model, images, labels, share=0.999).sum(1).tolist() == [35] * 5
    none = object_masks(model, images, labels, cam="grad-cam", share=0.9)
    assert ((relevance_of(model, images, labels, "grad-cam") == 0) & none).sum() == 0, "zeros are no object"
    logits = torch.tensor([label // 2 for label in range(10)])
    by_group = object_masks(model, images, labels // 2, share=0.3, groups=logits)
    best = torch.stack(
        [
            model_logits(model, image)[2 * half : 2 * half + 2].argmax() + 2 * half
            for image, half in zip(images, labels // 2, strict=True)
        ]
    )
    assert torch.equal(by_group, object_masks(model, images, best, share=0.3))
    with pytest.raises(ValueError, match="share of the object"):
        object_masks(model, images, labels, share=1.0)


def model_logits(model: Any, image: Tensor) -> Tensor:
    pixels = (image.float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    with torch.no_grad():
        return model(pixels.permute(2, 0, 1)[None]).logits[0]


def test_images_are_chosen_evenly_over_the_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    assert torch.equal(choose_images(labels, 63, seed=0), torch.arange(63))
    assert torch.bincount(labels[choose_images(labels, 18, seed=0)]).tolist() == [8, 7, 3]
    assert not torch.equal(choose_images(labels, 18, seed=0), choose_images(labels, 18, seed=1))
    many = torch.arange(100).repeat_interleave(5)
    counts = torch.bincount(many[choose_images(many, 40, seed=0)], minlength=100)
    assert counts.nonzero()[:, 0].tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert counts.sum() == 40
    with pytest.raises(ValueError, match="2 or more"):
        choose_images(labels, 1, seed=0)


def test_models_are_audited_with_known_objects_and_with_maps() -> None:
    model = tiny_classifier(CLASS_NAMES)
    images, labels = digits(40)
    coverage = torch.zeros(40, 48, 48)
    coverage[:, :8, :8] = 1
    steps: list[tuple[int, int]] = []
    subject = Subject(images=images, labels=labels, class_names=CLASS_NAMES, coverage=coverage)
    pair = [("a", model), ("b", model)]
    found = audit_models(pair, subject, AuditConfig(donors=1), progress=lambda *step: steps.append(step))
    assert found.trials.masks["object_filled"].nonzero()[:, 1].unique().tolist() == [0]
    assert found.comparison is not None
    assert found.comparison.differences[CONTEXT].bounds() == [0, 0]
    assert steps == [(step, 10) for step in range(1, 11)]
    whole = Subject(images=images, labels=labels, class_names=CLASS_NAMES)
    by_map = audit_models([("a", model)], whole, AuditConfig(donors=1, share=0.25))
    assert torch.equal(
        by_map.trials.masks["object_filled"], object_masks(model, images, labels, share=0.25)[by_map.trials.images]
    )
    for changes, message in ({"share": 1.5}, "object-share"), ({"donors": 0}, "contexts"), ({"images": 1}, "images"):
        with pytest.raises(ValueError, match=message):
            AuditConfig(**changes)

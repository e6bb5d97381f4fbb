"""The embedded benchmark: draws, pixels, splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cammask_fast.data.datasets.texture_digits import (
    BACKGROUNDS,
    CLASS_NAMES,
    DOWNSTREAM_BACKGROUNDS,
    SCAN_SHARES,
    Split,
    captions,
    digit_scans,
    render,
    sample_scenes,
    scans_of,
    stroke_coverage,
)
from cammask_fast.data.datasets.texture_digits_splits import CORRELATION, OUTLINED, evaluation_specifications, training_splits
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader

GOLDEN = Split(name="golden", images=64, seed=3, scans="test", placement="grouped", correlation=0.9, outlined=0.5, sketched=0.2)
NAMES = list(BACKGROUNDS)
SUMS = [771993, 799883, 633616, 721218]
PROBES = [
    [
        108,
        93,
        78,
        212,
        142,
        58,
        99,
        85,
        71,
        126,
        109,
        91,
        236,
        156,
        59,
        166,
        143,
        120,
        146,
        126,
        105,
        132,
        114,
        95,
        166,
        143,
        120,
    ],
    [
        164,
        141,
        118,
        231,
        87,
        198,
        133,
        114,
        96,
        92,
        79,
        66,
        203,
        81,
        173,
        133,
        114,
        96,
        136,
        117,
        98,
        61,
        52,
        44,
        149,
        128,
        107,
    ],
    [63, 110, 46, 78, 134, 56, 92, 160, 67, 50, 85, 36, 55, 95, 40, 80, 138, 58, 38, 65, 27, 219, 212, 151, 84, 146, 61],
    [101, 174, 73, 226, 226, 227, 71, 123, 52, 69, 119, 50, 101, 113, 97, 42, 72, 31, 71, 122, 52, 226, 226, 227, 70, 121, 51],
]


def specification(**changes: object) -> Split:
    return replace(Split(name="t", images=400, seed=1, scans="train", placement="any"), **changes)  # type: ignore[arg-type]  # varied by test


def test_the_draws_are_the_same_on_every_machine() -> None:
    assert sample_scenes(GOLDEN).digest() == "9ad73598fbe75fc28dd5d6d48750b82e177cc8f4b2bb0a4d91d2e096c2832efb"


def test_pixels_are_the_recorded_ones_within_rounding() -> None:
    images = render(sample_scenes(GOLDEN)[slice(0, 4)])
    sums = images.to(torch.int64).sum(dim=(1, 2, 3)).tolist()
    probes = images[:, 5::19, 7::19].reshape(4, -1).tolist()
    assert sums == pytest.approx(SUMS, abs=images[0].numel() / 50)
    assert np.abs(np.array(probes) - np.array(PROBES)).max() <= 1


def test_other_seeds_and_names_give_other_draws() -> None:
    base = specification()
    digests = {sample_scenes(s).digest() for s in (base, replace(base, seed=2), replace(base, name="u"))}
    assert len(digests) == 3
    assert sample_scenes(base).digest() == sample_scenes(base).digest()


def test_a_chunk_renders_like_the_whole() -> None:
    scenes = sample_scenes(specification(images=300, outlined=0.5, sketched=0.3))
    assert torch.equal(render(scenes)[256:], render(scenes[slice(256, 300)]))


def test_digit_scans_are_disjoint_and_complete() -> None:
    labels = digit_scans()[1]
    for label in range(10):
        shares = [set(scans_of(share, label).tolist()) for share in SCAN_SHARES]
        assert set.union(*shares) == set(np.flatnonzero(labels == label).tolist())
        assert sum(map(len, shares)) == len(set.union(*shares))


def test_scans_show_their_label_and_stay_in_their_share() -> None:
    scenes = sample_scenes(specification(scans="val"))
    assert (digit_scans()[1][scenes.scans] == scenes.labels).all()
    allowed = set(np.concatenate([scans_of("val", label) for label in range(10)]).tolist())
    assert set(scenes.scans.tolist()) <= allowed


def test_labels_are_balanced() -> None:
    assert np.bincount(sample_scenes(specification()).labels).tolist() == [40] * 10


@pytest.mark.parametrize(("placement", "own"), [("grouped", 0.9), ("flipped", 0.0)])
def test_backgrounds_follow_the_group(placement: str, own: float) -> None:
    scenes = sample_scenes(specification(images=4000, placement=placement, correlation=0.9))
    chosen = np.array(NAMES)[scenes.backgrounds]
    expected = np.array(DOWNSTREAM_BACKGROUNDS)[(scenes.labels >= 5).astype(int)]
    assert set(chosen) <= set(DOWNSTREAM_BACKGROUNDS)
    assert (chosen == expected).mean() == pytest.approx(own, abs=0.02)


def test_unseen_backgrounds_are_never_the_downstream_ones() -> None:
    chosen = {NAMES[i] for i in sample_scenes(specification(placement="unseen")).backgrounds}
    assert chosen == set(NAMES) - set(DOWNSTREAM_BACKGROUNDS)


def test_styles_change_the_pixels_they_should() -> None:
    plain = specification(images=40)
    images = render(sample_scenes(plain)).float()
    corrupted = render(sample_scenes(replace(plain, corrupted=True))).float()
    sketched = render(sample_scenes(replace(plain, sketched=1.0))).float()
    outlined = render(sample_scenes(replace(plain, outlined=1.0))).float()
    assert 10 < (images - corrupted).abs().mean() < 60
    assert (sketched.std(-1) < 1).all(), "a sketch is grey"
    inside = stroke_coverage(sample_scenes(plain)) > 0.5
    assert (images - outlined).abs().mean(-1)[inside].mean() > 15
    assert (images - outlined).abs().mean(-1)[stroke_coverage(sample_scenes(plain)) == 0].mean() < 15


def test_stroke_coverage_lies_inside_the_image_at_the_drawn_height() -> None:
    scenes = sample_scenes(specification(images=200))
    coverage = stroke_coverage(scenes)
    assert coverage.shape == (200, 48, 48)
    rows = (coverage > 0.5).any(2).sum(1).float()
    assert (rows <= torch.from_numpy(scenes.height).float() * 1.15 + 2).all()
    assert (rows >= 20).float().mean() > 0.95


def test_captions_name_the_digit() -> None:
    scenes = sample_scenes(specification(sketched=0.2))
    for label, caption in zip(scenes.labels, captions(scenes), strict=True):
        assert CLASS_NAMES[label] in caption


def test_training_and_evaluation_share_no_scan() -> None:
    train, validation = training_splits(0, batch_size=128)
    assert len(train) == 1500 // 128
    assert len(validation.images) >= 500
    for scans in ("test", "val"):
        for split in evaluation_specifications(scans=scans).values():
            assert split.scans == scans
            assert split.images >= 2000
    assert evaluation_specifications()["id"].correlation == CORRELATION
    assert evaluation_specifications()["flipped"].outlined == OUTLINED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scans": "all"}, "scans: expected one of web, train, val, test"),
        ({"placement": "left"}, "placement"),
        ({"correlation": 1.5}, "correlation: expected a share"),
        ({"images": 0}, "images: expected at least 1"),
    ],
)
def test_bad_splits_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specification(**changes)


def test_array_loader_shuffles_by_seed_and_epoch_and_drops_the_last_batch() -> None:
    images, labels = torch.zeros(10, 8, 8, 3, dtype=torch.uint8), torch.arange(10)
    loader = ArrayLoader(images, labels, ResumableDistributedSampler(len(images), batch_size=4, shuffle=True, seed=5))
    first = [batch.labels.tolist() for batch in loader]
    loader.set_epoch(1)
    second = [batch.labels.tolist() for batch in loader]
    loader.set_epoch(0)
    assert [batch.labels.tolist() for batch in loader] == first != second
    assert list(map(len, first)) == [4, 4]
    assert [len(b.labels) for b in ArrayLoader(images, labels, ResumableDistributedSampler(len(images), batch_size=4))] == [
        4,
        4,
        2,
    ]


def test_array_loader_refuses_bad_input() -> None:
    images, labels = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.arange(3)
    with pytest.raises(ValueError, match="uint8"):
        ArrayLoader(images.float(), labels, ResumableDistributedSampler(len(images.float()), batch_size=1))
    with pytest.raises(ValueError, match="labels"):
        ArrayLoader(images, labels[:2], ResumableDistributedSampler(len(images), batch_size=1))
    with pytest.raises(ValueError, match="larger than the 3 training images"):
        ArrayLoader(images, labels, ResumableDistributedSampler(len(images), batch_size=4, shuffle=True))

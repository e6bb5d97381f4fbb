"""Maps measured together: with maps made by hand, in chunks, and through the tables of the benchmark."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import maps
from cammask_fast.cam import benchmark
from cammask_fast.cam.benchmark import GROUPS, METRICS, RANDOM, MapProtocol, MapScore, measure_maps
from cammask_fast.cam.maps import CAMS
from cammask_fast.config import METHODS
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer
from tests.test_step import TINY

COUNT = 5
QUICK = MapProtocol(cams=("mm-cam",), steps=1)
MASKS = MapProtocol(cams=("mm-cam",), groups=("masks",), upsample="nearest")


@pytest.fixture
def model() -> Classifier:
    return Classifier(VisionTransformer(TINY), 4 * torch.randn(3, TINY.output_dim)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (COUNT, 12, 12, 3), dtype=torch.uint8)


@pytest.fixture
def coverage() -> Tensor:
    """The upper left patch of every image, and of the last one the upper half."""
    covered = torch.zeros(COUNT, 12, 12)
    covered[:, :3, :3] = 1
    covered[-1, :6] = 1
    return covered


LABELS = torch.tensor([0, 1, 2, 0, 1])


def show(monkeypatch: pytest.MonkeyPatch, relevance: Tensor) -> None:
    """Every map is this one, (COUNT, P)."""
    left = iter(relevance.split(1))

    def relevance_of(_model: Classifier, images: Tensor, *_rest: Any, **_more: Any) -> Tensor:
        return torch.cat([next(left) for _ in images])

    monkeypatch.setattr(benchmark, "relevance_of", relevance_of)


def by_chunks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TOKENS_AT_A_TIME", 1)


def on_patches(coverage: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(coverage[:, None], 3).flatten(1)


@pytest.mark.parametrize("inverted", [False, True])
def test_a_perfect_map_and_its_opposite(
    monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, coverage: Tensor, inverted: bool
) -> None:
    touched = on_patches(coverage)
    shown = 1 - touched if inverted else 7 * touched
    show(monkeypatch, torch.cat([shown[:1], shown]))  # the first chunk is made twice
    by_chunks_of_one(monkeypatch)
    values = measure_maps(model, images, LABELS, coverage=coverage, protocol=MASKS)["mm-cam"].values
    assert list(values) == list(GROUPS["masks"])
    expected = 0.0 if inverted else 100.0
    for name in ("energy", "masked", "pointing", "iou", "miou", "pixel_accuracy"):
        assert values[name] == pytest.approx(expected), name
    if not inverted:
        assert (values["best_threshold"], values["best_miou"]) == (0.0, 100.0)


def test_figures_by_hand(monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, coverage: Tensor) -> None:
    """Every map marks the whole upper half at 1, the lower left patch at 0.5 and nothing else. 9 pixels are a patch of 144."""
    shown = torch.zeros(COUNT, 16)
    shown[:, :8], shown[:, 12] = 1, 0.5
    show(monkeypatch, torch.cat([shown, shown]))
    score = measure_maps(model, images, LABELS, coverage=coverage, protocol=MASKS)["mm-cam"]
    mean = [(4 * one + last) / 5 for one, last in ((1 / 8.5, 8 / 8.5), (1 / 9, 8 / 9), (8 / 16, 15 / 16))]
    assert [score.values[name] for name in ("energy", "masked", "pixel_accuracy")] == pytest.approx([100 * one for one in mean])
    assert score.values["iou"] == pytest.approx(100 * mean[1])
    assert score.values["miou"] == pytest.approx(50 * (12 / 45 + (4 * 7 + 7) / (4 * 15 + 8)))
    assert score.values["best_threshold"] == pytest.approx(0.5), "the lowest of equals, above which the patch at 0.5 is gone"
    assert score.values["best_miou"] == pytest.approx(50 * (12 / 40 + (4 * 8 + 8) / (4 * 15 + 8)))
    assert score.values["best_pixel_accuracy"] == pytest.approx(100 * (4 * 9 / 16 + 1) / 5)
    energies = 100 * torch.tensor([1 / 8.5] * 4 + [8 / 8.5])
    assert score.errors["energy"] == pytest.approx((energies.std() / 5**0.5).item(), rel=1e-5)
    assert set(score.errors) == set(GROUPS["masks"]) - {"miou", "best_miou", "best_threshold"}, "means over images only"


def test_the_best_threshold_is_that_of_the_miou(
    monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, coverage: Tensor
) -> None:
    """Below 0.5 the mean IoU is higher (0.5 against 0.44), above it the mIoU: a small object is lost, much background won."""
    shown = torch.zeros(2, 16)
    shown[0, 0], shown[0, 15] = 0.5, 1
    shown[1], shown[1, :9] = 0.5, 1
    show(monkeypatch, torch.cat([shown, shown]))
    values = measure_maps(model, images[:2], LABELS[:2], coverage=coverage[[0, -1]], protocol=MASKS)["mm-cam"].values
    assert values["best_threshold"] == 0.5
    assert values["best_miou"] == pytest.approx(50 * (72 / 99 + 189 / 216))
    assert (values["iou"], values["best_iou"]) == pytest.approx((50.0, 50 * (0 + 72 / 81)))


def test_each_figure_has_its_own_name(monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor) -> None:
    """The model is sure of class 1 while the first pixel, which the map marks alone, is as it was."""
    before = normalise(images)[0, :, 0, 0]

    def forward(pixels: Tensor) -> Any:
        same = ((pixels[:, :, 0, 0] - before).abs() < 1e-6).all(1)
        return SimpleNamespace(logits=torch.stack([torch.zeros(len(pixels)), torch.where(same, 50.0, -50.0)], 1))

    monkeypatch.setattr(model, "forward", forward)
    shown = torch.zeros(1, 16)
    shown[0, 0] = 1
    show(monkeypatch, torch.cat([shown, shown]))
    values = measure_maps(model, images[:1], torch.tensor([1]), protocol=replace(QUICK, steps=12))["mm-cam"].values
    assert (values["positive"], values["negative"]) == (0.0, 100.0)
    assert values["insertion"] == pytest.approx(100 * 11.5 / 12)
    assert values["deletion"] == pytest.approx(100 * 0.5 / 12)
    assert (values["road_morf"], values["road_lerf"], values["road"]) == pytest.approx((-100.0, 0.0, 50.0))


def test_the_tolerance_is_scaled_to_the_image(
    monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, coverage: Tensor
) -> None:
    """The first pixel of the lower right patch is 7 rows and 7 columns from the object: 9.9 of 12 pixels, 184.8 at 224."""
    shown = torch.zeros(1, 16)
    shown[:, 15] = 1
    for tolerance, hit in ((184.0, 0.0), (185.5, 100.0)):
        show(monkeypatch, torch.cat([shown, shown]))
        protocol = replace(MASKS, tolerance=tolerance)
        values = measure_maps(model, images[:1], LABELS[:1], coverage=coverage[:1], protocol=protocol)["mm-cam"].values
        assert values["pointing"] == hit


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, coverage: Tensor) -> None:
    """The random map alone: those of the model are rounded otherwise in another batch, which may move a pixel across a
    percentile."""
    protocol = MapProtocol(cams=(RANDOM,), steps=1)
    (whole,) = measure_maps(model, images, LABELS, coverage=coverage, protocol=protocol).values()
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(benchmark, "TOKENS_AT_A_TIME", 3 * 17)
    found = measure_maps(model, images, LABELS, coverage=coverage, protocol=protocol, progress=lambda *at: done.append(at))
    assert list(found) == [RANDOM]
    assert list(whole.values) == list(METRICS)
    assert found[RANDOM].values == pytest.approx(whole.values, abs=1e-3)
    assert found[RANDOM].errors == pytest.approx(whole.errors, abs=1e-3)
    assert done == [(3, COUNT), (COUNT, COUNT)]
    assert whole.milliseconds == 0.0


def test_seeds_decide_the_random_map_and_the_noise(model: Classifier, images: Tensor) -> None:
    only = MapProtocol(cams=(RANDOM, "mm-cam"), groups=("road",))
    first, again, other = (measure_maps(model, images[:2], LABELS[:2], protocol=replace(only, seed=seed)) for seed in (0, 0, 1))
    for cam in only.cams:
        assert first[cam].values == again[cam].values != other[cam].values, cam
    assert first[RANDOM].values["road"] == pytest.approx(
        (first[RANDOM].values["road_lerf"] - first[RANDOM].values["road_morf"]) / 2
    )


def test_without_masks_the_rest_is_measured(model: Classifier, images: Tensor) -> None:
    done: list[tuple[int, int]] = []
    both = replace(QUICK, cams=("mm-cam", RANDOM))
    found = measure_maps(model, images[:1], LABELS[:1], protocol=both, progress=lambda *at: done.append(at))
    values = found["mm-cam"].values
    assert found["mm-cam"].milliseconds > 0
    assert found["mm-cam"].errors == {}, "one image"
    assert done == [(1, 2), (2, 2)]
    assert list(values) == [name for name in METRICS if name not in GROUPS["masks"]]
    with pytest.raises(ValueError, match="need known masks"):
        measure_maps(model, images, LABELS, protocol=MASKS)


@pytest.mark.parametrize("groups", [(), ("road",), ("perturbation", "insertion-deletion")])
@pytest.mark.parametrize("steps", [0, 5])
def test_the_passes_are_counted(
    monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, groups: tuple[str, ...], steps: int
) -> None:
    protocol = MapProtocol(cams=(RANDOM,), groups=groups, steps=steps)
    seen: list[int] = []

    def forward(pixels: Tensor) -> Any:
        seen.append(len(pixels))
        return SimpleNamespace(logits=torch.zeros(len(pixels), 3))

    monkeypatch.setattr(model, "forward", forward)
    measure_maps(model, images, LABELS, protocol=protocol)
    assert sum(seen) == COUNT * protocol.passes(12, masks=False)


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, model: Classifier, images: Tensor, coverage: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images: expected uint8 \(M, 12, 12, 3\), got torch.uint8 \(5, 6, 12, 3\)"):
        measure_maps(model, images[:, :6], LABELS)
    with pytest.raises(ValueError, match="images: expected"):
        measure_maps(model, images[:0], LABELS[:0])
    with pytest.raises(ValueError, match=r"labels: expected one per image \(5\), got 4"):
        measure_maps(model, images, LABELS[:4])
    with pytest.raises(ValueError, match=r"masks: expected \(5, 12, 12\), got \(4, 12, 12\)"):
        measure_maps(model, images, LABELS, coverage=coverage[:4])
    with pytest.raises(ValueError, match="masks: 4 of the 5 images have no object"):
        measure_maps(model, images, LABELS, coverage=coverage * torch.tensor([0.5, 0.5, 0.5, 0.5, 1])[:, None, None])
    show(monkeypatch, torch.full((2 * COUNT, 16), float("nan")))
    with pytest.raises(ValueError, match="mm-cam: the map of an image is not finite"):
        measure_maps(model, images, LABELS, protocol=QUICK)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cams": ("mm-cam", "cam")}, f"cams: unknown 'cam'; known: {', '.join(CAMS)}, random"),
        ({"groups": ("iou",)}, "groups: unknown 'iou'; known: masks, insertion-deletion, perturbation, road"),
        ({"upsample": "cubic"}, "expected bilinear or nearest"),
        ({"threshold": 1.0}, r"threshold: expected a value in \[0, 1\), got 1.0"),
        ({"threshold": -0.1}, "threshold: expected"),
        ({"tolerance": -1.0}, "tolerance: expected 0 or more"),
        ({"steps": -1}, "steps: expected 1 or more"),
        ({"start_layer": -1}, "start_layer: expected 0 or more"),
        ({"contrast": "last"}, "unknown cam_contrast 'last'"),
        ({"cams": (RANDOM, "grad-cam"), "start_layer": 1}, "Grad-CAM looks at the last layer only"),
        ({"cams": ("rollout",), "contrast": "mean"}, "attention rollout has no class score"),
    ],
)
def test_wrong_settings(settings: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MapProtocol(**settings)


def test_a_map_is_measured_once() -> None:
    assert MapProtocol(cams=("mm-cam", "mm-cam")).chosen_cams == ("mm-cam",)
    assert MapProtocol().chosen_cams == (*CAMS, RANDOM)
    late = MapProtocol(start_layer=1, contrast="mean").chosen_cams
    assert set(CAMS) - set(late) == {"grad-cam", "rollout"}
    assert late[-1] == RANDOM


def test_start_layer_and_contrast_reach_the_map(model: Classifier, images: Tensor) -> None:
    shared: dict[str, Any] = {"cams": ("mm-cam",), "groups": ("insertion-deletion",)}
    found = [
        measure_maps(model, images, LABELS, protocol=MapProtocol(**shared, **own))["mm-cam"].values["insertion"]
        for own in ({}, {"start_layer": 2}, {"contrast": "runner-up"})
    ]
    assert len(set(found)) == 3


def source(name: str, seed: int, id_: float, shift: float, *, val: float = 70.0) -> dict[str, Any]:
    accuracy = {"test": {"id": id_, "flipped": shift, "unseen": 60.0}, "val": {"id": val, "flipped": val, "unseen": val}}
    return {
        "op": "cam-source", "source": name, "seed": seed, "cpu_seconds": 10.0, "accuracy": accuracy, "cpu": "x", "threads": 1,
        "torch": "y", "commit": "z",
    }  # fmt: skip


def cells(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_table_of_mask_sources() -> None:
    records = [source("mm-cam", seed, 80.0, 70.0) for seed in (0, 1)]
    records += [source("grad-cam", seed, 82.0 + seed, 74.0, val=71.0) for seed in (0, 1)]
    records += [source("mm-cam", 0, 80.0, 72.0), source(next(iter(maps.OTHERS)), 0, 50.0, 40.0, val=99.0)]
    text = maps.section([*records, {"op": "step"}])
    assert cells(text, "mm-cam") == ["mm-cam", "80.0 ± 0.0", "65.5 ± 0.7", "60.0 ± 0.0", "70.0 ± 0.0", "10.0 ± 0.0", "2"]
    assert cells(text, "grad-cam")[1:4] == ["82.5 ± 0.7", "67.0 ± 0.0", "60.0 ± 0.0"]
    assert cells(text, "random patches (masked-random)")[-1] == "1"
    assert "- grad-cam - mm-cam, mean of ID and OOD, per seed: +1.50, +2.50 (mean +2.00)" in text
    assert "mm-cam - mm-cam" not in text
    assert "- best map on the validation sets: grad-cam, 71.0 against 70.0 of mm-cam" in text, "random patches are no map"


def test_the_table_of_metrics() -> None:
    def record(cam: str, seed: int, value: float) -> dict[str, Any]:
        values = dict.fromkeys(METRICS, value)
        return {
            "op": "cam-bench", "method": "ft", "seed": seed, "cam": cam, "images": 300, "values": values,
            "perturbed": 100, "cpu_milliseconds": 1.5, "cpu": "x", "threads": 1, "torch": "y", "commit": f"c{seed}",
        }  # fmt: skip

    text = maps.section(
        [record("mm-cam", 0, 9.0), record("mm-cam", 0, 80.0), record("mm-cam", 1, 82.0), record(RANDOM, 0, 1.0)]
    )
    shown = [line for line in text.splitlines() if line.startswith("| ft ")]
    first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in shown)
    assert first == ["ft", "mm-cam", *["81.0 ± 1.4"] * len(maps.SHOWN), "1.50 ± 0.00", "2"]
    assert second == ["ft", RANDOM, *["1.0"] * len(maps.SHOWN), "-", "1"]
    assert "deletion ↓" in text
    assert "insertion ↑" in text
    assert "commits c0, c1" in text
    assert maps.section([]) == ""


def test_what_is_recorded_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    made: list[tuple[Any, ...]] = []

    def measured(method: str, seed: int, cams: list[str]) -> list[dict[str, Any]]:
        made.extend((method, seed, cam) for cam in cams)
        score = MapScore(dict.fromkeys(METRICS, 1.0), {}, 1.0)
        record = {
            "op": "cam-bench",
            "method": method,
            "seed": seed,
            "images": 1,
            "perturbed": 1,
            "values": score.values,
            "cpu_milliseconds": 1.0,
        }
        return [{**record, "cam": cam} for cam in cams]

    def as_source(name: str, recipe: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        made.append((name, recipe, seed, dict(changes)))
        return source(name, seed, 80.0, 70.0)

    monkeypatch.setattr(maps, "measured", measured)
    monkeypatch.setattr(maps, "as_source", as_source)
    monkeypatch.setattr(maps, "cpu_environment", lambda: {"cpu": "x", "threads": 1, "torch": "y", "commit": "z"})
    options = Namespace(seeds=[0], measured=[0, 1], cams=["mm-cam"], out=tmp_path / "records.jsonl")
    assert maps.main(options) == 0
    both = ("mm-cam", RANDOM)
    sources = [("mm-cam", "masked-object", 0, {"cam": "mm-cam"}), *((name, one, 0, {}) for name, one in maps.OTHERS.items())]
    tuned = [name for name in maps.METHODS if name != "zeroshot"]
    first = [(name, 0, cam) for name in ("zeroshot", *tuned) for cam in both]
    assert made == [*first, *sources, *((name, 1, cam) for name in tuned for cam in both)]
    made.clear()
    assert maps.main(Namespace(**{**vars(options), "cams": ["mm-cam", "grad-cam"], "measured": [0]})) == 0
    assert made == [(name, 0, "grad-cam") for name in maps.METHODS] + [("grad-cam", "masked-object", 0, {"cam": "grad-cam"})]


@pytest.mark.slow
def test_a_record_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "IMAGES", 4)
    monkeypatch.setattr(maps, "PERTURBED", 1)
    for function in (maps.known_images, maps.trained):
        function.cache_clear()
    images, labels, _ = maps.known_images()
    found, chance = maps.measured("zeroshot", 0, ["grad-cam", RANDOM])
    maps.known_images.cache_clear()
    model = maps.trained("zeroshot", 0, "mm-cam")[0]
    assert (found["cam"], chance["cam"]) == ("grad-cam", RANDOM)
    assert set(found["values"]) == set(METRICS)
    assert found["cpu_milliseconds"] > chance["cpu_milliseconds"] == 0.0
    only = MapProtocol(cams=("grad-cam",), groups=("perturbation",))
    own = measure_maps(model, images[:1], labels[:1], protocol=only)["grad-cam"].values
    assert {name: found["values"][name] for name in own} == own
    assert "energy" in found["errors"]
    assert "positive" not in found["errors"], "of a single image"


def test_the_methods_of_the_bench_are_methods() -> None:
    assert {*maps.METHODS, *maps.OTHERS.values(), maps.MASKED} <= METHODS.keys()
    assert set(maps.SHOWN) <= METRICS.keys()

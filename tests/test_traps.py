"""Wrong input of the front door and of the functions below it: a sentence that says what to do, never a bare assertion, never
a wrong answer without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cammask_fast as typed
from cammask_fast.cam import grad_cam, mm_cam, relevance_of, weighted_activation
from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.kernels.normalise import normalise
from cammask_fast.masking import counterfactual, mask_share, masked_input, parse_strategy, sample_mask_randomness
from cammask_fast.masking.randomness import MaskRandomness
from cammask_fast.model.vit import Taps
from cammask_fast.step import build_step

cf: Any = typed
"""Wrong types are what is tested here."""
IMAGES = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])
ONE_EPOCH: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 1e-4}
OFF = (torch.no_grad, torch.inference_mode)


@pytest.fixture(scope="module")
def model() -> typed.Model:
    return cf.load("tiny", classes=["one", "two"])


def forward(model: typed.Model, *, frozen: bool = False) -> tuple[Tensor, Taps]:
    classifier, taps = model.with_head().frozen_copy(), Taps()
    return classifier.requires_grad_(not frozen)(normalise(IMAGES), taps=taps).logits, taps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: cf.load(None), "source: expected an architecture, a run folder or a checkpoint, got NoneType"),
        (lambda m: cf.load("tiny", device="tpu"), "device: expected cpu or cuda, got 'tpu'"),
        (lambda m: cf.load("tiny", device="cuda:99"), "device cuda:99: PyTorch finds"),
        (lambda m: cf.load("tiny", classes="cat"), "classes: expected a list of texts, got 'cat'"),
        (lambda m: cf.load("tiny", classes=[1, 2]), "classes: expected texts that are not empty, got 1"),
        (lambda m: cf.load("tiny", classes=["one", " "]), "classes: expected texts that are not empty, got ' '"),
        (lambda m: cf.load("tiny", classes=["one"], templates="a {}"), "templates: expected a list of texts"),
        (lambda m: m.with_classes([]), "expected at least one"),
        (lambda m: m.predict(IMAGES, top=0), "top: expected 1 or more classes, got 0"),
        (lambda m: m.predict(None), "images: expected paths, PIL images, .* got NoneType"),
        (lambda m: m.predict(3), "images: expected paths, PIL images, .* got int"),
        (lambda m: m.predict([np.zeros((4, 4))]), r"got ndarray float64 \(4, 4\)"),
        (lambda m: cf.cam(m, IMAGES, "one", kind="gradcam"), "unknown cam 'gradcam'; known: mm-cam, grad-cam, legrad"),
        (lambda m: cf.cam(m, IMAGES, "one", kind=None), "unknown cam None"),
        (lambda m: cf.cam(m, IMAGES, None), "prompts: expected a list of texts, got None"),
        (lambda m: cf.cam(m, IMAGES, [0, 1, 0, 1]), "prompts: expected texts that are not empty, got 0"),
        (lambda m: cf.cam(m, IMAGES, ""), "prompts: expected texts that are not empty, got ''"),
        (lambda m: cf.cam(m, IMAGES[:0], "one"), "images: expected at least one"),
        (lambda m: cf.cam(m, IMAGES, "one", start_layer=-1), r"cam_start_layer: expected 0\.\.3 for this model, got -1"),
        (lambda m: cf.cam(m, IMAGES, "one", start_layer="1"), r"cam_start_layer: expected 0\.\.3 for this model, got 1"),
        (lambda m: cf.cam(m, IMAGES, "one", kind="grad-cam", start_layer=1), "Grad-CAM looks at the last layer only"),
        (lambda m: cf.cam(m.with_head(), IMAGES, "one"), "model: expected a model from cf.load .* got Classifier"),
        (lambda m: cf.counterfactual(m, IMAGES, "one", masking=None), "unknown masking strategy None"),
        (lambda m: cf.counterfactual(m, IMAGES, "one", kind="x"), "unknown cam 'x'"),
        (lambda m: cf.counterfactual(m, IMAGES, "one", seed="x"), "seed: expected a whole number, got 'x'"),
        (lambda m: cf.counterfactual(m, IMAGES[:1], "one", donors=3), "images: expected paths"),
        (lambda m: cf.fine_tune("tiny", [(IMAGES, LABELS)]), "model: expected a model from cf.load or cf.fine_tune, got str"),
        (lambda m: cf.fine_tune(m, None), "data: expected a folder name or an iterable .* got NoneType"),
        (lambda m: cf.fine_tune(m, IMAGES), "data: expected a folder name or an iterable .* got Tensor"),
        (lambda m: cf.fine_tune(m, [(IMAGES, LABELS)], validation=5, **ONE_EPOCH), "data: expected a folder name .* got int"),
        (lambda m: cf.fine_tune(m, [(IMAGES, LABELS)], class_names="ab"), "class_names: expected a list of texts"),
        (lambda m: cf.fine_tune(m, [(IMAGES, LABELS)], cam="gradcam", **ONE_EPOCH), "unknown cam 'gradcam'"),
        (lambda m: cf.fine_tune(m, [(IMAGES, LABELS + 4)], **ONE_EPOCH), "labels: expected 0 to 1 for the 2 classes .* 4 to 5"),
        (lambda m: cf.fine_tune(m, [(IMAGES, LABELS - 1)], **ONE_EPOCH), "labels: expected 0 to 1 .* got -1 to 0"),
        (lambda m: cf.fine_tune(m, [(IMAGES, LABELS / 2)], **ONE_EPOCH), r"int \(4,\), got torch.float32 \(4,\)"),
        (lambda m: cf.fine_tune(m, [(IMAGES, ["a"] * 4)], **ONE_EPOCH), "labels: expected whole numbers, .* got list"),
        (lambda m: cf.fine_tune(m, [(IMAGES, None)], **ONE_EPOCH), "labels: expected whole numbers, .* got NoneType"),
        (lambda m: cf.fine_tune(m, [([Image.new("RGB", (48, 48))], [0])], **ONE_EPOCH), "expected a tensor, .* got list"),
        (lambda m: cf.evaluate(m.with_head(), [(IMAGES, LABELS)]), "model: expected a model from cf.load"),
        (lambda m: cf.evaluate(m, [(IMAGES, LABELS + 2)]), "labels: expected 0 to 1 .* got 2 to 3"),
        (lambda m: cf.evaluate(m, None), "data: expected a folder name .* got NoneType"),
        (lambda m: cf.train_step("tiny", m), "student: expected a model from cf.load"),
        (lambda m: cf.train_step(m, None), "teacher: expected a model from cf.load"),
        (lambda m: cf.train_step(m, m, cam="gradcam"), "unknown cam 'gradcam'"),
    ],
)  # fmt: skip
def test_the_front_door(model: typed.Model, call: Callable[[typed.Model], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS + 1, "labels: expected 0 to 1 .* got 1 to 2"),
        (IMAGES, LABELS[:2], r"int \(4,\), got torch.int64 \(2,\)"),
        (IMAGES, torch.eye(2)[LABELS], r"int \(4,\), got torch.float32 \(4, 2\)"),
        (IMAGES, LABELS.bool(), "got torch.bool"),
        (IMAGES[:, :40, :40], LABELS, "this model takes 48 x 48 pixels, got 40 x 40"),
        ([1, 2], LABELS, "images: expected a tensor"),
    ],
)
def test_a_step_of_ones_own(model: typed.Model, images: Any, labels: Any, message: str) -> None:
    step = cf.train_step(model.with_head().frozen_copy(), model)
    with pytest.raises(ValueError, match=message):
        step(images, labels)


def test_labels_and_images_of_other_types_give_the_same_step(model: typed.Model) -> None:
    losses = [
        cf.train_step(model.with_head().frozen_copy(), model, seed=3)(images, labels)
        for images, labels in ((IMAGES, LABELS), (IMAGES.numpy(), LABELS.tolist()), (IMAGES, LABELS.int()))
    ]
    assert losses[0].total == losses[1].total == losses[2].total


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("method", ["masked-object", "ft", "lp"])
def test_a_step_without_autograd_is_a_sentence(model: typed.Model, off: Callable[[], Any], method: str) -> None:
    step = cf.train_step(model.with_head().frozen_copy(), model, method=method)
    with off(), pytest.raises(ValueError, match=r"the student has no gradients: call the step outside torch\.no_grad"):
        step(IMAGES, LABELS)
    with off(), pytest.raises(ValueError, match="the student has no gradients"):
        cf.fine_tune(model, [(IMAGES, LABELS)], method=method, **ONE_EPOCH)


@pytest.mark.parametrize("cam", ["mm-cam", "grad-cam"])
def test_a_student_that_is_frozen_is_a_sentence(model: typed.Model, cam: str) -> None:
    student = model.with_head().frozen_copy()
    step = cf.train_step(student, model, cam=cam)
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="with parameters that require gradients"):
        step(IMAGES, LABELS)
    student.head.requires_grad_(True)
    with pytest.raises(ValueError, match="a map needs them in the image tower, too"):
        step(IMAGES, LABELS)


def test_the_step_refuses_what_has_no_gradients_too(model: typed.Model) -> None:
    step = build_step(model.with_head().frozen_copy().requires_grad_(False), None, TrainConfig(method="ft"))
    with pytest.raises(ValueError, match="the student has no gradients"):
        step(Batch(IMAGES, LABELS, torch.arange(4)), None)


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("kind", ["mm-cam", "grad-cam"])
def test_maps_do_not_depend_on_the_mode_around_them(model: typed.Model, off: Callable[[], Any], kind: str) -> None:
    expected = cf.cam(model, IMAGES, "one", kind=kind).relevance
    with off():
        torch.testing.assert_close(cf.cam(model, IMAGES.clone(), "one", kind=kind).relevance, expected)
        classifier = cf.load("tiny", classes=["one", "two"]).with_head()
        found = relevance_of(classifier, IMAGES.clone(), LABELS.clone(), kind)
        assert cf.counterfactual(model, IMAGES, "one", kind=kind).images.shape == IMAGES.shape
    torch.testing.assert_close(found, relevance_of(model.with_head(), IMAGES, LABELS, kind))


def test_arrays_are_images_too(model: typed.Model) -> None:
    expected = model.predict(IMAGES)
    assert model.predict(IMAGES.numpy()) == expected
    assert model.predict([image.numpy() for image in IMAGES]) == expected


@pytest.mark.parametrize("function", [mm_cam, grad_cam])
def test_functions_of_maps(model: typed.Model, function: Callable[..., Tensor]) -> None:
    logits, taps = forward(model)
    with pytest.raises(ValueError, match="taps: expected those that were filled by the forward pass"):
        function(logits, LABELS, Taps())
    with pytest.raises(ValueError, match="taps: expected those that were filled by the forward pass"):
        function(forward(model)[0], LABELS, taps)
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got 5 to 6"):
        function(logits, LABELS + 5, taps)
    with pytest.raises(ValueError, match=r"labels: expected int64 \(4,\), got torch.int64 \(1,\)"):
        function(logits, LABELS[:1], taps)
    with pytest.raises(ValueError, match="or call `relevance_of`, which needs neither"):
        function(*_with_labels(forward(model, frozen=True)))
    with torch.no_grad():
        without = forward(model)
    with pytest.raises(ValueError, match=r"run the model outside torch\.no_grad"):
        function(*_with_labels(without))
    assert function(logits, LABELS, taps).shape == (4, 36)


def _with_labels(given: tuple[Tensor, Taps]) -> tuple[Tensor, Tensor, Taps]:
    return given[0], LABELS, given[1]


def test_relevance_refuses_what_it_does_not_know(model: typed.Model) -> None:
    classifier = model.with_head()
    for cam in ("mmcam", "MM-CAM", "", "gradcam", None):
        with pytest.raises(ValueError, match=r"unknown cam .*; known: mm-cam, grad-cam, legrad"):
            relevance_of(classifier, IMAGES, LABELS, cam)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels: expected int64 \(4,\)"):
        relevance_of(classifier, IMAGES, LABELS[:1], "mm-cam")
    with pytest.raises(ValueError, match="unknown cam"):
        TrainConfig(cam="gradcam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="taps: expected"):
        weighted_activation(Taps(), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("name", ["ObjMaskSingleFill(0.3)", "RandMaskSingleFill(0.5)", "RandMaskNoFill(0.75)"])
def test_masking_without_its_draws_or_map(name: str) -> None:
    strategy = parse_strategy(name)
    relevance = None if strategy.selection == "random" else torch.rand(4, 36)
    for function in (counterfactual, masked_input):
        with pytest.raises(ValueError, match=r"draws: .* use sample_mask_randomness"):
            function(IMAGES, relevance, strategy, MaskRandomness(), grid=6)
    with pytest.raises(ValueError, match=r"draws|relevance"):
        mask_share(None, strategy, MaskRandomness(), patches=36)


def test_normalise_to_patches_needs_their_size() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        normalise(IMAGES, layout="patches")


def test_a_file_that_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"note\.txt"):
        cf.load(tmp_path / "note.txt")
    with pytest.raises(ValueError, match="no checkpoint"):
        cf.export(tmp_path, "onnx", tmp_path / "out")


def test_draws_need_a_batch() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="the batch needs at least 2, got 1"):
        sample_mask_randomness(parse_strategy("ObjMaskSingleFill(0.3)"), count=1, patches=36, generator=generator)

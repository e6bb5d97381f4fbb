"""The Python front door: models, fine-tuning on data of any kind, maps, counterfactuals, scores, a step of one's own loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

import cammask_fast as cf
from cammask_fast.cam import relevance_of
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications, rendered
from cammask_fast.data.iterables import IterableLoader, to_uint8
from cammask_fast.evaluate import accuracy
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import MaskRandomness
from tests.test_folder import make_folder

QUICK: dict[str, Any] = {"epochs": 1, "lr": 1e-4, "w_distill": 8.0}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """48 images of the benchmark, uint8 (48, 48, 48, 3), and labels."""
    images, labels = rendered(evaluation_specifications()["id"])
    return images[:48], labels[:48]


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny", classes=CLASS_NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos"), {"one": 6, "two": 6})


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, cammask_fast; assert 'torch' not in sys.modules; assert 'load' in dir(cammask_fast)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_front_door_is_not_hidden_by_modules_of_the_same_name() -> None:
    """`cammask_fast.cam`, `.evaluate` and `.export` are modules, too; they were imported above."""
    assert all(callable(getattr(cf, name)) for name in cf.__all__)
    assert callable(relevance_of)
    assert callable(accuracy)
    with pytest.raises(AttributeError):
        cf.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_predictions_are_probabilities_of_named_classes(model: cf.Model, digits: tuple[Tensor, Tensor]) -> None:
    rows = model.predict(digits[0][:8], top=3)
    assert [len(row) for row in rows] == [3] * 8
    right = [CLASS_NAMES[label] == row[0][0] for label, row in zip(digits[1].tolist(), rows, strict=False)]
    assert sum(right) >= 4
    assert all(row[0][1] >= row[1][1] >= row[2][1] > 0 for row in rows)
    assert sum(p for _, p in model.predict(digits[0][:1], top=10)[0]) == pytest.approx(1, abs=1e-5)
    picture = Image.fromarray(digits[0][0].numpy())
    assert model.predict(picture) == model.predict([picture])
    (only,) = model.predict(picture, top=1)
    assert only[0][0] == rows[0][0][0], "a PIL image of the model's size is taken as it is"


def test_a_data_loader_and_uint8_batches_train_alike(model: cf.Model, digits: tuple[Tensor, Tensor]) -> None:
    """Floats in [0, 1] channels first, as ToTensor gives them, and the bytes themselves."""
    images, labels = digits
    before = model.with_head().head.weight.clone()
    floats = DataLoader(TensorDataset(images.permute(0, 3, 1, 2).float() / 255, labels), batch_size=16)
    loader = cf.fine_tune(model, floats, validation=floats, **QUICK)
    listed = cf.fine_tune(model, [(images[i : i + 16], labels[i : i + 16]) for i in (0, 16, 32)], **QUICK)
    assert loader.config.batch_size == 16
    assert listed.accuracy is None
    assert loader.zero_shot_accuracy == pytest.approx(
        accuracy(model.with_head(), IterableLoader(floats, image_size=48, classes=10))
    )
    for name, value in listed.last.with_head().state_dict().items():
        torch.testing.assert_close(loader.last.with_head().state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(listed.last.with_head().head.weight, before)
    assert torch.equal(model.with_head().head.weight, before), "the model that was given stays as it is"
    assert "zero-shot" in loader._repr_html_()


def test_a_folder_an_image_folder_and_a_run(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 4, "lr": 1e-4}
    by_name = cf.fine_tune(cf.load("tiny"), str(folder), **settings)
    assert by_name.model.class_names == ("one", "two")
    as_dataset = cf.fine_tune(cf.load("tiny"), ImageFolder(str(folder)), **settings)
    theirs = as_dataset.last.with_head().state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in by_name.last.with_head().state_dict().items())
    scores = cf.evaluate(by_name.model, folder)
    (score,) = scores.values()
    assert score.images == 12
    assert "12" in scores._repr_html_()
    zero_shot = cf.evaluate(cf.load("tiny"), folder)
    assert next(iter(zero_shot.values())).images == 12


def test_a_trained_run_loads_with_its_classes(folder: Path, tmp_path: Path) -> None:
    from cammask_fast.cli import main

    argv = ["train", "--data", folder, "--epochs", "1", "--batch-size", "4", "--lr", "1e-4", "--out", tmp_path / "run"]
    assert main([str(word) for word in argv]) == 0
    run = cf.load(tmp_path / "run")
    assert run.class_names == ("one", "two")
    assert cf.load(tmp_path / "run" / "last.safetensors").class_names == ("one", "two")
    photo = next((folder / "one").iterdir())
    assert cf.cam(run, [photo], "two").relevance.max() == pytest.approx(1)
    with pytest.raises(ValueError, match="maps of its own classes only: one, two"):
        cf.cam(run, [photo], "three")
    with pytest.raises(ValueError, match="no text tower"):
        run.with_classes(["a"])
    assert cf.export(tmp_path / "run", "torch-export", tmp_path / "out").difference < 1e-5


def test_maps_and_counterfactuals(model: cf.Model, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:4], digits[1][:4]
    prompts = [f"a photo of the number {CLASS_NAMES[label]}." for label in labels]
    maps = cf.cam(model, images, prompts)
    classifier = cf.load("tiny").with_classes(list(dict.fromkeys(prompts)), ["{}"]).with_head()
    of_prompt = torch.tensor([list(dict.fromkeys(prompts)).index(prompt) for prompt in prompts])
    expected = normalise_relevance(relevance_of(classifier, images, of_prompt, "mm-cam"))
    torch.testing.assert_close(maps.relevance.flatten(1), expected)
    assert len(maps.figure().axes) == 8
    made = cf.counterfactual(model, images, prompts, masking="ObjMaskSingleFill(0.3)", seed=3)
    assert torch.equal(made.masks, maps.relevance > 0.3)
    outside = ~made.masks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(made.images[outside], images[outside])
    assert (made.images != images).any()
    assert made.pictures()[0].size == (48, 48)
    with pytest.raises(ValueError, match="nothing to fill from"):
        cf.counterfactual(model, images[:1], prompts[0])
    assert cf.counterfactual(model, images[:1], prompts[0], donors=images[1:]).images.shape == (1, 48, 48, 3)


def test_a_step_in_a_loop_of_ones_own(model: cf.Model, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:16], digits[1][:16]
    student = model.with_head().frozen_copy()
    step = cf.train_step(student, model, method="masked-object", w_distill=8.0, seed=5)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    first = step(images, labels)
    assert first.total == pytest.approx((first.task + 8.0 * first.distill).item())
    assert all(parameter.grad is not None for parameter in student.parameters())
    optimizer.step()
    optimizer.zero_grad()
    again = cf.train_step(student, model, method="masked-object", w_distill=8.0, seed=5)(images, labels)
    assert again.task < first.task
    with pytest.raises(ValueError, match="differ in their classes"):
        cf.train_step(cf.load("tiny", classes=["a"]), model)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "expected uint8"),
        (torch.zeros(3, 4, 4), "expected uint8"),
        (torch.full((2, 3, 4, 4), -1.5), "leave out the normalisation"),
        (torch.full((2, 3, 4, 4), float("nan")), "leave out the normalisation"),
    ],
)
def test_images_that_are_no_images(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_uint8(images)


def test_layouts_of_images() -> None:
    pixels = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    first = pixels.permute(0, 3, 1, 2)
    assert torch.equal(to_uint8(pixels), pixels)
    assert torch.equal(to_uint8(first), pixels)
    assert torch.equal(to_uint8(first / 255.0), pixels)


def test_data_that_cannot_be_used(model: cf.Model, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    good = (images[:4], labels[:4])
    with pytest.raises(ValueError, match="used up after one epoch"):
        cf.fine_tune(model, iter([good]), **QUICK)
    with pytest.raises(ValueError, match="there are no batches"):
        cf.fine_tune(model, [], **QUICK)
    with pytest.raises(ValueError, match="48 x 48 pixels, got 40 x 40"):
        cf.fine_tune(model, [(images[:4, :40, :40], labels[:4])], **QUICK)
    with pytest.raises(ValueError, match=r"whole numbers, int \(4,\)"):
        cf.fine_tune(model, [(images[:4], labels[:3])], **QUICK)
    with pytest.raises(ValueError, match=r"expected \(images, labels\), got Tensor"):
        cf.fine_tune(model, [images[:4]], **QUICK)
    with pytest.raises(ValueError, match="unknown settings: learning_rate"):
        cf.fine_tune(model, [good], learning_rate=1.0)
    with pytest.raises(ValueError, match="the model has none"):
        cf.fine_tune(cf.load("tiny"), [good], **QUICK)
    with pytest.raises(ValueError, match="they differ"):
        cf.fine_tune(model, "texture-digits", class_names=["a"] * 10, **QUICK)
    with pytest.raises(ValueError, match="no classes yet"):
        cf.load("tiny").predict(images[:1])


def test_a_last_small_batch_is_left_out_of_training(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    batches = [(images[:16], labels[:16]), (images[16:32], labels[16:32]), (images[:3], labels[:3])]
    assert [len(b.labels) for b in IterableLoader(batches, image_size=48, classes=10, drop_last=True)] == [16, 16]
    assert [len(b.labels) for b in IterableLoader(batches, image_size=48, classes=10)] == [16, 16, 3]
    assert len(IterableLoader(batches, image_size=48, classes=10)) == 3
    assert isinstance(MaskRandomness(), tuple)

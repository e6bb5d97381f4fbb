"""ImageNet and its shifts, in miniature: real folder names, one image per class whose colour is its class, and a classifier
that reads the colour, so that the right answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from torch import Tensor

from cammask_fast.data.datasets import imagenet
from cammask_fast.data.datasets.imagenet import Known, find_sets, imagenet_names, objectnet_mapping, open_known, wnids, wnids_of
from cammask_fast.data.factory import folders_of, open_evaluation
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.evaluate import Score, evaluate
from cammask_fast.kernels.reference.pixels import CLIP_MEAN, CLIP_STD
from cammask_fast.model.classifier import Classifier

SIZE = 16


def coloured(path: Path, index: int, *, border: int = 0) -> None:
    """An image whose colour is the three digits of `index`, in a red frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((24 + 2 * border, 32 + 2 * border, 3), np.uint8)
    pixels[:] = (255, 0, 0)
    pixels[border : 24 + border, border : 32 + border] = [12 + 25 * (index // ten % 10) for ten in (100, 10, 1)]
    Image.fromarray(pixels).save(path, quality=95)


class ColourReader:
    """Stands for a `Classifier` over ImageNet's classes: its largest logit is `says(class of the colour)`, its second
    `then(class of the colour)`."""

    def __init__(self, says: Callable[[int], int] = lambda index: index, then: Callable[[int], int] = lambda index: index):
        self.says, self.then = says, then
        self.head = SimpleNamespace(weight=torch.zeros(1000, 4))
        self.visual = SimpleNamespace(conv1=SimpleNamespace(weight=torch.zeros(1)))

    def __call__(self, images: Tensor) -> SimpleNamespace:
        pixels = 255 * (images * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None])
        digits = ((pixels.mean((2, 3)) - 12) / 25).round().long()
        logits = torch.zeros(len(images), 1000)
        for row, index in enumerate((digits * torch.tensor([100, 10, 1])).sum(1).clamp(0, 999).tolist()):
            logits[row, self.then(index)] = 5.0
            logits[row, self.says(index)] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six sets under spellings in use, with every second class of the large ones to save time."""
    root = tmp_path_factory.mktemp("datasets")
    chosen = range(0, 1000, 2)
    layouts: Mapping[str, Iterable[str]] = {
        "ILSVRC2012/val": [wnids()[i] for i in chosen],
        "imagenetv2-matched-frequency-format-val": [str(i) for i in chosen],
        "imagenet-r": wnids_of("imagenet-r"),
        "sketch": [wnids()[i] for i in chosen],
        "imagenet-a": wnids_of("imagenet-a"),
    }
    index_of = {wnid: index for index, wnid in enumerate(wnids())}
    for folder, names in layouts.items():
        for name in names:
            coloured(root / folder / name / "0.JPEG", int(name) if name.isdecimal() else index_of[name])
    write_objectnet(root / "objectnet-1.0")
    return root


def write_objectnet(root: Path) -> None:
    """Two mapped folders, one of which maps to two classes, and one that is not mapped. The images of `mug` show class 504
    and those of `chair` its second class, 765. ImageNet 2012's ids are not in the order of the classes."""
    ids = {str(index): (index * 7 + 3) % 1000 for index in range(1000)}
    lines = [""] * 1000
    for index, number in ids.items():
        lines[number] = f"name of {index}, synonym"
    (root / "mappings").mkdir(parents=True)
    (root / "mappings/pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))
    (root / "mappings/imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    labels = {"mug": "Mug", "chair_by_folder": "Chair", "air_freshener": "Air freshener"}
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    mapped = {"Mug": "name of 504, synonym", "Chair": "name of 559, synonym; name of 765, synonym"}
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(mapped))
    for folder, shown in (("mug", 504), ("chair_by_folder", 765), ("air_freshener", 1)):
        for number in range(3):
            coloured(root / "images" / folder / f"{number}.png", shown, border=2)


def scores(
    family: Path,
    model: ColourReader,
    data: list[str] | None = None,
    folders: tuple[str, ...] | None = None,
    **loader_config: Any,
) -> dict[str, Score]:
    options = LoaderConfig(workers=1, report=family / "bad.tsv", **loader_config)
    sets = open_evaluation(
        data or [str(family)], image_size=SIZE, class_folders=folders or wnids(), loader_config=options, allow_incomplete=True
    )
    return {
        name: evaluate([cast(Classifier, model)], one.loader, groups=one.groups, classes=len(one.class_folders))[0]
        for name, one in sets.items()
    }


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_the_right_classifier_is_right_on_every_set(family: Path, loader: str) -> None:
    """V2's folders 0 to 999 in particular, which sorted as strings give other labels."""
    found = scores(family, ColourReader(), kind=loader)
    assert list(found) == ["imagenet", "imagenet-v2", "imagenet-r", "imagenet-sketch", "imagenet-a", "objectnet"]
    assert {name: score.top1 for name, score in found.items()} == dict.fromkeys(found, 100.0)
    assert [score.images for score in found.values()] == [500, 500, 200, 500, 200, 6]


def test_only_the_logits_of_a_set_count(family: Path) -> None:
    """A model that prefers a class outside the 200 (or outside ObjectNet's) is judged by its best one inside."""
    of_a, of_r = ({wnids().index(wnid) for wnid in wnids_of(name)} for name in ("imagenet-a", "imagenet-r"))
    outside = min(set(range(1000)) - of_a - of_r - {504, 559, 765})
    found = scores(family, ColourReader(says=lambda _index: outside))
    assert {name: found[name].top1 for name in ("imagenet-a", "imagenet-r", "objectnet")} == dict.fromkeys(
        ("imagenet-a", "imagenet-r", "objectnet"), 100.0
    )
    assert found["imagenet"].top1 <= 0.2, "the class itself may be among the images"
    assert found["imagenet"].top5 == 100.0
    inside = min(of_a - of_r)
    found = scores(family, ColourReader(says=lambda _index: inside))
    assert found["imagenet-a"].top1 == 0.5, "a class that counts is a wrong answer for 199 of 200"
    assert found["imagenet-r"].top1 == 100.0


def test_any_class_of_an_objectnet_folder_is_right(family: Path) -> None:
    found = scores(family, ColourReader(says=lambda index: 559 if index == 765 else index))
    assert found["objectnet"].top1 == 100.0
    found = scores(family, ColourReader(says=lambda _index: 504))
    assert found["objectnet"].top1 == 50.0
    assert found["objectnet"].per_class == (0.0, 100.0), "chair_by_folder and mug"


def test_objectnets_frame_is_two_pixels_wide(tmp_path: Path) -> None:
    """The pixels next to it belong to the image: of 24 rows in the size of the model the first and the last are white."""
    write_objectnet(tmp_path)
    for path in tmp_path.glob("images/*/*.png"):
        pixels = np.array(Image.open(path))
        pixels[2:-2, 2:-2][[0, -1]] = 255
        Image.fromarray(pixels).save(path)
    options = LoaderConfig(kind="torch", workers=0, report=tmp_path / "bad.tsv")
    data = f"objectnet={tmp_path}"
    (one,) = open_evaluation(
        [data], image_size=24, class_folders=wnids(), loader_config=options, allow_incomplete=True
    ).values()
    images = torch.cat([batch.images for batch in one.loader])
    assert images.shape == (6, 24, 24, 3)
    assert (images[:, [0, -1]] == 255).all()
    assert (images[:, 1:-1] < 255).all(), "nothing of the red frame is left"


def test_a_classifier_of_shuffled_classes_is_judged_by_wnid(family: Path) -> None:
    """The order of a model's classes is its own; sets are matched by name."""
    reversed_folders = tuple(reversed(wnids()))
    found = scores(family, ColourReader(says=lambda i: 999 - i, then=lambda i: 999 - i), folders=reversed_folders)
    assert {score.top1 for score in found.values()} == {100.0}


def test_a_model_of_fewer_classes_sees_only_those(family: Path) -> None:
    known = open_known("imagenet-v2", family / "imagenetv2-matched-frequency-format-val", wnids()[:10])
    assert len(known.images) == 5
    assert known.images.folders == wnids()[0:10:2]
    assert known.groups.tolist() == [0, 5, 1, 5, 2, 5, 3, 5, 4, 5], "classes without images still compete"
    with pytest.raises(ValueError, match="imagenet-v2: the model has none of its classes"):
        open_known("imagenet-v2", family / "imagenetv2-matched-frequency-format-val", ("dog", "cat"))


def test_v2_with_wnid_folders(tmp_path: Path) -> None:
    for index in (0, 10, 2):
        coloured(tmp_path / "imagenet-v2" / "ImageNetV2-matched-frequency" / wnids()[index] / "0.jpg", index)
    (found,) = scores(tmp_path, ColourReader()).values()
    assert (found.images, found.top1) == (3, 100.0)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("imagenet", "imagenet"), ("ImageNet-1k/val", "imagenet"), ("ILSVRC2012_img_val", "imagenet"),
        ("imagenet-v2", "imagenet-v2"), ("imagenetv2/imagenetv2-matched-frequency-format-val", "imagenet-v2"),
        ("imagenet_r", "imagenet-r"), ("ImageNet-R", "imagenet-r"), ("imagenet-rendition", "imagenet-r"),
        ("ImageNet-Sketch/sketch", "imagenet-sketch"), ("imagenet_sketch", "imagenet-sketch"), ("imagenet-a", "imagenet-a"),
    ],
)  # fmt: skip
def test_spellings(tmp_path: Path, spelling: str, name: str) -> None:
    coloured(tmp_path / spelling / "n01440764" / "0.jpg", 0)
    (tmp_path / "unrelated" / "n01440764").mkdir(parents=True)
    assert find_sets(tmp_path) == {name: tmp_path / spelling}
    assert find_sets(tmp_path / spelling.split("/")[0]) == {name: tmp_path / spelling}
    assert find_sets(tmp_path / "unrelated") == {}


def test_a_training_folder_or_other_data_of_that_name_is_not_taken_for_a_set(tmp_path: Path) -> None:
    coloured(tmp_path / "sketch" / "cat" / "0.jpg", 0)
    coloured(tmp_path / "imagenet" / "train" / "n01440764" / "0.jpg", 0)
    assert find_sets(tmp_path) == {}


def test_wrong_counts_are_errors_that_say_what_is_missing(family: Path) -> None:
    def opened(*data: str) -> None:
        open_evaluation(data, image_size=SIZE, class_folders=wnids(), loader_config=LoaderConfig(workers=0))

    with pytest.raises(ValueError, match=r"imagenet: 500 of 1000 classes and 500 of 50000 images in .*val, missing n01443537"):
        opened(str(family))
    with pytest.raises(ValueError, match=r"imagenet-r: 200 of 200 classes and 200 of 30000 images .*--allow-incomplete"):
        opened(f"imagenet-r={family / 'imagenet-r'}")
    with pytest.raises(ValueError, match="not classes of imagenet-r: n"):
        opened(f"imagenet-r={family / 'imagenet-a'}")
    with pytest.raises(ValueError, match=r"objectnet: 2 of 113 classes and 6 of 18574 images"):
        opened(str(family / "objectnet-1.0"))
    with pytest.raises(ValueError, match="no folder at"):
        opened(f"imagenet-r={family / 'nowhere'}")
    with pytest.raises(ValueError, match=r"not built as objectnet: expected images/"):
        opened(f"objectnet={family / 'imagenet-a'}")


def test_a_whole_set_passes_and_one_image_less_does_not(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for images, whole in ((200, True), (201, False), (199, False)):
        monkeypatch.setitem(imagenet.KNOWN, "imagenet-a", Known(spellings=("imageneta",), classes=200, images=images))
        assert (open_known("imagenet-a", family / "imagenet-a", wnids()).lacking == "") is whole


def test_damaged_mappings(family: Path, tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    mappings = tmp_path / "mappings"
    assert objectnet_mapping(mappings) == {"mug": (wnids()[504],), "chair_by_folder": (wnids()[559], wnids()[765])}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Mug": "no such name"}))
    with pytest.raises(ValueError, match=r"do not fit together: nothing for 'no such name'"):
        objectnet_mapping(mappings)
    (mappings / "imagenet_to_label_2012_v2").unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        objectnet_mapping(mappings)
    (mappings / "objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(ValueError, match=r"objectnet_to_imagenet_1k.json is missing"):
        open_known("objectnet", tmp_path, wnids())


def test_prompts_for_wnid_folders_are_clips_names_by_place(family: Path) -> None:
    assert len(wnids()) == len(set(wnids())) == 1000
    assert imagenet_names(wnids()) == tuple(IMAGENET_CLASSNAMES)
    assert imagenet_names(("n01443537", "n01440764")) == ("goldfish", "tench")
    twice = [wnid for wnid, name in zip(wnids(), IMAGENET_CLASSNAMES, strict=True) if name == "missile"]
    assert len(twice) == 2
    assert imagenet_names(twice) == ("missile", "missile")
    assert imagenet_names(("n01443537", "dog")) is None
    assert imagenet_names(("n99999999",)) is None
    assert folders_of([str(family)]) == wnids()
    assert (len(wnids_of("imagenet-a")), len(wnids_of("imagenet-r"))) == (200, 200)

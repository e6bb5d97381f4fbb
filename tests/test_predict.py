"""`predict`, what `evaluate --out` writes of every image, and the ends of `wise-ft`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cammask_fast.checkpoint import Description, load_classifier, save_classifier
from cammask_fast.cli import main
from cammask_fast.commands.evaluation import alpha_names
from cammask_fast.commands.predictions import write_predictions
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, render, sample_scenes
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications
from cammask_fast.data.factory import EvaluationSet
from cammask_fast.evaluate import Predicted, PredictionLog
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import load_tiny_clip, tiny_classifier
from cammask_fast.viz.mask_images import photograph

FP32 = ["--precision", "fp32"]
LOADING = [*FP32, "--loader", "torch", "--workers", "0"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of the benchmark in class folders, and a text file among them."""
    root = tmp_path_factory.mktemp("digits")
    scenes = sample_scenes(evaluation_specifications()["id"])[slice(0, 12)]
    for i, (label, image) in enumerate(zip(scenes.labels, render(scenes), strict=True)):
        path = root / CLASS_NAMES[label] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    (root / CLASS_NAMES[scenes.labels[0]] / "notes.txt").write_text("x")
    return root


def saved(path: Path, model: Classifier, names: tuple[str, ...], **run: Any) -> Path:
    save_classifier(path, model, Description(arch="tiny", vit=model.visual.config, class_names=names, run=run))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder over the digits, its classes in another order than the folders'."""
    folder = tmp_path_factory.mktemp("run")
    saved(folder / "best.safetensors", tiny_classifier(CLASS_NAMES[::-1]), CLASS_NAMES[::-1], pretrained="tiny")
    return folder


def expected(run: Path, path: Path) -> tuple[list[str], list[float]]:
    """The two most probable classes."""
    model, description = load_classifier(run / "best.safetensors")
    with torch.no_grad():
        probabilities, classes = model(normalise(photograph(path, 48)[None])).logits.softmax(1).topk(2)
    return [description.class_names[i] for i in classes[0].tolist()], probabilities[0].tolist()


def test_predictions_of_files_folders_and_patterns(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(digits.rglob("*.png"))
    table = tmp_path / "new" / "p.csv"
    argv = ["predict", str(run), str(images[3]), str(digits), str(digits / "*" / "0*.png"), "--top", "2", *FP32]
    assert main([*argv, "--json", "--csv", str(table)]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [one["image"] for one in found["images"]] == [str(images[3]), *(str(path) for path in images if path != images[3])]
    for one in found["images"]:
        names, values = expected(run, Path(one["image"]))
        assert [p["class"] for p in one["predictions"]] == names
        assert [p["probability"] for p in one["predictions"]] == pytest.approx(values, abs=1e-5)
    assert "1 .txt" in printed.err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert (rows[0]["image"], rows[0]["rank"], rows[1]["rank"]) == (str(images[3]), "1", "2")
    assert float(rows[1]["probability"]) == pytest.approx(found["images"][0]["predictions"][1]["probability"], abs=1e-6)
    assert main([*argv[:3], "--top", "1", *FP32]) == 0
    names, values = expected(run, images[3])
    assert capsys.readouterr().out.split("\n")[0] == f"{images[3]}  {names[0]} {100 * values[0]:.2f} %"


def test_a_checkpoint_and_pre_trained_models_predict_the_same(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_tiny_clip().state_dict(), tmp_path / "w.safetensors")
    said = []
    for model in (
        [str(run)], [str(run / "best.safetensors")], ["tiny"], [str(tmp_path / "w.safetensors"), "--arch", "tiny"],
        ["tiny", "--classes", ",".join(CLASS_NAMES)],
    ):  # fmt: skip
        assert main(["predict", model[0], str(digits), *model[1:], "--top", "1", *FP32]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert said[0].count("\n") == 12


def test_unreadable_photographs_are_counted(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    good = str(next(digits.rglob("*.png")))
    assert main(["predict", str(run), good, str(tmp_path / "bad.jpg"), str(tmp_path / "none.jpg"), "--json", *FP32]) == 0
    printed = capsys.readouterr()
    first, bad, none = json.loads(printed.out)["images"]
    assert "predictions" in first
    assert "cannot read the image" in bad["error"]
    assert "none.jpg" in none["error"]
    assert "left out: 2" in printed.err
    assert main(["predict", str(run), good, str(tmp_path / "bad.jpg"), "--strict", *FP32]) == 2
    capsys.readouterr()
    for words, message in (
        ([str(tmp_path / "bad.jpg")], "none of the 1 photographs can be read"),
        ([str(tmp_path / "*.webp")], "no files match"),
        ([good, "--top", "0"], "--top: expected 1 or more"),
        ([good, "--classes", "a,b"], "brings its own head and classes"),
    ):
        assert main(["predict", str(run), *words, *FP32]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert not printed.out
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(run), str(tmp_path / "empty"), *FP32]) == 2
    assert main(["predict", "ViT-B/32", good, *FP32]) == 2
    assert "--classes: needed with the pre-trained ViT-B/32" in capsys.readouterr().err


# evaluate


def test_evaluate_writes_every_prediction(run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores"
    assert main(["evaluate", "--checkpoint", str(run), "--data", str(digits), "--out", str(out), "--json", *LOADING]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    rows = list(csv.DictReader((out / "predictions.csv").open(newline="")))
    assert [one["image"] for one in rows] == [str(path) for path in sorted(digits.rglob("*.png"))]
    for one in rows:
        names, values = expected(run, Path(one["image"]))
        assert (one["predicted"], one["class"]) == (names[0], Path(one["image"]).parent.name)
        assert float(one["probability"]) == pytest.approx(values[0], abs=1e-5)
        assert one["correct"] == str(int(one["predicted"] == one["class"]))
    assert 100 * sum(int(one["correct"]) for one in rows) / 12 == pytest.approx(row["accuracy"])
    matrix = list(csv.DictReader((out / "confusion.csv").open(newline="")))
    for true in matrix:
        for name in CLASS_NAMES:
            assert int(true[name]) == sum((one["class"], one["predicted"]) == (true["class"], name) for one in rows)
    for one in csv.DictReader((out / "per_class.csv").open(newline="")):
        own = [r for r in rows if r["class"] == one["class"]]
        assert int(one["images"]) == len(own)
        assert int(one["correct"]) == sum(r["correct"] == "1" for r in own)
        assert int(one["predicted"]) == sum(r["predicted"] == one["class"] for r in rows)
        assert float(one["accuracy"]) == pytest.approx(100 * int(one["correct"]) / len(own))


def test_logits_that_do_not_count_and_classes_of_several_logits(tmp_path: Path) -> None:
    """Logit 1 does not count, logits 0 and 2 are right for label 0, logit 3 is never right."""
    log = PredictionLog(torch.tensor([0, -1, 0, 2, 1]))
    from cammask_fast.data.types import Batch

    logits = torch.tensor([[0.0, 9, 1, 0, 0], [0, 0, 0, 5, 0], [0, 0, 0, 0, 3]])
    log(Batch(torch.zeros(3, 1), torch.tensor([0, 0, 1]), torch.tensor([2, 0, 1])), logits)
    found = log.result()
    assert found.sample_ids.tolist() == [0, 1, 2]
    assert found.logits.tolist() == [3, 4, 2]
    assert found.groups.tolist() == [2, 1, 0]
    assert found.probabilities[2].item() == pytest.approx(torch.tensor([0.0, 1, 0, 0]).softmax(0)[1].item())
    assert found.confusion(2).tolist() == [[1, 0, 1], [0, 1, 0]]
    one = EvaluationSet(object(), found.labels, ("x", "y"), log.groups)  # type: ignore[arg-type]
    sets, both = {"p/set": one, "q/set": one}, {"p/set": found, "q/set": found}
    write_predictions(tmp_path, sets, both, ("a", "b", "c", "d", "e"))
    assert (tmp_path / "confusion-1-set.csv").read_text().splitlines() == ["class,x,y,(none of these)", "x,1,0,1", "y,0,1,0"]
    assert (tmp_path / "confusion-2-set.csv").exists()
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[:2] == ["data,image,class,predicted,probability,correct", f"p/set,0,x,d,{found.probabilities[0]:.6f},0"]
    assert len(lines) == 7
    assert isinstance(found, Predicted)


def test_evaluate_takes_a_pre_trained_model(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for words in (["--checkpoint", str(run)], ["--checkpoint", "tiny"]):
        assert main(["evaluate", *words, "--data", str(digits), "--json", *LOADING]) == 0
        (row,) = json.loads(capsys.readouterr().out)["sets"]
        tables.append(row["accuracy"])
    assert main(["zeroshot", "--data", str(digits), "--json", *LOADING]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    assert tables[1] == row["accuracy"]
    (tmp_path / "t.txt").write_text("{}\n")
    for option in (["--templates", str(tmp_path / "t.txt")], ["--pretrained", "tiny"], ["--class-names", "x"]):
        assert main(["evaluate", "--checkpoint", str(run), "--data", str(digits), *option]) == 2
        assert "brings its own head and classes" in capsys.readouterr().err


# wise-ft


@pytest.fixture
def ends(digits: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A zero-shot start over the digits, and an end that differs, with its classes in another order."""
    names = tuple(sorted({path.name for path in digits.iterdir()}))
    saved(tmp_path / "zs" / "best.safetensors", tiny_classifier(names), names, class_folders=list(names))
    other = names[::-1]
    model = tiny_classifier(other)
    with torch.no_grad():
        model.head.bias.add_(torch.arange(len(other)))
    for name in ("best", "last"):
        saved(tmp_path / "ft" / f"{name}.safetensors", model, other, class_folders=list(other), pretrained="tiny")
    return tmp_path / "zs", tmp_path / "ft"


def test_ends_with_their_classes_in_another_order(
    digits: Path, ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, end = ends
    out = tmp_path / "out"
    argv = ["wise-ft", "--end", str(end), "--data", str(digits), *LOADING]
    assert main([*argv, "--start", str(start), "--alphas", "0", "0.991", "0.994", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "in another order" in printed.err
    assert "last.safetensors" in printed.err
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "alpha-0.00.safetensors", "alpha-0.991.safetensors", "alpha-0.994.safetensors", "alpha-1.00.safetensors",
    ]  # fmt: skip
    assert [line.split()[0] for line in printed.out.splitlines()] == ["alpha", "0.00", "0.991", "0.994", "1.00"]
    zero_shot, tuned = load_file(start / "best.safetensors"), load_file(end / "last.safetensors")
    first, last = load_file(out / "alpha-0.00.safetensors"), load_file(out / "alpha-1.00.safetensors")
    assert torch.equal(first["head.weight"], zero_shot["head.weight"].flip(0))
    assert torch.equal(last["head.bias"], tuned["head.bias"])
    assert (
        load_classifier(out / "alpha-0.00.safetensors")[1].class_names
        == load_classifier(end / "last.safetensors")[1].class_names
    )
    scores = [one["accuracy"] for one in json.loads((out / "scores.json").read_text())]
    assert main(["evaluate", "--checkpoint", str(start), "--data", str(digits), "--json", *LOADING]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    assert scores[0] == {str(digits): row["accuracy"]}
    for words in ([], ["--start", "tiny"]):
        assert main([*argv, *words, "--alphas", "0", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["accuracy"] == scores[0], "the model that the end began from"


def test_ends_with_other_classes_are_refused(
    digits: Path, ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (*sorted({path.name for path in digits.iterdir()})[1:], "cow")
    saved(tmp_path / "cow.safetensors", tiny_classifier(["one"] * len(names)), names)
    argv = ["wise-ft", "--start", str(tmp_path / "cow.safetensors"), "--end", str(ends[1]), "--data", str(digits)]
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "only it has: cow" in error
    assert "it lacks: " in error
    for words, message in (
        (["--start", "ViT-B/32"], "of another architecture"),
        (["--alphas", "0.5", "0.5"], "--alphas: 0.5 is given twice"),
    ):
        assert main([*argv[:1], *argv[3:], *words]) == 2
        assert message in capsys.readouterr().err


def test_names_of_alphas() -> None:
    assert alpha_names([0.0, 0.5, 0.991, 0.994, 1 / 3, 1.0]) == ["0.00", "0.50", "0.991", "0.994", "0.3333333333333333", "1.00"]

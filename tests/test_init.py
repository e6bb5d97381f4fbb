"""`train --init`: from a run's own weights, heads matched by class name, the pre-trained model as the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cammask_fast.checkpoint import Description, load_classifier, save_classifier
from cammask_fast.checkpoint.heads import Classes, head_for, matching_rows, same_classes_in_order
from cammask_fast.checkpoint.source import find_checkpoint, find_model, is_own
from cammask_fast.cli import main
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import load_tiny_clip, tiny_classifier
from cammask_fast.runtime.notices import collecting
from tests.test_folder import make_folder

QUICK = ["--epochs", "1", "--batch-size", "4", "--lr", "1e-3", "--loader", "torch", "--workers", "0", "--precision", "fp32"]


def classes(*names: str, folders: tuple[str, ...] = ()) -> Classes:
    return Classes(names, folders or names)


def save(path: Path, model: Classifier, names: tuple[str, ...], **run: object) -> Path:
    save_classifier(path, model, Description(arch="tiny", vit=model.visual.config, class_names=names, run=dict(run)))
    return path


@pytest.mark.parametrize(
    ("wanted", "known", "rows"),
    [
        (classes("a", "b"), classes("b", "a"), [1, 0]),
        (classes("a", "c", "b"), classes("b", "a"), [1, None, 0]),
        (classes("Polar bear"), classes("cat", "polar_bear"), [1]),
        (classes("a", "A"), classes("A", "a"), [1, 0]),
        (classes("m", "m", folders=("n1", "n2")), classes("m", "m", folders=("n2", "n1")), [1, 0]),
        (classes("m", "m"), classes("m", "m"), [0, 1]),
        (classes("m", "m"), classes("m"), [0, None]),
        (classes("hound", folders=("dog",)), classes("cat", "dog"), [1]),
        (classes("cat", "dog", folders=("0", "1")), classes("dog", "cat", folders=("0", "1")), [1, 0]),
        (classes("cat", folders=("0",)), classes("dog", folders=("0",)), [None]),
        (classes("dog", "b", folders=("x", "dog")), classes("dog"), [0, None]),
    ],
)  # fmt: skip
def test_rows_are_matched_by_name(wanted: Classes, known: Classes, rows: list[int | None]) -> None:
    assert matching_rows(wanted, known) == rows


def head(*names: str) -> Classifier:
    """A classifier whose bias and rows are the letters' numbers."""
    model = tiny_classifier(["one"] * len(names), ["{}"])
    with torch.no_grad():
        for row, name in enumerate(names):
            model.head.weight[row], model.head.bias[row] = float(ord(name)), float(ord(name))
    return model


def test_a_head_is_put_into_another_order(capsys: pytest.CaptureFixture[str]) -> None:
    model = same_classes_in_order(head("b", "a"), classes("b", "a"), classes("a", "b"), "START has its classes")
    assert model.head.bias.tolist() == [97, 98]
    assert model.head.weight[:, 0].tolist() == [97, 98]
    assert "in another order" in capsys.readouterr().err
    same_classes_in_order(head("a", "b"), classes("a", "b"), classes("a", "b"), "START")
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"START \(it lacks: c; only it has: b\): they must have the same classes"):
        same_classes_in_order(head("a", "b"), classes("a", "b"), classes("a", "c"), "START")
    with pytest.raises(ValueError, match=r"\(only it has: b\)"):
        same_classes_in_order(head("a", "b"), classes("a", "b"), classes("a"), "START")


def test_a_head_for_other_classes(capsys: pytest.CaptureFixture[str]) -> None:
    tuned, own = head("b", "a"), classes("b", "a")
    zero_shot = torch.full((3, 64), 7.0)
    model = head_for(tuned, own, classes("a", "c", "b"), zero_shot, "it")
    assert model.head.bias.tolist() == [97, 0, 98]
    assert model.head.weight[:, 5].tolist() == [97, 7, 98]
    assert "it lacks 1 of the 3 classes (c)" in capsys.readouterr().err
    assert head_for(tuned, own, classes("a"), None, "it").head.bias.tolist() == [97]
    assert "classes that are not in the data: 1, b" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lacks 1 of the 1 classes, c"):
        head_for(tuned, own, classes("c"), None, "it")
    assert tuned.head.bias.tolist() == [98, 97], "untouched"


# what names a model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    save(tmp_path / "runs/x/best.safetensors", tiny_classifier(["one", "two"]), ("one", "two"))
    (tmp_path / "runs/x/run.json").write_text("{}")
    return tmp_path / "runs/x"


def test_a_run_folder_a_checkpoint_or_a_name(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run_folder / "best.safetensors"
    for given in (run_folder, str(run_folder), best, run_folder / "run.json"):
        assert find_model(given).checkpoint == best
        assert find_checkpoint(given, "--init") == best
    assert is_own(run_folder)
    assert is_own(best)
    assert not is_own("openai")
    found = find_model("ViT-B/32", pretrained="openai")
    assert (found.checkpoint, found.arch, found.pretrained) == (None, "ViT-B/32", "openai")
    assert find_model("tiny").arch == "tiny"
    save_file(load_tiny_clip().state_dict(), tmp_path / "w.safetensors")
    found = find_model(tmp_path / "w.safetensors", arch="tiny")
    assert (found.checkpoint, found.arch, found.pretrained) == (None, "tiny", str(tmp_path / "w.safetensors"))
    assert not capsys.readouterr().err
    best.rename(run_folder / "last.safetensors")
    assert find_model(run_folder).checkpoint == run_folder / "last.safetensors"
    assert "last.safetensors is used" in capsys.readouterr().err


def test_what_names_no_model_is_one_line(run_folder: Path, tmp_path: Path) -> None:
    for given, message in (
        (run_folder.parent / "y", f"no checkpoint at .*did you mean {run_folder}"),
        ("ViT-B-33", "no architecture of that name; did you mean ViT-B-32"),
        (run_folder.parent, "give one of the runs in it, .*/x$"),
    ):
        with pytest.raises(ValueError, match=message):
            find_model(given)
    with pytest.raises(ValueError, match="--arch names another, tiny"):
        find_model("ViT-B/32", arch="tiny")
    save_file(load_tiny_clip().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="weights of a CLIP: add --arch"):
        find_model(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="--pretrained takes it"):
        find_checkpoint(tmp_path / "w.safetensors", "--init")
    with pytest.raises(ValueError, match="and this is an architecture"):
        find_checkpoint("tiny", "--init")
    (tmp_path / "hub").mkdir()
    save_file(load_tiny_clip().state_dict(), tmp_path / "hub" / "model.safetensors")
    with pytest.raises(ValueError, match="--pretrained takes it"):
        find_checkpoint(tmp_path / "hub", "--init")
    begun = tmp_path / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not finished: run its command again"):
        find_model(begun)
    for name in ("state.json", "tensors.safetensors"):
        (begun / "checkpoints" / name).touch()
    with pytest.raises(ValueError, match="the state of a run that is under way"):
        find_model(begun / "checkpoints")


# the command


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos"), {"dog": 8, "red_fox": 8})


@pytest.fixture(scope="module")
def probe(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished linear probe, with a bias that no zero-shot head has."""
    out = tmp_path_factory.mktemp("runs") / "lp"
    assert main(["train", "--data", str(photos), "--method", "lp", "--out", str(out), *QUICK]) == 0
    return out


def record(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "run.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--init", "--pretrained"])
def test_a_probe_goes_on_as_fine_tuning(
    photos: Path, probe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """LP-FT: at a rate of nearly zero the run ends where the probe did, not at zero-shot."""
    slow = [*QUICK[:4], "--lr", "1e-12", *QUICK[6:]]
    given = probe if option == "--init" else probe / "best.safetensors"
    capsys.readouterr()
    assert (
        main(["train", "--data", str(photos), "--method", "ft", option, str(given), "--out", str(tmp_path / "ft"), *slow]) == 0
    )
    printed = capsys.readouterr()
    start, end = load_file(probe / "best.safetensors"), load_file(tmp_path / "ft" / "last.safetensors")
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(end[name], start[name], rtol=0, atol=1e-6)
    assert start["head.bias"].abs().max() > 1e-4
    found = record(tmp_path / "ft")
    assert found["init"] == str(probe / "best.safetensors")
    assert (found["teacher"], found["arch"], found["pretrained"]) == ("pretrained", "tiny", "")
    assert found["zero_shot"] == record(probe)["zero_shot"]
    assert found["start"] == record(probe)["accuracy"]
    assert "zero-shot accuracy on the" in printed.out
    assert "lp/best.safetensors accuracy on the" in printed.out
    assert ("taken as --init" in printed.err) == (option == "--pretrained")
    assert "nothing was learnt" in printed.err
    assert str(probe / "best.safetensors") in printed.err.split("nothing was learnt")[1]


@pytest.mark.slow
def test_the_teacher_is_the_model_that_it_began_from(
    photos: Path, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tuned tower: the first distillation loss is not zero against the pre-trained teacher, and zero against itself."""
    tuned, description = load_classifier(probe / "best.safetensors")
    with torch.no_grad():
        for parameter in tuned.visual.parameters():
            parameter.mul_(1.05)
    save_classifier(tmp_path / "tuned" / "best.safetensors", tuned, description)
    first = {}
    for teacher in ("pretrained", "init"):
        out = tmp_path / teacher
        argv = ["train", "--data", str(photos), "--method", "ft-fd", "--init", str(tmp_path / "tuned"), "--out", str(out)]
        assert main([*argv, "--teacher", teacher, "--log-every", "1", *QUICK]) == 0
        first[teacher] = json.loads((out / "log.jsonl").read_text().splitlines()[0])["distill"]
        assert record(out)["teacher"] == teacher
    assert first["init"] < 1e-8 < 1e-5 < first["pretrained"]


@pytest.mark.slow
def test_new_classes_begin_at_zero_shot(probe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {"red fox": 8, "cat": 8})
    argv = ["train", "--data", str(data), "--method", "ft", "--init", str(probe), "--out", str(tmp_path / "ft")]
    assert main([*argv, *QUICK[:4], "--lr", "1e-12", *QUICK[6:]]) == 0
    start, end = load_file(probe / "best.safetensors"), load_file(tmp_path / "ft" / "last.safetensors")
    expected = tiny_classifier(["cat", "red fox"]).head.weight
    torch.testing.assert_close(end["head.weight"][0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(end["head.weight"][1], start["head.weight"][1], rtol=0, atol=1e-6)
    said = capsys.readouterr().err
    assert "lacks 1 of the 2 classes (cat): their rows of the head begin at zero-shot" in said
    assert "has classes that are not in the data: 1, dog" in said
    with collecting(), pytest.raises(ValueError, match="--strict"), collecting(strict=True):
        head_for(head("b", "a"), classes("b", "a"), classes("a", "c"), torch.zeros(2, 64), "it")


@pytest.mark.slow
def test_without_the_pretrained_model(photos: Path, probe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A probe whose pre-trained file is gone still starts plain fine-tuning; a method that distils asks for it."""
    tuned, description = load_classifier(probe / "best.safetensors")
    run = {**description.run, "pretrained": str(tmp_path / "gone.safetensors")}
    save(tmp_path / "lp" / "best.safetensors", tuned, description.class_names, **run)
    argv = ["train", "--data", str(photos), "--init", str(tmp_path / "lp"), *QUICK]
    assert main([*argv, "--method", "ft", "--out", str(tmp_path / "ft")]) == 0
    assert "there is no zero-shot accuracy (no weights at" in capsys.readouterr().err
    assert record(tmp_path / "ft")["zero_shot"] == {}
    assert main([*argv, "--method", "ft-fd", "--out", str(tmp_path / "fd")]) == 2
    assert "pass its weights with --pretrained FILE, or --teacher init" in capsys.readouterr().err
    assert not (tmp_path / "fd").exists()
    assert main([*argv, "--method", "ft-fd", "--teacher", "init", "--out", str(tmp_path / "fd")]) == 0
    more = ["--pretrained", "tiny", "--out", str(tmp_path / "fd2")]
    assert main([*argv, "--method", "ft-fd", *more]) == 0
    assert record(tmp_path / "fd2")["pretrained"] == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "PROBE", "--out", "PROBE", "--overwrite"], "lies in --out"),
        (["--init", "PROBE", "--arch", "ViT-B/32"], "another architecture: image_size 48 instead of 224"),
        (["--init", "PROBE", "--pretrained", "PROBE"], "as --init is: give one of them"),
        (["--init", "nowhere"], "no checkpoint at nowhere"),
        (["--init", "tiny"], "and this is an architecture"),
        (["--init", "PROBE", "--method", "zeroshot"], "trains nothing; `cammask evaluate"),
        (["--teacher", "init"], "--teacher: needs --init"),
    ],
)
def test_what_does_not_go_together(
    photos: Path, probe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    words = [str(probe) if word == "PROBE" else word for word in options]
    out = [] if "--out" in words else ["--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert main(["train", "--data", str(photos), *QUICK, *out, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert (probe / "best.safetensors").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_start_is_another_run(photos: Path, probe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    argv = ["train", "--data", str(photos), "--method", "ft", "--out", str(out), *QUICK]
    assert main([*argv, "--init", str(probe)]) == 0
    (out / "run.json").unlink()
    moved = tmp_path / "moved.safetensors"
    shutil.copy(probe / "best.safetensors", moved)
    assert main([*argv, "--init", str(moved)]) == 0, "the same weights elsewhere"
    (out / "run.json").unlink()
    capsys.readouterr()
    assert main(argv) == 2
    assert "init None instead of" in capsys.readouterr().err

"""The command line in-process: what commands write, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cammask_fast.checkpoint import load_classifier
from cammask_fast.cli import build_parser, main
from cammask_fast.commands import recipes
from cammask_fast.commands.settings import train_config
from cammask_fast.config import OptimConfig, TrainConfig, load_recipe, options_of, recipe_names
from cammask_fast.masking import parse_strategy
from cammask_fast.model.zero_shot import load_tiny_clip
from tests.test_folder import make_folder, write_image
from tests.test_pretrained import Evil

QUICK = ["--epochs", "2", "--batch-size", "4", "--lr", "1e-4"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos"), {"red_fox": 6, "dog": 6})


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished masked-object run on `photos`."""
    out = tmp_path_factory.mktemp("runs") / "masked"
    assert main(["train", "--data", str(photos), "--method", "masked-object", "--out", str(out), *QUICK]) == 0
    return out


def fails(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 2) -> str:
    """Run a command that must fail; returns its one line on stderr, beside those that name the weights it has read."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == code
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if not line.startswith(("cammask: weights: ", "cammask: the tiny model ")))
    assert error.count("\n") == 1
    assert error.startswith("cammask: error: ")
    return error


@pytest.mark.parametrize("settings", [TrainConfig, OptimConfig])
def test_every_setting_is_an_option(settings: type, capsys: pytest.CaptureFixture[str]) -> None:
    """A new option is one field: with its type, its choices, its default and its help."""
    parser = build_parser()
    for entry in fields(settings):
        if entry.name == "optim":
            continue
        kind = type(entry.default)
        value = {str: "x", int: "7", float: "0.25"}[kind]
        args = vars(parser.parse_args(["train", "--data", "d", f"--{entry.name.replace('_', '-')}", value]))
        assert args[entry.name] == {str: "x", int: 7, float: 0.25}[kind], "of the field's type"
        assert vars(parser.parse_args(["train", "--data", "d"]))[entry.name] is None, "a recipe's value counts"
    with pytest.raises(SystemExit):
        parser.parse_args(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for one in options_of(settings):
        assert all(choice in said for choice in one.choices)
        assert " ".join(one.help.split()[:4]) in said


def test_settings_reach_the_config() -> None:
    args = vars(build_parser().parse_args(["train", "--data", "d", "--compile", "--pct-start", "0.5", "--w-task", "2"]))
    config = train_config(args, {"epochs": 3, "w_task": 9.0, "optim": {"lr": 0.5, "pct_start": 0.1}})
    assert (config.compile, config.epochs, config.w_task) == ("default", 3, 2.0), "options before the recipe before the paper"
    assert config.optim == OptimConfig(lr=0.5, pct_start=0.5)
    assert train_config(vars(build_parser().parse_args(["train", "--data", "d"])), {}) == TrainConfig()


def test_precision_bf16_trains_float32_weights(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    bf16 = ["--precision", "bf16"]
    assert main(["train", "--data", str(photos), "--method", "masked-object", "--out", str(out), *QUICK, *bf16]) == 0
    assert json.loads((out / "run.json").read_text())["config"]["precision"] == "bf16"
    model, _ = load_classifier(out / "last.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    accuracies, evaluate = [], ["evaluate", "--checkpoint", str(out / "best.safetensors"), "--data", str(photos), "--json"]
    for precision in (bf16, []):
        capsys.readouterr()
        assert main([*evaluate, *precision]) == 0
        (row,) = json.loads(capsys.readouterr().out)["sets"]
        accuracies.append(row["accuracy"])
    assert abs(accuracies[0] - accuracies[1]) <= 100 / row["images"], "at most one image on the edge"


def test_train_writes_a_checkpoint_that_evaluate_reads(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, description = load_classifier(run / "best.safetensors")
    assert description.class_names == ("dog", "red fox")
    assert description.arch == "tiny"
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["method"] == "masked-object"
    assert record["class_folders"] == ["dog", "red_fox"]
    assert record["train_images"] == 10
    assert model.head.weight.shape == (2, 64)
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(run / "best.safetensors"), "--data", str(photos), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["sets"]
    assert (row["images"], row["classes"]) == (12, 2)
    assert main(["evaluate", "--checkpoint", str(run / "best.safetensors"), "--data", str(photos)]) == 0
    assert f"{row['accuracy']:.2f} %" in capsys.readouterr().out


def test_the_same_seed_trains_the_same_weights(run: Path, photos: Path, tmp_path: Path) -> None:
    assert main(["train", "--data", str(photos), "--method", "masked-object", "--out", str(tmp_path), *QUICK]) == 0
    first, second = load_file(run / "last.safetensors"), load_file(tmp_path / "last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_not_overwritten_unasked(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--overwrite" in fails(capsys, "train", "--data", photos, "--out", run, *QUICK)


def test_zero_shot_and_wise_ft(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, end = tmp_path / "zs", tmp_path / "ft"
    assert main(["train", "--data", str(photos), "--method", "zeroshot", "--out", str(start)]) == 0
    assert not (start / "last.safetensors").exists()
    assert main(["train", "--data", str(photos), "--method", "ft", "--val-share", "0", "--out", str(end), *QUICK]) == 0
    assert json.loads((end / "run.json").read_text())["validation_accuracy"] is None
    capsys.readouterr()
    assert main(["zeroshot", "--data", str(photos), "--json"]) == 0
    (zero_shot,) = json.loads(capsys.readouterr().out)["sets"]
    files = ["--start", str(start / "best.safetensors"), "--end", str(end / "last.safetensors")]
    argv = ["wise-ft", *files, "--data", str(photos), "--alphas", "0", "0.5", "--out", str(tmp_path / "wise"), "--json"]
    assert main(argv) == 0
    curve = json.loads(capsys.readouterr().out)
    assert curve[0]["accuracy"] == {str(photos): zero_shot["accuracy"]}
    halfway = load_file(tmp_path / "wise" / "alpha-0.50.safetensors")
    ends = [load_file(start / "best.safetensors"), load_file(end / "last.safetensors")]
    torch.testing.assert_close(halfway["visual.proj"], (ends[0]["visual.proj"] + ends[1]["visual.proj"]) / 2)


def test_options_override_the_recipe(photos: Path, tmp_path: Path) -> None:
    argv = ["train", "--recipe", "tiny/masked-object", "--data", str(photos), "--out", str(tmp_path), *QUICK]
    assert main([*argv, "--masking", "CtxMaskNoFill(0.6)", "--cam", "grad-cam", "--accumulate", "2"]) == 0
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    recipe = TrainConfig.from_dict(load_recipe("tiny/masked-object")["train"])
    assert config["w_distill"] == recipe.w_distill
    assert (config["masking"], config["cam"], config["accumulate"]) == ("CtxMaskNoFill(0.6)", "grad-cam", 2)
    assert (config["epochs"], config["batch_size"], config["optim"]["lr"]) == (2, 4, 1e-4)


def test_class_names_and_templates_reach_the_prompts(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("seven\nfour\n")
    (tmp_path / "templates.txt").write_text("the digit {}.\n")
    text = ["--class-names", str(tmp_path / "names.txt"), "--templates", str(tmp_path / "templates.txt")]
    assert main(["train", "--data", str(photos), "--method", "zeroshot", "--out", str(tmp_path / "run"), *text]) == 0
    assert load_classifier(tmp_path / "run" / "best.safetensors")[1].class_names == ("seven", "four")


def test_every_recipe_is_valid_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipe_names():
        assert name in listed
        config = TrainConfig.from_dict(load_recipe(name)["train"])
        if config.resolved.masking != "none":
            parse_strategy(config.resolved.masking)
    paper = {name.split("/")[1]: load_recipe(name)["train"] for name in recipe_names() if name.startswith("vit-b16/")}
    assert len(paper) == 14
    values = {"object-single": 0.3, "object-multi": 0.6, "object-none": 0.3, "context-single": 0.5, "context-multi": 0.3,
              "context-none": 0.6, "random-single": 0.5, "random-multi": 0.5, "random-none": 0.75}  # fmt: skip
    assert {name: parse_strategy(paper[name]["masking"]).threshold for name in values} == values
    assert TrainConfig.from_dict(paper["object-single"]).optim == TrainConfig().optim


def test_preview_and_mask_write_pictures(photos: Path, tmp_path: Path) -> None:
    assert main(["data", "preview", "--data", str(photos), "--out", str(tmp_path / "p.png")]) == 0
    images = [str(path) for path in sorted((photos / "dog").iterdir())[:2]]
    assert main(["mask", *images, "--class", "the digit two.", "--out", str(tmp_path / "m.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert (tmp_path / "m.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_benchmark_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--recipe", "tiny/ft", "--data", "texture-digits", "--epochs", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(tmp_path / "best.safetensors"), "--data", "texture-digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["sets"]
    assert found["average"]["name"] == "average OOD"
    assert found["average"]["accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows[1:]) / 4)
    assert [row["data"] for row in rows] == ["id", "flipped", "unseen", "sketch", "corrupted"]
    assert all(row["images"] >= 2000 and row["classes"] == 10 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "unknown method 'magic'; known: zeroshot, lp, ft"),
        (["--masking", "ObjMask(0.3)"], "unknown masking strategy 'ObjMask(0.3)'; known: {Obj,Ctx,Rand}Mask"),
        (["--masking", "ObjMaskSingleFill(1.5)"], "threshold: expected a value in [0, 1], got 1.5"),
        (["--masking", "ObjMaskNoFill(top=37)"], "k: expected 1..36 patches"),
        (["--masking", "ObjMaskNoFill(top=0)"], "k: expected 1..P patches, got 0"),
        (["--method", "ft", "--masking", "ObjMaskSingleFill(0.3)"], "add --distill fd"),
        (["--recipe", "vit-b32/nothing"], "unknown recipe 'vit-b32/nothing'"),
        (["--arch", "RN50"], "RN50: its image tower is not a plain ViT"),
        (["--cam-start-layer", "4"], "cam_start_layer: expected 0..3"),
        (["--batch-size", "64"], "batch size 64 is larger than the 10 training images"),
        (["--precision", "fp8"], "unknown precision 'fp8'; known: auto, bf16, tf32, fp32"),
        (["--compile", "fast"], "unknown compile 'fast'; known: auto, off, default"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--pretrained", "nowhere.pt"], "no weights at nowhere.pt"),
        (["--class-names", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--shots", "0"], "--shots: expected 1 or more"),
        (["--classes", "dog,cat"], "has no class cat; it has dog, red_fox"),
        (["--val-share", "0.5", "--val-images", "2"], "--val-share and --val-images: give one of them"),
        (["--augment", "mixup"], "unknown augmentation 'mixup'; known: random-crop=0.08, flip"),
        (["--augment", "color-jitter=2"], "color-jitter: expected a strength from 0"),
        (["--max-bad", "2"], "--max-bad: expected a share in [0, 1], got 2"),
        (["--workers", "-1"], "--workers: expected 0 or more"),
        (["--loader", "fast"], "invalid choice: 'fast'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_training_options(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in fails(capsys, "train", "--data", photos, "--out", tmp_path / "run", *QUICK, *options)
    assert not (tmp_path / "run").exists()


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "run", *QUICK]
    assert "no folder at" in fails(capsys, "train", "--data", tmp_path / "missing", *out)
    (tmp_path / "empty").mkdir()
    assert "no images in class folders" in fails(capsys, "train", "--data", tmp_path / "empty", *out)
    make_folder(tmp_path / "single", {"a": 6, "b": 1})
    assert "only one image in class b" in fails(capsys, "train", "--data", tmp_path / "single", *out)
    make_folder(tmp_path / "broken", {"a": 6, "b": 6})
    (tmp_path / "broken" / "b" / "03.jpg").write_bytes(b"no image")
    for loader in ("torch", "dali"):
        error = fails(
            capsys,
            "train",
            "--data",
            tmp_path / "broken",
            "--out",
            tmp_path / loader,
            *QUICK,
            "--loader",
            loader,
            "--max-bad",
            "0",
        )
        assert "more than --max-bad 0 allows" in error
        assert "03.jpg (not an image in a known format)" in error
        assert "03.jpg\tnot an image" in (tmp_path / loader / "bad_samples.tsv").read_text()


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_bad_image_is_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], loader: str) -> None:
    data, out = make_folder(tmp_path / "data", {"a": 6, "b": 6}), tmp_path / "run"
    (data / "b" / "03.jpg").write_bytes(b"no image")
    tolerant = ["--loader", loader]
    assert main(["train", "--data", str(data), "--method", "ft", "--out", str(out), "--val-share", "0", *QUICK, *tolerant]) == 0
    assert "1 of 12 images of" in capsys.readouterr().err
    assert (out / "bad_samples.tsv").read_text().count("\n") == 1, "once, not once per epoch"
    argv = [
        "evaluate",
        "--checkpoint",
        str(out / "best.safetensors"),
        "--data",
        str(data),
        "--json",
        "--out",
        str(out),
        *tolerant,
    ]
    assert main(argv) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["sets"]
    assert row["images"] == 11
    assert row["accuracy"] == pytest.approx((6 * row["per_class"]["a"] + 5 * row["per_class"]["b"]) / 11)
    assert "cannot be read" in printed.err
    assert json.loads((out / "scores.json").read_text())["sets"] == [row]
    assert (out / "scores.csv").read_text().startswith("data,images,classes,accuracy,top5,calibration_error\n")
    assert (out / "per_class.csv").read_text().count("\n") == 3
    run = json.loads((out / "run.json").read_text())
    assert run["loader"] == {"torch": "TorchLoader", "dali": "DaliLoader"}[loader]
    assert 0 <= run["waited_for_data"] < 1


def test_bad_checkpoints(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "best.safetensors"

    def evaluate(checkpoint: Path, data: Path | str = photos, *more: str) -> str:
        return fails(capsys, "evaluate", "--checkpoint", checkpoint, "--data", data, *more)

    assert "no checkpoint at" in evaluate(tmp_path / "missing.safetensors")
    whole = best.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "not a readable safetensors file" in evaluate(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "holds no CLIP" in evaluate(tmp_path / "other.safetensors")
    assert "another architecture: image_size 48 instead of 224" in evaluate(best, photos, "--arch", "ViT-B/32")
    make_folder(tmp_path / "cats", {"cat": 1, "dog": 1})
    assert "outside the 2 known classes: cat" in evaluate(best, tmp_path / "cats")
    assert "texture-digits has the classes zero" in evaluate(best, "texture-digits")


def test_a_malicious_pickle_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    argv = ["train", "--data", photos, "--out", tmp_path / "run", "--pretrained", tmp_path / "evil.pt", *QUICK]
    assert "was not loaded" in fails(capsys, *argv)
    assert not (tmp_path / "ran").exists()


def test_bad_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = write_image(tmp_path / "one.png", 3)
    assert "it knows the digits" in fails(capsys, "mask", image, "--class", "a photo of a cow")
    assert "--donors FOLDER" in fails(capsys, "mask", image, "--class", "a two.")
    assert "cannot read the image" in fails(capsys, "mask", tmp_path / "none.png", "--class", "a two.")
    weights = load_tiny_clip().state_dict()
    weights["visual.proj"] = torch.zeros_like(weights["visual.proj"])
    save_file(weights, tmp_path / "blind.safetensors")
    blind = ["--pretrained", tmp_path / "blind.safetensors"]
    assert "zero everywhere" in fails(capsys, "mask", image, write_image(tmp_path / "two.png", 4), "--class", "a two.", *blind)


def test_cuda_is_refused_where_there_is_none(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["train", "--data", photos, "--out", tmp_path / "run", *QUICK, "--device", "cuda"]
    assert "use --device cpu" in fails(capsys, *argv)


def test_ctrl_c_and_system_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_args: object) -> None:
        raise KeyboardInterrupt

    def full(_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipes, "run_recipes", stop)
    assert "interrupted" in fails(capsys, "recipes", code=130)
    monkeypatch.setattr(recipes, "run_recipes", full)
    assert "No space left on device" in fails(capsys, "recipes")


def test_the_console_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cammask_fast", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "invalid choice: 'trian'" in done.stderr
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cammask_fast", "--help"], capture_output=True, text=True, check=True
    )
    assert "evaluate" in listed.stdout
    assert not any(line.endswith((" torch", " open_clip", " matplotlib")) for line in listed.stderr.splitlines())


def test_every_command_says_what_it_does() -> None:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    helps = {one.dest: str(one.help) for one in commands._choices_actions}
    assert set(helps) == set(commands.choices)
    assert len(set(helps.values())) == len(helps)
    assert "open_clip" in helps["export"]
    assert "photographs" in helps["predict"]


def test_wise_ft_names_its_average(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_folder(tmp_path / "other", {"dog": 2, "red_fox": 2})
    files = ["--start", str(run / "best.safetensors"), "--end", str(run / "last.safetensors")]
    capsys.readouterr()
    assert main(["wise-ft", *files, "--data", str(photos), str(other), "--alphas", "0", "1"]) == 0
    header, first, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["alpha", str(photos), str(other), "average"]
    for line in (first, last):
        _, on_photos, on_other, average = map(float, line.split())
        assert average == pytest.approx((on_photos + on_other) / 2, abs=0.01)

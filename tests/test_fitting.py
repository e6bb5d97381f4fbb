"""Defaults that fit the model and the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cammask_fast.cli import build_parser, main
from cammask_fast.commands.settings import Chosen, given_settings
from cammask_fast.config import METHODS, OptimConfig, TrainConfig, load_recipe
from cammask_fast.fitting import FITTED, MIN_STEPS, fitted_config, fitting_defaults, given_config
from tests.test_folder import make_folder


@pytest.mark.parametrize("arch", ["ViT-B/32", "ViT-L/14@336px", "ViT-B-16"])
def test_clip_vits_at_imagenet_size_have_the_papers_values(arch: str) -> None:
    config, fitted = fitted_config(arch, 1_281_167, {})
    assert config == TrainConfig()
    assert fitted.values == {"lr": 3e-5, "w_distill": 30.0, "epochs": 10, "batch_size": 512}
    assert set(fitted.reasons.values()) == {"the paper's for CLIP ViTs"}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zeroshot"])
def test_tiny_on_the_benchmark_has_the_values_of_its_recipes(method: str) -> None:
    recipe = TrainConfig.from_dict(load_recipe(f"tiny/{method}")["train"])
    config, _ = fitted_config("tiny", 1500, {"method": method})
    assert config == recipe


def test_a_distillation_of_its_own_has_the_weight_of_its_recipe() -> None:
    assert fitting_defaults("tiny", 1500, "masked-object", {"distill": "kd"}).values["w_distill"] == 30.0
    assert fitting_defaults("tiny", 1500, "masked-object", {}).values["w_distill"] == 8.0
    assert "w_distill" not in fitting_defaults("tiny", 1500, "ft", {}).values, "nothing is distilled"
    assert fitting_defaults("tiny", 1500, "ft", {"distill": "fd"}).values["w_distill"] == 30.0
    assert fitting_defaults("tiny", 1500, "zeroshot", {}) == ({}, {})


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(1, 1, 66), (252, 252, 66), (512, 512, 66), (1100, 512, 66), (4000, 512, 70), (2050, 512, 64)],
)
def test_small_sets_have_a_batch_of_all_images_and_enough_steps(images: int, batch: int, steps: int) -> None:
    values, reasons = fitting_defaults("ViT-B/32", images, "masked-object", {})
    assert values["batch_size"] == batch == min(512, images)
    assert images // batch * values["epochs"] == steps
    assert steps >= MIN_STEPS - images // batch
    assert reasons["batch_size"] == ("all training images" if images < 512 else "the paper's for CLIP ViTs")
    assert (reasons["epochs"] == f"{steps} steps, more than in 10") == (values["epochs"] > 10)


def test_tiny_learns_slower_from_few_images() -> None:
    assert fitting_defaults("tiny", 999, "ft", {}).values["lr"] == 6e-4
    assert fitting_defaults("tiny", 1000, "ft", {}).values["lr"] == 1.25e-3
    assert fitting_defaults("ViT-B/32", 10, "ft", {}).values["lr"] == 3e-5


@pytest.mark.parametrize(("images", "epochs"), [(600, 16), (1500, 6), (3000, 6), (6000, 3), (200_000, 1)])
def test_tiny_needs_no_more_steps_for_more_images(images: int, epochs: int) -> None:
    assert fitting_defaults("tiny", images, "masked-object", {}).values["epochs"] == epochs
    assert fitting_defaults("ViT-B/32", 200_000, "masked-object", {}).values["epochs"] == 10


def test_what_is_given_stays_and_decides_on_the_rest() -> None:
    for name, value in {"lr": 0.5, "w_distill": 2.0, "epochs": 3, "batch_size": 10}.items():
        config, fitted = fitted_config("tiny", 100, {name: value})
        assert set(fitted.values) == set(fitted.reasons) == set(FITTED) - {name}
        assert (config.optim.lr if name == "lr" else getattr(config, name)) == value
    assert fitting_defaults("tiny", 100, "ft", {"batch_size": 10}).values["epochs"] == 7, "of 10 steps"
    assert fitted_config("tiny", 100, {"pct_start": 0.5})[0].optim == OptimConfig(lr=6e-4, pct_start=0.5)


def test_a_batch_is_shared_out_evenly() -> None:
    values, reasons = fitting_defaults("ViT-B/32", 250, "ft", {}, shares=8)
    assert (values["batch_size"], reasons["batch_size"]) == (248, "of 250 training images, a multiple of 8")
    assert fitting_defaults("ViT-B/32", 9999, "ft", {}, shares=3).values["batch_size"] == 510
    with pytest.raises(ValueError, match="7 training images cannot be shared by 8 parts of a batch: use fewer"):
        fitting_defaults("ViT-B/32", 7, "ft", {}, shares=8)
    with pytest.raises(
        ValueError, match="batch size 251 is larger than the 250 training images: choose --batch-size 248 or less"
    ):
        fitting_defaults("ViT-B/32", 250, "ft", {"batch_size": 251}, shares=8)
    assert given_config({"accumulate": 3}).accumulate == 3, "does not divide 512, and need not"
    with pytest.raises(ValueError, match="accumulate: 3 does not divide the batch size 512"):
        given_config({"accumulate": 3, "batch_size": 512})
    with pytest.raises(ValueError, match="accumulate: expected a positive value, got 0"):
        given_config({"accumulate": 0})


def test_options_and_recipes_override_one_by_one() -> None:
    args = vars(build_parser().parse_args(["train", "--data", "d", "--epochs", "2"]))
    chosen = Chosen(given_settings(args, {"w_distill": 4.0, "optim": {"lr": 0.25}}))
    assert chosen.own_batch("tiny", 64, processes=2) == 32
    assert (chosen.config.epochs, chosen.config.w_distill, chosen.config.optim.lr, chosen.config.batch_size) == (
        2,
        4.0,
        0.25,
        64,
    )
    assert chosen.record() == {"batch_size": {"value": 64, "reason": "all training images"}}
    assert chosen.lines() == ["  batch_size 64  all training images"]
    with pytest.raises(
        ValueError, match="--batch-size: 10 images cannot be shared by 4 processes with --accumulate 1: choose a"
    ):
        Chosen({"batch_size": 10}).own_batch("tiny", 64, processes=4)


@pytest.mark.slow
def test_the_obvious_first_command_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = make_folder(tmp_path / "photos", {"cat": 6, "dog": 6}), tmp_path / "run"
    assert main(["train", "--data", str(photos), "--epochs", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "batch_size 10" in said
    assert "all training images" in said
    record = json.loads((out / "run.json").read_text())
    assert record["fitted"]["lr"] == {"value": 6e-4, "reason": "for tiny on fewer than 1000 images"}
    assert (record["config"]["batch_size"], record["config"]["epochs"], record["config"]["w_distill"]) == (10, 2, 8.0)
    assert "epochs" not in record["fitted"]


def test_help_names_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "the paper's 3e-05; tiny: its recipes' 0.00125, 0.0006 below 1000",
        "the paper's 512, tiny: 128, or all images",
    ):
        assert text in said

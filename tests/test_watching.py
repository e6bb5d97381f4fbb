"""A run is announced on one screen, watched on named sets, and not called best when it went astray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cammask_fast.cli import main
from cammask_fast.commands import training
from cammask_fast.commands.screen import TimeEstimate, duration, method_words, screen
from cammask_fast.commands.watching import accuracy_lines, chance, comparison, diverged, log_of
from cammask_fast.config import TrainConfig
from cammask_fast.data.factory import named_set, open_evaluation
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.evaluate import AccuracyMeter
from cammask_fast.model.zero_shot import tiny_classifier
from tests.test_folder import make_folder

QUICK = ["--epochs", "2", "--batch-size", "4", "--lr", "1e-4", "--loader", "torch", "--workers", "0"]


def steps(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": i, "loss": loss} for i, loss in enumerate(losses)]


def epochs(*accuracies: float) -> list[dict[str, Any]]:
    return [{"step": 0, "epoch": i, "accuracy": {"validation": value}} for i, value in enumerate(accuracies)]


SETTING: dict[str, Any] = {"classes": 10, "before": 70.0, "images": 100, "lr": 0.1, "weight": 1.0}
UNSEEN: dict[str, Any] = {**SETTING, "before": None, "images": 0}


def test_a_run_that_ended_above_guessing_diverged() -> None:
    said = diverged(steps(1.0, 5.0, 4.0, 2.0, 2.4, 2.7) + epochs(80.0, 10.0), **SETTING)
    assert said is not None
    assert "1.00 at the start and 2.37 at the end, above the 2.30 of guessing" in said
    assert "lower --lr (it was 0.1) and --overwrite" in said


@pytest.mark.parametrize(
    ("losses", "accuracies", "changes"),
    [
        ((1.0, 5.0, 2.0, 2.2, 2.4), (10.0,), {}),  # not above guessing
        ((1.0, 5.0, 5.0, 5.0), (10.0,), {"weight": 3.0}),  # the same, of three times the cross-entropy
        ((2.0, 2.9, 2.9, 2.9), (10.0,), {}),  # not far above the start
        ((1.0, 5.0, 5.0, 5.0), (10.0, 70.0), {}),  # as good as before
        ((1.0, 5.0, 5.0, 5.0), (57.0,), {}),  # worse by what chance explains
        ((1.3, 1.6, 5.0), (22.2,), {"classes": 3, "before": 33.3, "images": 9}),  # the same, of a few images
        ((1.0, 5.0, 5.0, 5.0), (10.0,), {"weight": 0.0}),  # the cross-entropy is not trained
        ((1.0, None, None, 0.9), (10.0,), {}),  # finite again
        ((1.0, None), (10.0,), {}),  # too few to tell
        ((None, None), (10.0,), {}),
        ((), (), {}),
    ],
)
def test_a_run_that_did_not_diverge(losses: tuple[Any, ...], accuracies: tuple[float, ...], changes: dict[str, Any]) -> None:
    assert diverged(steps(*losses) + epochs(*accuracies), **{**SETTING, **changes}) is None


def test_divergence_without_finite_losses() -> None:
    said = diverged(steps(1.0, 0.9, None, None, None) + epochs(80.0), **SETTING)
    assert said is not None
    assert "not finite in its last steps" in said


def test_divergence_without_validation_images() -> None:
    assert diverged(steps(1.0, 7.0, 7.0, 7.0), **UNSEEN) is not None
    assert diverged(steps(1.0, 6.5, 6.5, 6.5), **UNSEEN) is None, "less than three times guessing"
    assert diverged(steps(3.0, 8.5, 8.5, 8.5), **UNSEEN) is None, "less than three times the start"
    assert diverged(steps(1.0, 20.0, 20.0), **UNSEEN) is None, "the start is among the last lines"


def test_the_last_lines_of_the_log_count() -> None:
    long = steps(1.0, *[9.0] * 20, *[0.5] * 17, *[9.0] * 3) + epochs(10.0)
    assert diverged(long, **SETTING) is not None
    assert diverged(long + steps(*[0.5] * 300, *[9.0] * 3), **SETTING) is None, (
        "a tenth of a long run, not its last steps alone"
    )


def test_chance_of_a_measured_accuracy() -> None:
    assert chance(50.0, 100) == pytest.approx(15.0)
    assert chance(100.0, 100) == pytest.approx(chance(0.0, 100))
    assert 0 < chance(0.0, 100) < 5
    assert chance(50.0, 1) > 100


def test_the_log_is_read_up_to_a_cut_line(tmp_path: Path) -> None:
    assert log_of(tmp_path) == []
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert log_of(tmp_path) == [{"step": 1}]


def test_outputs_that_are_not_finite_are_wrong_predictions() -> None:
    meter = AccuracyMeter(torch.arange(3), 3)
    logits = torch.tensor([[math.nan] * 3, [math.inf, 0.0, 0.0], [9.0, 0.0, 0.0]])
    meter.add(logits, torch.tensor([0, 0, 0]))
    score = meter.score()
    assert score.images == 3
    assert score.top1 == score.top5 == pytest.approx(100 / 3)
    assert math.isfinite(score.calibration_error)


def test_start_and_end_stand_side_by_side() -> None:
    lines = comparison({"validation": 20.0, "sketch": 50.0}, {"validation": 34.5, "sketch": 47.25}, "zero-shot")
    assert lines == [
        "             zero-shot  fine-tuned   change",
        "validation     20.00 %     34.50 %   +14.50",
        "sketch         50.00 %     47.25 %    -2.75",
    ]
    assert comparison({}, {}, "zero-shot") == []
    said = accuracy_lines("zero-shot", {"validation": 20.0, "sketch": 50.0}, {"validation": 7, "sketch": 9})
    assert said == [
        "zero-shot accuracy on the 7 validation images: 20.00 %",
        "zero-shot accuracy on sketch (9 images): 50.00 %",
    ]


def test_methods_in_words() -> None:
    assert method_words(TrainConfig()) == (
        "masked-object, trains the image tower and the head and keeps the features of the frozen model on images with the "
        "object's patches (relevance threshold 0.3, mm-cam) filled from another image (weight 30)"
    )
    assert "logits of the frozen model on the training images" in method_words(TrainConfig(method="ft-kd"))
    assert method_words(TrainConfig(method="lp")) == "lp, trains the head only"
    assert method_words(TrainConfig(method="wise-ft", alpha=0.25)).endswith("averages the weights with those before, 25% new")
    topk = method_words(TrainConfig(masking="CtxMaskMultiFill(top=50%)"))
    assert "the context's patches (top 50%, mm-cam) filled from many other images" in topk
    assert "the object's patches (top 7, grad-cam) left out" in method_words(
        TrainConfig(masking="ObjMaskNoFill(top=7)", cam="grad-cam")
    )
    assert "a random 50% of the patches" in method_words(TrainConfig(method="masked-random"))


def test_the_screen_names_what_will_happen() -> None:
    tower = tiny_classifier(["a", "b"]).visual
    config = TrainConfig(epochs=3, batch_size=8, accumulate=2)
    setting: dict[str, Any] = {
        "arch": "tiny", "weights": "tiny (the default)", "tower": tower, "data": ["photos: 20 images"],
        "watched": {"sketch": 9}, "steps": 2, "chosen": ["  lr 1  reason"], "device": "cpu", "processes": 2,
        "loader": "TorchLoader",
    }  # fmt: skip
    text = "\n".join(screen(config=config, **setting))
    for part in (
        "model: tiny, 4 layers of width 96", "activation ", "weights: tiny (the default)", "photos: 20 images",
        "sketch (9 images)",
        "method: masked-object", "device: cpu (1 threads), fp32, eager step on 2 processes; images loaded by PyTorch",
        "steps: 6, 3 epochs of 2 with 8 images, 2 micro-batches", "options override each", "  lr 1  reason",
    ):  # fmt: skip
        assert part in text
    assert "compiled step" in "\n".join(screen(config=TrainConfig(compile="default"), **setting))
    nothing = "\n".join(screen(config=TrainConfig(method="zeroshot"), **setting))
    assert "steps:" not in nothing
    assert "options override" not in nothing


def test_the_time_left_is_told_once() -> None:
    now, said, written = [0.0], list[str](), list[Any]()
    log = TimeEstimate(
        written.append, config=TrainConfig(epochs=3), steps=30, evaluation=5.0, clock=lambda: now[0], say=said.append
    )
    for step, seconds in ((5, 100.0), (10, 110.0), (15, 111.0)):
        now[0] = seconds
        log({"step": step, "epoch": 0, "loss": 1.0})
    assert said == ["about 55 s left: 20 steps of 2 s, 3 evaluations of 5 s"]
    assert len(written) == 3
    said.clear()
    log = TimeEstimate(
        written.append, config=TrainConfig(epochs=3), steps=3, evaluation=5.0, clock=lambda: now[0], say=said.append
    )
    log({"step": 1, "epoch": 0, "loss": 1.0})
    now[0] += 50.0
    log({"step": 1, "epoch": 1, "accuracy": {}})
    now[0] += 1.0
    log({"step": 2, "epoch": 1, "loss": 1.0})
    assert said == ["about 11 s left: 1 steps of 1 s, 2 evaluations of 5 s"], "without the evaluation between the readings"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (45, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3600, "1 h"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sets_are_named_by_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "x", {"cat": 2, "dog": 2})
    make_folder(tmp_path / "a=b", {"cat": 2, "dog": 2})
    assert named_set(f"sketch={tmp_path / 'x'}") == ("sketch", str(tmp_path / "x"))
    assert named_set("imagenet-v2=x")[0] in ("", "imagenet-v2")
    assert named_set(str(tmp_path / "a=b")) == ("", str(tmp_path / "a=b")), "a name holds no slash"
    monkeypatch.chdir(tmp_path)
    assert named_set("a=b") == ("", "a=b"), "a path that exists"
    assert named_set("a=x") == ("a", "x")
    sets = open_evaluation(
        [f"sketch={tmp_path / 'x'}", str(tmp_path / "a=b")], image_size=48, class_folders=("cat", "dog"),
        loader_config=LoaderConfig(kind="torch", workers=0),
    )  # fmt: skip
    assert list(sets) == ["sketch", str(tmp_path / "a=b")]
    assert all(len(one.labels) == 4 for one in sets.values())


@pytest.mark.slow
def test_named_sets_are_evaluated_before_during_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_folder(tmp_path / "photos", {"cat": 6, "dog": 6})
    argv = [
        "train",
        "--data",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        *QUICK,
        "--epochs",
        "3",
        "--eval",
        f"other={photos}",
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["zero_shot"]) == set(record["accuracy"]) == {"validation", "other"}
    per_epoch = [line["accuracy"] for line in log_of(tmp_path / "run") if "accuracy" in line]
    assert [set(one) for one in per_epoch] == [{"validation", "other"}] * 3
    best = record["best_epoch"]
    assert per_epoch[best - 1] == pytest.approx(record["accuracy"])
    assert best == 1 + max(range(3), key=lambda i: (per_epoch[i]["validation"], -i))
    assert f"best epoch: {best} of 3" in said
    assert "zero-shot accuracy on other (12 images)" in said
    assert f"{record['zero_shot']['other']:8.2f} %" in said
    assert (
        said.index("model: tiny") < said.index("zero-shot accuracy") < said.index(" left: ") < said.index("fine-tuned   change")
    )
    for named, message in (
        (f"validation={photos}", "--eval: the validation images are called"),
        ("x=nowhere", "--eval: no folder"),
    ):
        assert main([*argv[:-1], named, "--overwrite"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_diverged_run_calls_nothing_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = make_folder(tmp_path / "photos", {"cat": 6, "dog": 6}), tmp_path / "run"
    monkeypatch.setattr(training, "log_of", lambda _: steps(0.1, 5.0, 5.0, 5.0))
    assert main(["train", "--data", str(photos), "--out", str(out), *QUICK, "--val-share", "0"]) == 2
    error = capsys.readouterr().err
    assert "cammask: error: the run diverged: the loss" in error
    assert "lower --lr (it was 0.0001)" in error
    assert not list(out.glob("*.safetensors"))
    assert not (out / "run.json").exists()

"""Scores: top-1 and top-5, calibration, groups of logits, several models in one pass, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cammask_fast.cli import main
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.evaluate import AccuracyMeter, Score, accuracy, evaluate
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.wise_ft import interpolations
from tests.test_folder import make_folder


def score_of(logits: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None = None, *, split: int = 1) -> Score:
    groups = torch.arange(logits.shape[1]) if groups is None else groups
    tally = AccuracyMeter(groups, int(labels.max()) + 1)
    for part, of_part in zip(logits.chunk(split), labels.chunk(split), strict=True):
        tally.add(part, of_part)
    return tally.score()


def test_top_1_top_5_and_per_class() -> None:
    logits = torch.arange(10.0).flip(0).repeat(4, 1)  # the order of preference is 0, 1, 2, …
    score = score_of(logits, torch.tensor([0, 1, 4, 5]))
    assert (score.images, score.top1, score.top5) == (4, 25.0, 75.0)
    assert score.per_class == (100.0, 0.0, None, None, 0.0, 0.0)


def test_fewer_than_five_logits_that_count() -> None:
    score = score_of(torch.eye(3), torch.tensor([0, 0, 1]), torch.tensor([0, 1, -1]))
    assert score.top5 == 100.0
    assert score.top1 == pytest.approx(200 / 3 if torch.eye(3)[2, :2].argmax() == 1 else 100 / 3)


def test_calibration_error_by_hand() -> None:
    """Confidences 0.9 (three right of four) and 0.6 (two right of two): (4 |0.9 - 0.75| + 2 |0.6 - 1|) / 6."""
    confidence = torch.tensor([0.9] * 4 + [0.6] * 2)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    labels = torch.tensor([0, 0, 0, 1, 0, 0])
    for split in (1, 3):
        assert score_of(logits, labels, split=split).calibration_error == pytest.approx(100 * 1.4 / 6, abs=1e-4)


@pytest.mark.parametrize(
    ("confident", "right"),
    [([0.65, 0.69], [True, False]), ([0.59, 0.61], [True, False])],
    ids=["the edge 10/15", "the edge 9/15"],
)
def test_calibration_has_fifteen_bins(confident: list[float], right: list[bool]) -> None:
    """One image on either side of an edge: each is off by itself, while in one bin they would make up for each other."""
    confidence = torch.tensor(confident)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    off = sum(abs(one - hit) for one, hit in zip(confident, right, strict=True)) / len(right)
    found = score_of(logits, torch.tensor([0 if hit else 1 for hit in right])).calibration_error
    assert found == pytest.approx(100 * off, abs=1e-4)


def test_a_perfectly_confident_and_right_model_is_calibrated() -> None:
    assert score_of(100 * torch.eye(5), torch.arange(5)) == Score(5, 100.0, 100.0, 0.0, (100.0,) * 5)


def test_one_pass_gives_every_model_its_own_score() -> None:
    start = tiny_classifier(CLASS_NAMES)
    end = start.frozen_copy()
    with torch.no_grad():
        end.head.weight.copy_(end.head.weight.roll(1, 0))
    models = interpolations(start, end, [0.0, 0.4, 1.0])
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 48, 48, 3), dtype=torch.uint8)

    passes = 0

    class Counted(ArrayLoader):
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal passes
            passes += 1
            return super().__iter__()

    with torch.no_grad():
        from cammask_fast.kernels.normalise import normalise

        labels = start(normalise(images)).logits.argmax(1)
    loader = Counted(images, labels, ResumableDistributedSampler(len(images), batch_size=16))
    together = evaluate(models, loader)
    assert passes == 1
    assert together == [evaluate([model], loader)[0] for model in models]
    assert together[0].top1 == 100.0 == accuracy(start, loader)
    assert together[2].top1 < 50
    for wrong in ([1.5], [-0.1]):
        with pytest.raises(ValueError, match="alpha"):
            interpolations(start, end, wrong)
    with pytest.raises(ValueError, match="number of classes"):
        interpolations(start, tiny_classifier(CLASS_NAMES[:5]), [0.5])
    with pytest.raises(ValueError, match="no images"):
        evaluate([start], ArrayLoader(images[:0], labels[:0], ResumableDistributedSampler(len(images[:0]), batch_size=4)))


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_two_processes_give_the_number_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], loader: str) -> None:
    """13 images in batches that the ranks cannot share evenly, one of them unreadable."""
    data = make_folder(tmp_path / "data", {"dog": 7, "red_fox": 6})
    (data / "dog" / "03.jpg").write_bytes(b"no image")
    assert main(["train", "--data", str(data), "--method", "zeroshot", "--max-bad", "1", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    options = ["--checkpoint", str(tmp_path / "run" / "best.safetensors"), "--data", str(data), "--loader", loader]
    argv = ["evaluate", *options, "--max-bad", "1", "--workers", "1", "--json"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "cammask_fast", *argv, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    close = {"calibration_error"}  # sums of confidences, which depend on the batches in the last digits
    for row, other in zip(one["sets"], two["sets"], strict=True):
        assert {name: value for name, value in row.items() if name not in close} == {
            name: value for name, value in other.items() if name not in close
        }
        assert other["calibration_error"] == pytest.approx(row["calibration_error"], abs=1e-3)
        assert row["images"] == 12
    assert len(list((tmp_path / "two").glob("bad_samples*.tsv"))) == 1

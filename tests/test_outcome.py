"""What a finished run says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cammask_fast.cli import main
from cammask_fast.commands import outcome
from cammask_fast.commands.outcome import alarms, validated
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.evaluate import confusion_counts
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.zero_shot import tiny_classifier
from tests.test_folder import make_folder


def test_alarms() -> None:
    assert alarms(20.0, 20.1, skipped=0, steps=100) == []
    assert alarms(None, None, skipped=1, steps=100) == []
    (nothing,) = alarms(20.0, 20.0, skipped=0, steps=100)
    assert "nothing was learnt" in nothing
    assert "20.00 %" in nothing
    (skipped,) = alarms(None, None, skipped=2, steps=100)
    assert "2 of 100 steps were skipped" in skipped
    assert len(alarms(5.0, 4.0, skipped=50, steps=100)) == 2


def test_both_accuracies_are_named() -> None:
    assert validated(20.0, 34.5) == "validation accuracy 34.50 % (zero-shot 20.00 %), "
    assert validated(None, 34.5) == "validation accuracy 34.50 %, "
    assert validated(None, None) == ""


def test_confusions_are_counted_by_class() -> None:
    model = tiny_classifier(["zero", "one", "two"])
    images = torch.randint(0, 256, (10, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10) % 3
    loader = ArrayLoader(images, labels, ResumableDistributedSampler(10, batch_size=4))
    counts = confusion_counts(model, loader)
    with torch.no_grad():
        predicted = model(normalise(images)).logits.argmax(1)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        expected[label, guess] += 1
    assert torch.equal(counts, expected)


def test_a_run_reports_where_it_started_and_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate that changes nothing: it says so, and pictures that cannot be drawn cost nothing."""
    photos = make_folder(tmp_path / "photos", {"<b>": 6, "dog": 6})
    argv = ["train", "--data", str(photos), "--epochs", "1", "--batch-size", "4", "--lr", "1e-12"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "zero-shot accuracy on the 2 validation images" in said.out
    assert "(zero-shot" in said.out
    assert "nothing was learnt" in said.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["zero_shot"] == record["accuracy"] == {"validation": record["validation_accuracy"]}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "nothing was learnt" in page
    assert "Counterfactuals of your images" in page
    assert "<b>" not in page

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no memory for pictures")

    monkeypatch.setattr(outcome, "counterfactuals", fail)
    assert main([*argv, "--out", str(tmp_path / "other")]) == 0
    assert "no memory for pictures" in capsys.readouterr().err
    assert (tmp_path / "other" / "best.safetensors").exists()
    assert not (tmp_path / "other" / "report.html").exists()

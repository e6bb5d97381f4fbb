"""The report of a run and the comparison of runs, on runs with known numbers."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cammask_fast.cli import main
from cammask_fast.commands.compare import told_apart
from cammask_fast.config import TrainConfig
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import evaluation_specifications, rendered
from cammask_fast.evaluate import Predicted
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.viz.run_report import (
    accuracy_rows,
    confusion,
    counterfactuals,
    read_log,
    spread_over_classes,
    thumbnail,
    worst_images,
    write_run_report,
)

HOSTILE = "<script>alert(1)</script>"


def make_run(folder: Path, *, method: str = "masked-object", seed: int = 0, accuracy: float = 80.0, **changes: Any) -> Path:
    """A finished run of three epochs."""
    folder.mkdir(parents=True)
    config = TrainConfig(method=method, seed=seed, epochs=3, **changes).to_dict()
    record = {
        "config": config, "arch": "tiny", "pretrained": "tiny", "data": "photos", "train_images": 12, "seconds": 3.0,
        "class_names": ["cat", HOSTILE], "zero_shot": {"validation": 70.0}, "validation_accuracy": accuracy,
        "accuracy": {"validation": accuracy, "shifted": accuracy - 20},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    lines: list[dict[str, Any]] = []
    for epoch in range(3):
        step = {"loss": 3.0 - epoch, "task": 1.0, "distill": None, "lr": 1e-4, "gradient_norm": 2.0, "mask_share": 0.3}
        lines.append({"step": epoch + 1, "epoch": epoch, **step, "cam_entropy": 0.9, "skipped": 0})
        lines.append({"step": epoch + 1, "epoch": epoch + 1, "accuracy": {"validation": 70.0 + epoch}})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    return folder


def test_every_name_is_escaped_and_every_picture_is_inside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    counts = torch.tensor([[3, 1], [2, 2]])
    page = write_run_report(run, record, counts=counts, alarms=[f"nothing was learnt {HOSTILE}"]).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3, "class, confusion and alarm"
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 6, "trade-off, accuracy, loss, norm, masks, confusion"
    assert all(base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG") for source in sources)
    assert "http" not in page, "nothing is fetched"
    assert "+10.00" in page


def test_the_log_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    steps, epochs = read_log(make_run(tmp_path / "run"))
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["accuracy"]["validation"] for line in epochs] == [70.0, 71.0, 72.0]
    assert read_log(tmp_path) == ([], [])


def test_accuracies_before_and_after() -> None:
    rows = accuracy_rows({"zero_shot": {"a": 50.0, "b": 1.0}, "accuracy": {"a": 49.0, "c": 2.0}})
    expected = [("a", "50.00", "49.00", "-1.00"), ("b", "1.00", "–", "–"), ("c", "–", "2.00", "–")]
    assert [tuple(row.values()) for row in rows] == expected


def test_the_worst_classes_come_first_with_what_they_are_taken_for() -> None:
    counts = torch.tensor([[4, 0, 0], [1, 1, 2], [0, 1, 3]])
    pictures, rows = confusion(counts, ["a", "b", "c"])
    found = [(row["name"], row["right"], row["taken_for"]) for row in rows]
    assert found == [("b", "25.0 %", "c (2), a (1)"), ("c", "75.0 %", "b (1)")]
    assert len(pictures) == 1
    many, _ = confusion(torch.eye(50, dtype=torch.int64), [str(i) for i in range(50)])
    assert many == [], "too many classes for a picture"


def test_the_gallery_shows_before_and_after() -> None:
    before = tiny_classifier(CLASS_NAMES)
    after = before.frozen_copy()
    with torch.no_grad():
        after.visual.conv1.weight.mul_(1.5)
    images, labels = (tensor[:3] for tensor in rendered(evaluation_specifications()["id"]))
    config = TrainConfig(method="masked-object")
    found = counterfactuals(before, after, images, labels, CLASS_NAMES, config)
    same = counterfactuals(before, before, images, labels, CLASS_NAMES, config)
    assert found is not None
    assert same is not None
    assert found.data != same.data
    assert counterfactuals(before, after, images, labels, CLASS_NAMES, TrainConfig(method="ft")) is None


def test_runs_are_compared_by_method_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = {("ft", 0): 80.0, ("ft", 1): 82.0, ("masked-object", 0): 81.0, ("masked-object", 1): 85.0}
    runs = [make_run(tmp_path / f"{m}-{seed}", method=m, seed=seed, accuracy=a) for (m, seed), a in accuracies.items()]
    page = tmp_path / "out" / "compare.html"
    assert main(["compare", *map(str, runs), "--html", str(page)]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert rows["ft"] == ["2", "81.00 ± 1.41", "61.00 ± 1.41", "70.00 ± 0.00"]
    assert rows["masked-object - ft"] == ["+2.00 ± 1.41", "+2.00 ± 1.41"]
    assert rows["method"] == ["ft", "masked-object"]
    text = page.read_text()
    assert text.count("<img") == 3, "trade-off, accuracies and losses"
    assert "masked-object - ft" in text
    assert main(["compare", *map(str, runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ft"]["shifted"] == {"0": 60.0, "1": 62.0}


def test_runs_of_one_method_are_told_apart_and_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", w_distill=5.0)
    assert main(["compare", str(one), str(other)]) == 0
    said = capsys.readouterr().out
    assert f"masked-object ({one})" in said
    assert "w_distill" in said
    (tmp_path / "run.json").write_text("[]")
    for argv, message in (
        ([str(tmp_path / "nothing")], "holds no finished run"),
        ([str(tmp_path)], "holds no finished run"),
        ([str(one), str(make_run(tmp_path / "again"))], "the same settings and the same seed"),
    ):
        assert main(["compare", *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_the_gallery_takes_images_from_all_classes() -> None:
    labels = torch.tensor([0] * 5 + [1] * 5 + [2] * 2)
    assert spread_over_classes(labels, 6) == [0, 1, 5, 6, 10, 11]
    assert spread_over_classes(labels, 4) == [0, 1, 5, 10]
    assert spread_over_classes(labels[:3], 6) == [0, 1, 2]
    assert spread_over_classes(torch.arange(100), 3) == [0, 50, 99], "from all over the list"
    assert spread_over_classes(labels[:0], 3) == []


def test_the_surest_mistakes_of_the_worst_classes_are_shown() -> None:
    labels, guesses = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 0, 2, 1, 2])
    predicted = Predicted(torch.arange(10, 16), labels, guesses, guesses, torch.tensor([0.9, 0.8, 0.5, 0.7, 0.9, 0.9]))
    assert worst_images(predicted, ["a", "b", "c"]) == [
        (13, "b, taken for c, 70 %"), (12, "b, taken for a, 50 %"), (11, "a, taken for b, 80 %"),
    ]  # fmt: skip
    small = thumbnail(torch.zeros(200, 300, 3, dtype=torch.uint8), "b")
    assert Image.open(io.BytesIO(base64.b64decode(small.data.split(",")[1]))).size == (112, 75)


def test_differences_are_told_apart_by_their_interval() -> None:
    assert not told_apart([5.0])
    assert not told_apart([1.0, 3.0])
    assert told_apart([1.9, 2.0, 2.1])
    assert told_apart([-1.9, -2.0, -2.1])
    assert not told_apart([-1.0, 2.0, 0.5])

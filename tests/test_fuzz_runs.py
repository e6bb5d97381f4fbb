"""Random configurations, checkpoints and command lines: whatever a user gives, the answer is a result or one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cammask_fast.checkpoint import load_classifier
from cammask_fast.checkpoint.training import read_checkpoint, write_checkpoint
from cammask_fast.cli import main
from cammask_fast.config import METHODS, OptimConfig, TrainConfig, options_of

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(allow_nan=True), st.text(max_size=8),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
FIXTURE_IS_READ_ONLY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from([*TrainConfig().to_dict(), "unknown"]), ODD, max_size=4))
def test_a_configuration_is_valid_or_a_value_error(values: dict[str, Any]) -> None:
    try:
        config = TrainConfig.from_dict(values)
    except ValueError:
        return
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "step-00000007"
    folder.mkdir()
    rest = {"step": 7, "epoch": 1, "best_accuracy": "1.0", "best_step": 0, "has_best": False, "loader": {"epoch": 1}}
    write_checkpoint(folder, {"a": torch.arange(100.0), "b": torch.tensor(3)}, rest, {"seed": 0})
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURE_IS_READ_ONLY)
@given(data=st.data(), name=st.sampled_from(["tensors.safetensors", "state.json"]))
def test_no_changed_byte_of_a_checkpoint_passes(whole: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    """Flipped, cut off, extended, or replaced by anything."""
    copied = tmp_path / "step-00000007"
    copied.mkdir(exist_ok=True)
    for file in whole.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    original = (whole / name).read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "replace"]))
    changed = bytearray(original)
    if kind == "flip":
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        changed = changed[: data.draw(st.integers(0, len(changed) - 1))]
    elif kind == "extend":
        changed += data.draw(st.binary(min_size=1, max_size=20))
    else:
        changed = bytearray(data.draw(st.binary(max_size=200)))
    (copied / name).write_bytes(changed)
    try:
        found = read_checkpoint(copied)
    except ValueError:
        return
    assert name == "state.json", "tensors are never taken for whole"
    assert found.saved.metadata == read_checkpoint(whole).saved.metadata, "white space at most"


@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURE_IS_READ_ONLY)
@given(
    field=st.sampled_from(["format", "arch", "vit", "class_names", "run"]),
    text=st.one_of(st.text(max_size=30), ODD.map(json.dumps)),
)
def test_a_wrong_header_of_a_classifier_is_a_value_error(tmp_path: Path, field: str, text: str) -> None:
    from tests.test_step import TINY

    header = {
        "format": "cammask-classifier-1", "arch": "tiny", "vit": json.dumps(TINY.to_dict()),
        "class_names": '["a"]', "run": "{}",
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    save_file({"head.weight": torch.zeros(1, TINY.output_dim)}, path, {**header, field: text})
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load_classifier(path)


SETTINGS = [f"--{one.name.replace('_', '-')}" for one in [*options_of(TrainConfig), *options_of(OptimConfig)]]
WORDS = st.sampled_from(
    [
        *SETTINGS, "--save-every", "--keep", "--log-every", "--timeout",
        "--workers", "--max-bad", "--augment", "--shots", "--classes", "--val-share", "--val-images", "--recipe", "--arch",
        "--overwrite", *METHODS, "0", "-1", "1", "nan", "inf", "1e400", "0.5", "ObjMaskNoFill(0.3)",
        "ObjMask(", "flip", "", "é",
    ]
)  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=[*FIXTURE_IS_READ_ONLY])
@given(words=st.lists(WORDS, max_size=5), command=st.sampled_from(["train", "evaluate", "zeroshot", "wise-ft", "mask", "data"]))
def test_no_command_line_ends_in_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], command: str
) -> None:
    """There is no data at the path given, so that nothing is ever trained."""
    argv = [command, *copy.copy(words), "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    try:
        code = main(argv)
    except SystemExit:  # --help and --version
        return
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert said.startswith("cammask: error: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()

"""A typing error in a command answers at once, with what was meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cammask_fast.cli import build_parser, main
from cammask_fast.commands.checks import check, positive
from cammask_fast.model.names import check_architecture, open_clip_names
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.runtime.suggest import did_you_mean
from tests.test_folder import make_folder

WRONG = {
    "--method masked-objekt": "; did you mean masked-object?",
    "--recipe tiny/masked-objct": "; did you mean tiny/masked-object?",
    "--arch vit-b/32": "; did you mean ViT-B/32?",
    "--arch ViT-B-31": "; did you mean ViT-B-32?",
    "--masking ObjMaskSingelFill(0.3)": "; did you mean ObjMaskSingleFill(0.3)?",
    "--masking ObjMaskSingleFill(7)": "threshold: expected a value in [0, 1]",
    "--method ft --masking ObjMaskSingleFill(0.3)": "add --distill fd",
    "--precision bf61": "; did you mean bf16?",
    "--epoch 3": "; did you mean --epochs?",
    "--epochs 0": "epochs: expected a positive value",
    "--lr nan": "lr: expected a finite number",
    "--log-every 0": "--log-every: expected a positive value, got 0",
    "--loader tortch": "; did you mean torch?",
    "--augment flipp": "unknown augmentation 'flipp'",
    "--class-names nowhere.txt": "cannot read nowhere.txt",
    "--eval nowhere": "no folder at nowhere",
    "--accumulate 3 --batch-size 4": "accumulate: 3 does not divide",
}

PROBE = """
import io, json, sys
from contextlib import redirect_stderr
from cammask_fast.cli import main
answers = {}
for line in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as said:
        code = main(["train", "--data", ".", *line.split()])
    answers[line] = [code, said.getvalue()]
heavy = [name for name in ("torch", "torchvision", "open_clip", "numpy") if name in sys.modules]
print(json.dumps([answers, heavy]))
"""


def test_wrong_options_are_answered_without_pytorch(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(list(WRONG))], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    answers, heavy = json.loads(run.stdout)
    assert heavy == []
    for line, expected in WRONG.items():
        code, said = answers[line]
        assert code == 2, line
        assert said.count("\n") == 1, line
        assert expected in said, line


TRAINED = """
import sys
from cammask_fast.cli import main
assert main(["train", "--data", "photos", "--out", "run", "--epochs", "1", "--compile", "off", "--loader", "torch"]) == 0
print([name for name in ("open_clip", "torchvision", "nvidia") if name in sys.modules])
"""


@pytest.mark.slow
def test_what_is_not_needed_is_not_imported(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"dog": 4, "red_fox": 4})
    load_pretrained("tiny").head(["dog", "red fox"])  # now in the cache
    run = subprocess.run([sys.executable, "-c", TRAINED], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


def test_a_missing_folder_is_answered_without_pytorch(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    code = (
        "import sys; from cammask_fast.cli import main; code = main(['train', '--data', 'photo']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2
    assert "no folder at photo: expected" in run.stderr
    assert "did you mean photos?" in run.stderr


@pytest.mark.parametrize("data", ["texture-digits", "x/{000..009}.tar", "list.txt", "imagenet-v2=x", "a*b", "."])
def test_what_is_no_plain_folder_is_left_to_others(data: str) -> None:
    check(vars(build_parser().parse_args(["train", "--data", data])))
    check(vars(build_parser().parse_args(["zeroshot", "--data", data, data])))


def test_a_recipe_counts_in_the_checks() -> None:
    args = ["train", "--data", "texture-digits", "--recipe", "tiny/ft", "--masking", "ObjMaskSingleFill(0.3)"]
    with pytest.raises(ValueError, match="distils nothing"):
        check(vars(build_parser().parse_args(args)))
    check(vars(build_parser().parse_args([*args, "--distill", "fd"])))
    with pytest.raises(ValueError, match="bilinear"):
        check(vars(build_parser().parse_args(["train", "--data", ".", "--method", "masked-random", "--upsample", "bilinear"])))


def test_commands_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["doctor", "--jsn"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err
    assert main(["train", "--data", ".", "--wxyz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_close_words() -> None:
    assert did_you_mean("VIT-b/16", ["ViT-B/16", "tiny"]) == "; did you mean ViT-B/16?"
    assert did_you_mean("TINY", ["ViT-B/16", "tiny"]) == "; did you mean tiny?"
    assert did_you_mean("zzz", ["ViT-B/16", "tiny"]) == ""
    positive({"keep": None, "save_every": 1}, "keep", "save_every")
    with pytest.raises(ValueError, match="--save-every: expected a positive value, got 0"):
        positive({"save_every": 0}, "save_every")


def test_architectures_are_those_of_open_clip() -> None:
    import open_clip

    assert set(open_clip.list_models()) <= set(open_clip_names())
    for arch in ("tiny", "ViT-B/32", "ViT-B-16"):
        check_architecture(arch)

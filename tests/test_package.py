"""What a user installs: the wheel, and the weights that ship in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP

from cammask_fast.data.datasets.texture_digits import sample_scenes
from cammask_fast.demo.pretrain import PretrainConfig, pretrain, save_pretrained, web_split, zero_shot_accuracies
from cammask_fast.model.files import read_safetensors
from cammask_fast.model.tiny_clip import TEXT_CONFIG, build_tiny_clip, tokenizer
from cammask_fast.model.zero_shot import load_tiny_clip, tiny_provenance

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_kernels_weights_and_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "demo*", "runs", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "cammask_fast/py.typed",
        "cammask_fast/kernels/reference/cls_relevance.py",
        "cammask_fast/assets/tiny_clip.safetensors",
        "cammask_fast/recipes/tiny/masked-object.toml",
    } <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)


@pytest.mark.slow
def test_the_shipped_weights_are_small_and_keep_their_recorded_accuracy() -> None:
    weights = ROOT / "cammask_fast/assets/tiny_clip.safetensors"
    assert weights.stat().st_size <= 8e6
    recorded = tiny_provenance()["zero_shot_accuracy"]
    measured = zero_shot_accuracies(load_tiny_clip())
    assert measured == pytest.approx(recorded, abs=0.2)
    assert measured["web"] >= 90
    assert all(70 <= measured[name] <= 90 for name in ("id", "flipped", "unseen"))


def test_provenance_names_the_data_that_pretraining_draws() -> None:
    provenance = tiny_provenance()
    config = PretrainConfig(**provenance["config"])
    assert config == PretrainConfig(), "the defaults of `cammask pretrain` are the shipped run"
    assert provenance["data"]["draws_sha256"] == sample_scenes(web_split(config)).digest()
    assert provenance["command"].startswith("cammask pretrain")


def test_the_shipped_weights_load_into_open_clip() -> None:
    shipped = load_tiny_clip()
    vision = {"image_size": 48, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32}
    theirs = CLIP(embed_dim=64, vision_cfg=vision, text_cfg=TEXT_CONFIG, quick_gelu=True).eval()
    theirs.load_state_dict(shipped.state_dict())
    images, tokens = torch.randn(2, 3, 48, 48), tokenizer()(["a photo of the number seven."])
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image(images), shipped.visual(images), atol=1e-5)
        assert torch.allclose(theirs.encode_text(tokens), shipped.encode_text(tokens), atol=1e-6)


@pytest.mark.slow
def test_a_short_pretraining_learns_and_is_reproducible(tmp_path: Path) -> None:
    config = PretrainConfig(images=256, epochs=2, batch_size=32)
    lines: list[str] = []
    first = pretrain(config, progress=lines.append)
    second = pretrain(config, progress=lines.append)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[1] < losses[0]
    scores = save_pretrained(tmp_path, first, config, command="cammask pretrain --images 256")
    weights, _ = read_safetensors(tmp_path / "tiny_clip.safetensors")
    build_tiny_clip().load_state_dict({name: value.float() for name, value in weights.items()})
    assert set(scores) == {"web", "id", "flipped", "unseen", "sketch", "corrupted"}

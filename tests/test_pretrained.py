"""Pre-trained sources: architectures, weights in and out, refusals."""

from __future__ import annotations

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from cammask_fast.model.pretrained import default_pretrained, load_pretrained, to_open_clip, vit_config
from cammask_fast.model.tiny_clip import build_tiny_clip
from cammask_fast.model.weights import read_weights

SMALL = "ViT-S-32-alt"  # open_clip's smallest plain ViT


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def small_clip() -> CLIP:
    torch.manual_seed(0)
    return open_clip.create_model(SMALL).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_local_state_dict_gives_open_clips_features_and_zero_shot_logits(
    small_clip: CLIP, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": value for name, value in small_clip.state_dict().items()}}, path)
    else:
        save_file(small_clip.state_dict(), path)
    ours = load_pretrained(SMALL, str(path))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        theirs = small_clip.visual(images)
        torch.testing.assert_close(ours.visual(images), theirs, rtol=0, atol=1e-5)
        text = open_clip.build_zero_shot_classifier(
            small_clip, open_clip.get_tokenizer(SMALL), ["cat", "dog"], open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        expected = small_clip.logit_scale.exp() * torch.nn.functional.normalize(theirs, dim=-1) @ text
        torch.testing.assert_close(ours.classifier(["cat", "dog"])(images).logits, expected, rtol=0, atol=1e-4)


def test_fine_tuned_weights_go_back_into_open_clip(small_clip: CLIP, tmp_path: Path) -> None:
    save_file(small_clip.state_dict(), tmp_path / "w.safetensors")
    visual = load_pretrained(SMALL, str(tmp_path / "w.safetensors")).visual
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.mul_(1.01)
    result = small_clip.load_state_dict(to_open_clip(visual), strict=False)
    assert not result.unexpected_keys
    assert not any(name.startswith("visual.") for name in result.missing_keys)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(visual(images), small_clip.visual(images), rtol=0, atol=1e-5)


def test_activations_follow_open_clips_configuration() -> None:
    assert vit_config("ViT-B/32").activation == vit_config("ViT-L-14-quickgelu").activation == "quick_gelu"
    assert vit_config("ViT-B-32").activation == "gelu"
    large = vit_config("ViT-L/14")
    assert (large.width, large.layers, large.heads, large.patches, large.output_dim) == (1024, 24, 16, 256, 768)
    assert default_pretrained("ViT-B/16") == "openai"


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("ViT-X/1", "unknown architecture"),
        ("RN50", "ResNet"),
        ("coca_ViT-B-32", "custom_text"),
        ("ViT-B-16-SigLIP", "Hugging Face"),
        ("convnext_base", "timm_model_name"),
        ("ViT-M-16-alt", "ls_init_value"),
    ],
)
def test_towers_that_we_cannot_run_are_refused(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit_config(arch)


@pytest.mark.parametrize(
    ("arch", "tag", "message"),
    [
        ("ViT-B-32", "openai", "use --arch ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "neither a file or folder nor a tag"),
        ("ViT-B/32", "nonsense", "tags: openai"),
        ("ViT-B-32-256", "", "--pretrained FILE or TAG"),
    ],
)
def test_tags_that_do_not_fit_are_refused(arch: str, tag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(arch, tag)


def test_without_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_config: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ValueError, match=r"could not download the weights 'openai' .*pass --pretrained FILE"):
        load_pretrained("ViT-B/32")


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name, write in (
        ("evil.pt", lambda path: torch.save({"visual.proj": Evil(marker)}, path)),
        ("evil.bin", lambda path: path.write_bytes(pickle.dumps(Evil(marker)))),
        ("junk.pt", lambda path: path.write_bytes(b"junk")),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match="was not loaded") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = build_tiny_clip().state_dict()
    path = tmp_path / "w.safetensors"
    save_file({**weights, "visual.proj": torch.zeros(96, 32)}, path)
    with pytest.raises(ValueError, match=r"visual.proj is \(96, 32\), expected \(96, 64\)"):
        load_pretrained("tiny", str(path))
    save_file({name: value for name, value in weights.items() if name != "visual.class_embedding"}, path)
    with pytest.raises(ValueError, match=r"missing visual\.class_embedding"):
        load_pretrained("tiny", str(path))
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_pretrained("tiny", str(tmp_path / "w.pt"))
    with pytest.raises(ValueError, match="no weights at"):
        load_pretrained("tiny", str(tmp_path / "missing.pt"))

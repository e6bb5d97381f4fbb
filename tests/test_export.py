"""Fine-tuned weights in other tools, read by these tools: the same features, text features and logits, for any batch size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cammask_fast.checkpoint import Description, save_classifier
from cammask_fast.cli import main
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.export import export, largest_difference
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.model.zero_shot import load_tiny_clip, tiny_classifier
from tests.test_folder import write_image

CLASSES = ("zero", "one", "<two>")
PROMPTS = ["a photo of the number seven.", "a sketch of the number two.", "grass"]


def tuned(model: Classifier) -> Classifier:
    """A model that is not the pre-trained one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model() -> Classifier:
    return tuned(tiny_classifier(CLASSES))


@pytest.fixture(scope="module")
def run(model: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its best checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    described = {"pretrained": "tiny", "class_folders": ["0", "1", "2"]}
    description = Description(arch="tiny", vit=model.visual.config, class_names=CLASSES, run=described)
    save_classifier(folder / "best.safetensors", model, description)
    return folder


def pixels(count: int, size: int = 48) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_open_clip_reads_the_towers_and_the_head(run: Path, model: Classifier, tmp_path: Path) -> None:
    written = export(run / "best.safetensors", "open-clip", tmp_path)
    assert written.difference < 1e-5
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    clip.eval()
    ours = model(pixels(3))
    assert_close(clip.encode_image(pixels(3)), ours.features)
    tokens = open_clip.SimpleTokenizer(context_length=20)(PROMPTS)
    assert_close(clip.encode_text(tokens), load_tiny_clip().encode_text(tokens))
    head = load_file(tmp_path / "head.safetensors")
    features = torch.nn.functional.normalize(clip.encode_image(pixels(3)), dim=-1)
    assert_close(features @ head["weight"].T + head["bias"], ours.logits)
    assert json.loads((tmp_path / "classes.json").read_text())[2] == {"folder": "2", "name": "<two>"}
    write_image(tmp_path / "x.png", seed=1, size=(90, 60))
    own = normalise(decode((tmp_path / "x.png").read_bytes(), Transform(size=48))[None])
    assert (preprocess(Image.open(tmp_path / "x.png")) - own[0]).abs().max() < 0.05, "its transform is the run's"


@torch.no_grad()
def test_a_named_model_loads_with_pretrained_and_a_path(tmp_path: Path) -> None:
    name = "ViT-S-32-alt"
    torch.manual_seed(0)
    save_file(open_clip.create_model(name).state_dict(), tmp_path / "start.safetensors")
    start = load_pretrained(name, str(tmp_path / "start.safetensors"))
    model = tuned(Classifier(start.visual, torch.randn(2, start.visual.config.output_dim)))
    description = Description(arch=name, vit=model.visual.config, class_names=("a", "b"), run={})
    save_classifier(tmp_path / "best.safetensors", model, description)
    out = tmp_path / "out"
    written = export(tmp_path / "best.safetensors", "open-clip", out, pretrained=str(tmp_path / "start.safetensors"))
    assert f'"{name}", pretrained=' in written.usage
    clip, _, _ = open_clip.create_model_and_transforms(name, pretrained=str(out / "open_clip_model.safetensors"))
    assert_close(clip.eval().encode_image(pixels(2, 224)), model(pixels(2, 224)).features)
    assert isinstance(clip, CLIP)


@torch.no_grad()
def test_transformers_reads_both_towers_and_the_tokenizer(run: Path, model: Classifier, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="a development dependency")
    written = export(run / "best.safetensors", "hf", tmp_path)
    assert written.difference < 1e-5
    clip = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    images = clip.visual_projection(clip.vision_model(pixel_values=pixels(3)).pooler_output)
    assert_close(images, model(pixels(3)).features)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer(PROMPTS, padding="max_length", max_length=20, return_tensors="pt")
    tokens = open_clip.SimpleTokenizer(context_length=20)(PROMPTS)
    kept = tokens != 0
    assert torch.equal(theirs["input_ids"][kept], tokens[kept]), "the same vocabulary"
    tiny = load_tiny_clip()
    assert_close(clip.text_projection(clip.text_model(**theirs).pooler_output), tiny.encode_text(tokens))
    assert_close(clip.logit_scale, tiny.logit_scale.detach())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    write_image(tmp_path / "x.png", seed=1, size=(90, 60))
    seen = processor(Image.open(tmp_path / "x.png"), return_tensors="np")["pixel_values"]
    own = normalise(decode((tmp_path / "x.png").read_bytes(), Transform(size=48))[None])
    assert np.abs(np.asarray(seen) - own.numpy()).max() < 0.05, "its transform is the run's"


@torch.no_grad()
def test_onnx_runtime_takes_any_batch(run: Path, model: Classifier, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="a development dependency")
    assert export(run / "best.safetensors", "onnx", tmp_path).difference < 1e-4
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        logits, features = session.run(["logits", "features"], {"images": pixels(batch).numpy()})
        np.testing.assert_allclose(logits, model(pixels(batch)).logits.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(features, model(pixels(batch)).features.numpy(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_exported_program_takes_any_batch(run: Path, model: Classifier, tmp_path: Path) -> None:
    written = export(run / "best.safetensors", "torch-export", tmp_path)
    assert written.difference < 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 5):
        logits, features = program(pixels(batch))
        assert_close(logits, model(pixels(batch)).logits)
        assert_close(features, model(pixels(batch)).features)
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["class_names"] == list(CLASSES)
    assert described["input"]["preprocessing"]["interpolation"] == "bicubic"


@torch.no_grad()
@pytest.mark.parametrize("to", ["open-clip", "hf"])
def test_exported_towers_are_pretrained_weights_again(run: Path, model: Classifier, tmp_path: Path, to: str) -> None:
    if to == "hf":
        pytest.importorskip("transformers", reason="a development dependency")
    export(run / "best.safetensors", to, tmp_path)
    both = load_pretrained("tiny", str(tmp_path))
    assert torch.equal(both.visual(pixels(2)), model(pixels(2)).features)
    tokens = open_clip.SimpleTokenizer(context_length=20)(PROMPTS)
    assert torch.equal(both.clip.encode_text(tokens), load_tiny_clip().encode_text(tokens))


def test_the_comparison_sees_a_difference(model: Classifier) -> None:
    assert largest_difference(model, lambda images: {"features": model(images).features}) == 0
    one_batch_wrong = largest_difference(model, lambda images: {"logits": model(images).logits + (len(images) == 3)})
    assert one_batch_wrong == pytest.approx(1.0, abs=1e-4)


def test_the_command_says_what_it_wrote(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "open-clip", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "largest difference" in said
    assert "open_clip.create_model_and_transforms" in said
    assert main(["export", str(run / "nothing.safetensors"), "--to", "onnx", "--out", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert main(["export", str(run), "--to", "torch-export", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err

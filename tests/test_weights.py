"""The reader of weights: layouts, wrappers, prefixes, archives, and one true line for files that hold none."""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from cammask_fast.checkpoint import Description, save_classifier
from cammask_fast.model import pretrained
from cammask_fast.model.archive import read_archive
from cammask_fast.model.layouts import architectures_with, shape_of, to_open_clip_names
from cammask_fast.model.pretrained import load_pretrained, vit_config
from cammask_fast.model.weights import Weights, is_classifier, read_weights
from cammask_fast.model.zero_shot import tiny_classifier

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 9, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2}
    return CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def state(clip: CLIP) -> Tensors:
    return {name: value.detach() for name, value in clip.state_dict().items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value.float(), rtol=0, atol=0, msg=name)


def in_transformers_names(state: Tensors) -> Tensors:
    """The inverse of the conversion, written from transformers' module names."""
    out: Tensors = {"logit_scale": state["logit_scale"]}
    out["visual_projection.weight"], out["text_projection.weight"] = state["visual.proj"].T, state["text_projection"].T
    out["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    out["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    out["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
    out["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    out["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    out["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}  # fmt: skip
    for ours, theirs in norms.items():
        out |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for ours, theirs in (("visual.", "vision"), ("", "text")):
        for layer in range(2):
            block, target = f"{ours}transformer.resblocks.{layer}", f"{theirs}_model.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                parts = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for name, value in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                    out[f"{target}.self_attn.{name}.{kind}"] = value
                out[f"{target}.self_attn.out_proj.{kind}"] = state[f"{block}.attn.out_proj.{kind}"]
                out[f"{target}.layer_norm1.{kind}"] = state[f"{block}.ln_1.{kind}"]
                out[f"{target}.layer_norm2.{kind}"] = state[f"{block}.ln_2.{kind}"]
                out[f"{target}.mlp.fc1.{kind}"] = state[f"{block}.mlp.c_fc.{kind}"]
                out[f"{target}.mlp.fc2.{kind}"] = state[f"{block}.mlp.c_proj.{kind}"]
    return {name: value.contiguous() for name, value in out.items()}


class Hyper:
    """A class that a reader of the file need not have."""

    def __init__(self) -> None:
        self.lr = 0.1


WRAPPED: dict[str, Any] = {
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "ddp of compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "compiled ddp": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "lightning": lambda s: {"state_dict": {f"model._orig_mod.{k}": v for k, v in s.items()}, "epoch": 3, "hyper": Hyper()},
    "compiled tower": lambda s: {k.replace("visual.", "visual._orig_mod."): v for k, v in s.items()},
    "own module": lambda s: {"state_dict": {f"net.clip.{k}": v for k, v in s.items()}},
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, "model_state_dict": s,
    },
    "unknown wrapper beside an optimiser": lambda s: {
        "optim": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, "tuned": s,
    },
    "nested": lambda s: {"checkpoint": {"model": {f"module.{k}": v for k, v in s.items()}}},
    "numpy scalar": lambda s: {"state_dict": s, "best": np.float64(1), "args": argparse.Namespace(lr=1)},
    "scalars in the dict": lambda s: {**s, "epoch": 3, "best": np.float32(1)},
    "counter beside it": lambda s: {"state_dict": s, "global_step": torch.tensor(4)},
    "parameters": lambda s: {k: nn.Parameter(v) for k, v in s.items()},
    "custom text": lambda s: {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_and_prefixes(state: Tensors, tmp_path: Path, kind: str) -> None:
    torch.save(WRAPPED[kind](state), tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    assert_same(read.tensors, state)
    assert "\n" not in read.recognised
    if kind == "ddp of compiled":
        assert read.recognised.endswith("open_clip's CLIP in float32, the prefix module._orig_mod. removed")
    if kind == "lightning":
        assert "epoch, hyper left aside" in read.recognised


def test_a_file_from_before_pytorch_1_6(state: Tensors, tmp_path: Path) -> None:
    torch.save({"state_dict": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pt").tensors, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_float_types_become_float32(state: Tensors, tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    stored = {name: value.to(dtype) for name, value in state.items()}
    path = tmp_path / f"w{suffix}"
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    read = read_weights(path)
    assert_same(read.tensors, stored)
    assert str(dtype).removeprefix("torch.") in read.recognised


def test_the_suffix_does_not_matter(state: Tensors, tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        assert_same(read_weights(tmp_path / name).tensors, state)


class Archived(nn.Module):
    """Parameters under given dotted names, as OpenAI's archive has them, traced on a forward that means nothing."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        for name, value in tensors.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if value.is_floating_point():
                parent.register_parameter(last, nn.Parameter(value.half()))
            else:
                parent.register_buffer(last, value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_parameter("logit_scale")


def openai_archive(state: Tensors, path: Path) -> Path:
    extras = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(9), "vocab_size": torch.tensor(60)}
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(Archived({**state, **extras}), torch.ones(2)), str(path))
    return path


def test_openais_archive_is_read_without_running_it(state: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = openai_archive(state, tmp_path / "ViT-B-32.pt")
    for name in ("jit.load", "load"):
        monkeypatch.setattr(f"torch.{name}", lambda *_args, **_options: pytest.fail("the archive was loaded by PyTorch"))
    read = read_weights(path)
    assert_same(read.tensors, {name: value.half() for name, value in state.items()})
    assert read.layout == "OpenAI's CLIP"
    assert "TorchScript archive of which no code was run" in read.recognised
    assert "float16" in read.recognised


def test_a_pickled_module(clip: CLIP, state: Tensors, tmp_path: Path) -> None:
    torch.save(clip, tmp_path / "module.pt")
    read = read_weights(tmp_path / "module.pt")
    assert_same(read.tensors, state)
    assert "a pickled module" in read.recognised
    torch.save({"model": clip}, tmp_path / "wrapped.pt")
    assert_same(read_weights(tmp_path / "wrapped.pt").tensors, state)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def test_no_call_in_an_archive_is_made(state: Tensors, tmp_path: Path) -> None:
    """Through every way in which a pickle calls: a function, a method of what it was given, a state, a rebuilt tensor."""
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    torch.save(
        {"state_dict": state, "hook": Call(open, str(marker), "w"), "more": [Call(eval, f"open({str(marker)!r}, 'w')")]}, path
    )
    assert_same(read_weights(path).tensors, state)
    assert [name.split(".")[-1] for name in read_archive(path)[1]] == ["eval", "open"]
    torch.save({"visual.proj": Call(open, str(marker), "w")}, path)
    with pytest.raises(ValueError, match=r"was not loaded, since pickled code could run \(it names .*open\)"):
        read_weights(path)
    assert not marker.exists()


def test_a_checkpoint_that_contains_itself(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="contains itself"):
        read_weights(tmp_path / "w.pt")


def test_damaged_storages_are_one_line(state: Tensors, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)[1:], "b": torch.ones(3)}, tmp_path / "w.pt")
    content, foreign, scripted = read_archive(tmp_path / "w.pt")
    assert (content["a"].tolist(), foreign, scripted) == ([1, 1, 1], [], False)
    data = (tmp_path / "w.pt").read_bytes()
    wrong = data.replace(b"\x00\x00\x80?" * 3, b"\x00\x00\x80@" * 3)
    (tmp_path / "w.pt").write_bytes(wrong)
    with pytest.raises(ValueError, match="cut off or damaged"):
        read_archive(tmp_path / "w.pt")


NOT_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "lfs.pt": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 605143316\n",
        r"Git LFS pointer to a file of 605 MB: run `git lfs pull`",
    ),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer to a file: run `git lfs pull`"),
    "page.pt": (b"\n<!DOCTYPE html><html><head>", r"a web page, .*/resolve/"),
    "page.safetensors": (b"<html>Access denied</html>", "a web page"),
    "empty.pt": (b"", "empty: the download or copy failed"),
    "empty.safetensors": (b"", "empty: the download or copy failed"),
    "error.json": (b'{"error": "Repository not found"}', "JSON text, not the weights"),
    "w.pt.gz": (b"\x1f\x8b\x08" + b"\0" * 20, "gzip archive: unpack it"),
    "tf.h5": (b"\x89HDF\r\n\x1a\n", "TensorFlow"),
    "old.pt": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "cut off, damaged, or not a plain state dict"),
    "graph.onnx": (b"\x08\x0a\x12\x07pytorch", "an ONNX graph, .*: give the weights that it was made of"),
    "program.pt2": (b"PK\x03\x04", "a program of torch.export, .*: give the checkpoint"),
    "junk.safetensors": (b"junk", "does not begin like a safetensors file"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_files_that_hold_no_weights(tmp_path: Path, name: str) -> None:
    content, message = NOT_WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_a_file(state: Tensors, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for share in (0.5, 0.05):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="cut off or damaged"):
            read_weights(path)


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("model/weights.safetensors", b"")
    with pytest.raises(ValueError, match="unpack it and give the file inside"):
        read_weights(tmp_path / "w.zip")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"visual.conv1.weight": torch.ones(4, 3, 2, 2), "visual.proj": torch.ones(4, 4)}, "only an image tower"),
        ({"token_embedding.weight": torch.ones(4, 2), "ln_final.bias": torch.ones(2)}, "only a text tower"),
        ({"visual.layer1.0.conv1.weight": torch.ones(2, 2), "visual.proj": torch.ones(2)}, "ResNet"),
        ({"base_model.model.visual.lora_A.weight": torch.ones(2, 2), "b": torch.ones(1)}, "merge_and_unload"),
        ({"vision_model.head.probe": torch.ones(1, 1, 2), "logit_scale": torch.ones(1)}, "SiglipModel"),
        ({"visual.trunk.pos_embed": torch.ones(1, 1), "logit_scale": torch.ones(1)}, "timm"),
        ({"patch_embed.proj.weight": torch.ones(1, 1), "norm.bias": torch.ones(1)}, "timm's layout"),
        ({"layer1.0.conv1.weight": torch.ones(1, 1), "fc.bias": torch.ones(1)}, "no CLIP"),
        ({"something.weight": torch.ones(1, 1), "else": torch.ones(1)}, r"no CLIP \(its names begin with something.weight"),
        ({"token_embedding.weight": torch.ones(4, 2, dtype=torch.int8), "b": torch.ones(1)}, r"quantised weights \(int8\)"),
        ({f"{m}.visual.conv1.weight": torch.ones(1) for m in ("a", "b")}, "several CLIPs, under a., b.: save the one"),
    ],
)  # fmt: skip
def test_weights_of_other_networks_are_named(tmp_path: Path, tensors: Tensors, message: str) -> None:
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "w.pt")


def test_several_state_dicts_are_not_guessed_between(state: Tensors, tmp_path: Path) -> None:
    torch.save({"generator": state, "critic": state}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="several state dicts, generator, critic"):
        read_weights(tmp_path / "w.pt")
    torch.save({"state_dict": state, "ema": {"visual.proj": torch.zeros(1)}}, tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    assert_same(read.tensors, state)
    assert "ema left aside" in read.recognised


def test_transformers_names(state: Tensors, tmp_path: Path) -> None:
    save_file(in_transformers_names(state), tmp_path / "model.safetensors")
    read = read_weights(tmp_path)
    assert_same(read.tensors, state)
    assert read.layout == "transformers' CLIPModel"
    without_keys = {
        k: v for k, v in in_transformers_names(state).items() if k != "text_model.encoder.layers.1.self_attn.k_proj.bias"
    }
    with pytest.raises(ValueError, match=r"text_model.encoder.layers.1.self_attn.q_proj.bias without its keys"):
        to_open_clip_names(without_keys)
    odd = {**in_transformers_names(state), "vision_model.encoder.layers.0.extra.weight": torch.ones(1)}
    assert "vision_model.encoder.layers.0.extra.weight" in to_open_clip_names(odd)[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(state: Tensors, tmp_path: Path, suffix: str) -> None:
    tensors = in_transformers_names(state)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    parts: list[Tensors] = [{}, {}]
    for number, (name, value) in enumerate(tensors.items()):
        parts[number % 2][name] = value
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name) if suffix == ".safetensors" else torch.save(part, tmp_path / name)
    index = tmp_path / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {key: names[i] for i in (0, 1) for key in parts[i]}}))
    for given in (tmp_path, index, tmp_path / names[1]):
        read = read_weights(given)
        assert_same(read.tensors, state)
        assert "2 shards" in read.recognised
    (tmp_path / names[0]).unlink()
    with pytest.raises(ValueError, match=f"missing: {names[0]}"):
        read_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="no index of shards"):
        read_weights(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"index .* is missing"):
        read_weights(tmp_path / names[1])
    with pytest.raises(ValueError, match="folder without weights"):
        read_weights(tmp_path)


def test_transformers_own_model_gives_the_same_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
            "max_position_embeddings": 9, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 1}  # fmt: skip
    theirs = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = CLIP(
        embed_dim=24, quick_gelu=True,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 9, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2},
    ).eval()  # fmt: skip
    ours.load_state_dict(read_weights(tmp_path).tensors)
    images, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[58, 3, 4, 5, 59, 0, 0, 0, 0], [58, 7, 59, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        found = theirs(pixel_values=images, input_ids=tokens)
        torch.testing.assert_close(ours.encode_image(images, normalize=True), found.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.encode_text(tokens, normalize=True), found.text_embeds, rtol=0, atol=1e-6)


def test_a_checkpoint_of_ours_is_told_apart(tmp_path: Path, state: Tensors) -> None:
    model = tiny_classifier(["one", "two"])
    own, other = tmp_path / "best.safetensors", tmp_path / "clip.safetensors"
    save_classifier(own, model, Description(arch="tiny", vit=model.visual.config, class_names=("one", "two")))
    save_file(state, other)
    (tmp_path / "lfs.safetensors").write_bytes(NOT_WEIGHTS["lfs.safetensors"][0])
    assert [is_classifier(tmp_path / name) for name in ("best.safetensors", "clip.safetensors", "lfs.safetensors", "none")] == [
        True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a checkpoint of cammask train, which has no text tower: pass it as `train --init`"):
        read_weights(own)


# what belongs to the weights but is not in their shapes


def meta_weights(arch: str, path: Path, layout: str = "open_clip's CLIP") -> Weights:
    """The shapes of an architecture, without memory."""
    with torch.device("meta"):
        clip = pretrained._build(pretrained._model_config(arch), vit_config(arch))
    return Weights(path=path, tensors=clip.state_dict(), layout=layout, recognised="")


def check(arch: str, weights: Weights) -> None:
    pretrained._check_origin(weights, arch, vit_config(arch))


@pytest.mark.parametrize(
    ("arch", "here", "other"), [("ViT-B/32", "QuickGELU", "ViT-B-32"), ("ViT-B-32", "GELU", "ViT-B-32-quickgelu")]
)
def test_an_activation_that_cannot_be_known_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arch: str, here: str, other: str
) -> None:
    check(arch, meta_weights(arch, tmp_path / "w.pt"))
    line = capsys.readouterr().err
    assert line.startswith("cammask: warning: the activation cannot be known from ")
    assert f"{arch} computes {here};" in line
    assert f"use --arch {other} " in line
    assert line.count("\n") == 1


def test_a_name_with_one_activation_needs_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check("ViT-S-32-alt", meta_weights("ViT-S-32-alt", tmp_path / "w.pt"))
    assert not capsys.readouterr().err


def test_the_activation_of_openais_archive_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = meta_weights("ViT-B/32", tmp_path / "ViT-B-32.pt", "OpenAI's CLIP")
    check("ViT-B/32", weights)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"trained with QuickGELU .*ViT-B-32 computes GELU: use --arch ViT-B-32-quickgelu"):
        check("ViT-B-32", weights)


def open_clip_config(arch: str, **preprocessing: Any) -> str:
    import open_clip

    return json.dumps({"model_cfg": open_clip.get_model_config(arch), "preprocess_cfg": preprocessing})


def transformers_config(**vision: Any) -> str:
    return json.dumps({"model_type": "clip", "vision_config": vision})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("open_clip_config.json", open_clip_config("ViT-B-32")),
        ("config.json", transformers_config(hidden_act="gelu")),
    ],
)
def test_a_config_beside_the_file_decides_the_activation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    weights = meta_weights("ViT-B-32", tmp_path / "model.safetensors")
    check("ViT-B-32", weights)
    assert not capsys.readouterr().err
    with pytest.raises(
        ValueError, match=rf"trained with GELU \(.*{name}\), and ViT-B/32 computes QuickGELU: use --arch ViT-B-32$"
    ):
        check("ViT-B/32", weights)


def test_transformers_default_activation_is_quick_gelu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(transformers_config())
    check("ViT-B/32", meta_weights("ViT-B/32", tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="use --arch ViT-B-32-quickgelu"):
        check("ViT-B-32", meta_weights("ViT-B-32", tmp_path / "model.safetensors"))


def test_a_config_of_another_model_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = meta_weights("ViT-B/32", tmp_path / "w.pt")
    for name, text in (
        ("config.json", transformers_config(hidden_size=1024, hidden_act="gelu")),
        ("open_clip_config.json", open_clip_config("ViT-L-14")),
    ):
        (tmp_path / name).write_text(text)
        check("ViT-B/32", weights)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert f"{name} describes a model of another shape than w.pt" in lines[0]
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*open_clip_config.json beside the weights"):
        check("ViT-B/32", weights)


CLIP_IMAGES = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({**CLIP_IMAGES, "interpolation": "bicubic", "resize_mode": "shortest", "size": 224}, ""),
        ({"mean": [0.4814, 0.4578, 0.4082]}, ""),
        ({**CLIP_IMAGES, "resize_mode": "squash"}, "resize_mode squash instead of shortest"),
        ({**CLIP_IMAGES, "interpolation": "bilinear"}, "interpolation bilinear instead of bicubic"),
        ({"mean": [0.5, 0.5, 0.5]}, r"mean \(0.5, 0.5, 0.5\) instead of"),
    ],
)
def test_preprocessing_of_a_config_beside_the_file(tmp_path: Path, preprocessing: dict[str, Any], message: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(open_clip_config("ViT-B-32", **preprocessing))
    weights = meta_weights("ViT-B-32", tmp_path / "w.pt")
    if not message:
        check("ViT-B-32", weights)
        return
    with pytest.raises(ValueError, match=rf"prepared in another way, which is not supported: {message}"):
        check("ViT-B-32", weights)


def test_preprocessing_of_transformers_processor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(transformers_config(hidden_act="gelu"))
    processor = {
        "image_mean": CLIP_IMAGES["mean"],
        "image_std": CLIP_IMAGES["std"],
        "resample": 3,
        "size": {"shortest_edge": 224},
    }
    weights = meta_weights("ViT-B-32", tmp_path / "w.pt")
    for change, message in (
        ({}, ""),
        ({"size": 224}, ""),
        ({"resample": 2}, "interpolation bilinear"),
        ({"size": {"height": 224, "width": 224}, "do_center_crop": False}, "resize_mode squash"),
        ({"image_std": [1, 1, 1]}, "std"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, **change}))
        if message:
            with pytest.raises(ValueError, match=message):
                check("ViT-B-32", weights)
        else:
            check("ViT-B-32", weights)


@pytest.mark.parametrize("arch", ["ViT-H-14-quickgelu", "ViT-H-14-378-quickgelu"])
def test_tags_that_squash_images_are_refused(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.download_pretrained", lambda _config: pytest.fail("downloaded first"))
    with pytest.raises(ValueError, match=r"'dfn5b' .*resize_mode squash instead of shortest"):
        load_pretrained(arch, "dfn5b")


def test_openais_name_of_the_336_pixel_model() -> None:
    large = vit_config("ViT-L/14@336px")
    assert (large.image_size, large.patch_size, large.layers, large.activation) == (336, 14, 24, "quick_gelu")
    assert pretrained.default_pretrained("ViT-L/14@336px") == "openai"
    with pytest.raises(ValueError, match=r"did you mean ViT-L/14@336px\?"):
        vit_config("ViT-L/14@336")


def test_weights_of_another_size_name_the_architecture_they_fit(tmp_path: Path) -> None:
    weights = meta_weights("ViT-L/14@336px", tmp_path / "ViT-L-14-336px.pt")
    with torch.device("meta"):
        smaller = pretrained._build(pretrained._model_config("ViT-L/14"), vit_config("ViT-L/14"))
    with pytest.raises(
        ValueError, match=r"visual.positional_embedding is .*they fit --arch ViT-L-14-336 or ViT-L-14-336-quickgelu"
    ):
        pretrained._load(smaller, weights, "ViT-L/14", said=True)
    odd = Weights(
        path=tmp_path, layout="", recognised="",
        tensors={**weights.tensors, "visual.positional_embedding": torch.empty(26, 1024, device="meta")},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no known --arch has their shapes \(image_size 70, patch_size 14, width 1024"):
        pretrained._load(smaller, odd, "ViT-L/14", said=True)


def test_shapes_of_every_plain_model_lead_back_to_it() -> None:
    for arch in ("ViT-B-32-quickgelu", "ViT-B-16-plus-240", "ViT-S-32-alt", "ViT-L-14-336", "ViT-H-14"):
        assert arch in architectures_with(shape_of(meta_weights(arch, Path("w")).tensors))
    assert not architectures_with({})


def test_pickles_from_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"visual.proj": np.ones(3)}))
    with pytest.raises(ValueError, match="was not loaded"):
        read_weights(tmp_path / "w.pkl")

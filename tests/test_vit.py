"""Our image tower against open_clip's, and the identities that make it cheap."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from cammask_fast.cam import relevance_of
from cammask_fast.model.vit import SAVED_LOGSUMEXP, Block, Taps, VisionTransformer, ViTConfig, saved_logsumexp
from cammask_fast.model.zero_shot import tiny_classifier

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
ODD = ViTConfig(image_size=21, patch_size=3, width=24, layers=3, heads=3, output_dim=10)  # L = 50


def build(config: ViTConfig = ODD, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> VisionTransformer:
    """A tower whose every parameter is random, so that no term vanishes."""
    torch.manual_seed(seed)
    model = VisionTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def images(config: ViTConfig = ODD, *, count: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def full_token_forward(model: VisionTransformer, pixels: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """The textbook forward: every token through every block, CLS read at the end. key_mask: (N, P), True = -inf."""
    config, count = model.config, len(pixels)
    patches = F.unfold(pixels, config.patch_size, stride=config.patch_size).mT @ model.conv1.weight.flatten(1).T
    x = torch.cat([model.class_embedding.expand(count, 1, -1), patches], 1) + model.positional_embedding
    x = model.ln_pre(x)
    bias = torch.zeros(count, 1, 1, x.shape[1], dtype=x.dtype)
    if key_mask is not None:
        bias[..., 1:].masked_fill_(key_mask[:, None, None], float("-inf"))
    for block in model.transformer.resblocks:
        assert isinstance(block, Block)
        q, k, v = (
            t.view(count, -1, config.heads, config.width // config.heads).transpose(1, 2)
            for t in F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        )
        weights = torch.softmax(q @ k.mT / (config.width // config.heads) ** 0.5 + bias, -1)
        x = x + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    return model.ln_post(x)[:, 0] @ model.proj


def gradients(model: nn.Module, features: Tensor) -> dict[str, Tensor]:
    """Of a scalar in which every feature has its own weight."""
    loss = (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def assert_gradients_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(g.abs().max().item() for g in expected.values())
    errors = {name: (ours[name] - expected[name]).abs().max().item() / scale for name in expected}
    assert not {name: error for name, error in errors.items() if not error <= 1e-12}


def test_open_clips_vit_b32_loads_unchanged_and_gives_its_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    config = ViTConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, output_dim=512)
    ours = VisionTransformer(config).eval()
    state = theirs.state_dict()
    ours.load_state_dict({name.removeprefix("visual."): v for name, v in state.items() if name.startswith("visual.")})
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours(pixels), theirs.visual(pixels), rtol=0, atol=1e-5)
        for parameter in ours.parameters():  # fine-tuning
            parameter.mul_(1 + 0.05 * torch.rand_like(parameter))
        theirs.load_state_dict(state | {f"visual.{name}": value for name, value in ours.state_dict().items()})
        assert torch.allclose(ours(pixels), theirs.encode_image(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_small_open_clip_tower_agrees_in_float64_with_its_gradients(activation: str) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 24, "patch_size": 4, "width": 32, "layers": 3, "head_width": 8, "mlp_ratio": 2.0}
    theirs = CLIP(embed_dim=12, vision_cfg=vision, text_cfg=TEXT, quick_gelu=activation == "quick_gelu").double().visual
    config = ViTConfig(
        image_size=24, patch_size=4, width=32, layers=3, heads=4, output_dim=12, activation=activation, mlp_ratio=2.0
    )
    ours = build(config)
    theirs.load_state_dict(ours.state_dict())
    pixels = images(config)
    features, expected = ours(pixels), theirs(pixels)
    assert torch.allclose(features, expected, rtol=0, atol=1e-13)
    assert_gradients_equal(gradients(ours, features), gradients(theirs, expected))


def test_the_two_activations_differ() -> None:
    quick = build()
    plain = VisionTransformer(ViTConfig(**{**ODD.to_dict(), "activation": "gelu"})).double()
    plain.load_state_dict(quick.state_dict())
    assert not torch.allclose(quick(images()), plain(images()), atol=1e-4)


def test_the_cls_only_last_block_changes_neither_features_nor_gradients() -> None:
    model, pixels = build(), images()
    features, expected = model(pixels), full_token_forward(model, pixels)
    assert torch.allclose(features, expected, rtol=0, atol=1e-13)
    assert_gradients_equal(gradients(model, features), gradients(model, expected))


def random_mask(*, masked: int, seed: int = 2) -> Tensor:
    """(N, P) with the same number of masked patches in every image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(ODD.patches, generator=generator) < masked for _ in range(3)])


@pytest.mark.parametrize("masked", [0, 1, 24, 48])
def test_dropping_tokens_equals_masking_keys_at_the_cls_output(masked: int) -> None:
    model, pixels, mask = build(), images(), random_mask(masked=masked)
    kept = F.pad((~mask).nonzero()[:, 1].view(3, -1) + 1, (1, 0))
    dropped, masked_keys = model(pixels, kept_tokens=kept), model(pixels, key_mask=mask)
    assert torch.allclose(dropped, masked_keys, rtol=0, atol=1e-13)
    expected = full_token_forward(model, pixels, key_mask=mask)
    assert torch.allclose(masked_keys, expected, rtol=0, atol=1e-13)
    assert_gradients_equal(gradients(model, dropped), gradients(model, expected))
    assert_gradients_equal(gradients(model, masked_keys), gradients(model, expected))


def test_every_patch_masked_leaves_the_cls_token_alone() -> None:
    model, mask = build(), torch.ones(3, ODD.patches, dtype=torch.bool)
    features = model(images(), key_mask=mask)
    assert torch.allclose(features, features[:1].expand(3, -1), rtol=0, atol=1e-13)
    assert torch.allclose(features, model(images(), kept_tokens=torch.zeros(3, 1, dtype=torch.int64)), rtol=0, atol=1e-13)


def test_the_order_of_kept_tokens_after_cls_does_not_matter() -> None:
    model = build()
    kept = F.pad(torch.stack([torch.randperm(ODD.patches)[:20] for _ in range(3)]) + 1, (1, 0))
    shuffled = torch.cat([kept[:, :1], kept[:, 1 + torch.randperm(20)]], 1)
    assert torch.allclose(model(images(), kept_tokens=kept), model(images(), kept_tokens=shuffled), rtol=0, atol=1e-13)


def test_taps_hold_every_layer_and_do_not_change_the_features() -> None:
    model, taps = build(), Taps()
    features = model(images(), taps=taps)
    assert torch.equal(features, model(images()))
    full, cls = (3, ODD.heads, ODD.patches + 1, 8), (3, ODD.heads, 1, 8)
    assert [q.shape for q in taps.queries] == [o.shape for o in taps.outputs] == [full, full, cls]
    assert [k.shape for k in taps.keys] == [v.shape for v in taps.values] == [full] * 3
    assert taps.last_ln_1 is not None
    assert taps.last_ln_1.shape == (3, ODD.patches + 1, ODD.width)
    for q, k, v, out in zip(taps.queries, taps.keys, taps.values, taps.outputs, strict=True):
        assert torch.allclose(torch.softmax(q @ k.mT / 8**0.5, -1) @ v, out, rtol=0, atol=1e-13)
        assert out.requires_grad
    detached = taps.detached()
    for q, k, lse in zip(detached.queries, detached.keys, detached.logsumexps, strict=True):
        assert lse is not None
        assert not lse.requires_grad
        torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / 8**0.5, -1), rtol=0, atol=1e-13)
    with torch.no_grad():
        model(images(), taps=(bare := Taps()))
    assert bare.detached().logsumexps == [None] * ODD.layers


@pytest.mark.parametrize("name", [*SAVED_LOGSUMEXP, "ScaledDotProductFusedAttentionOverrideableBackward0"])
def test_the_logsumexp_of_every_fused_attention(name: str) -> None:
    """PyTorch has the nodes; their tensors are shaped here as its CUDA operators shape them."""
    assert hasattr(torch._C._functions, name)
    attribute = SAVED_LOGSUMEXP.get(name, "_saved_logsumexp")
    assert hasattr(getattr(torch._C._functions, name), attribute)
    lse = torch.rand(2, 3, 9)
    saved = {"Cudnn": lse[..., None], "Efficient": F.pad(lse, (0, 23), value=torch.inf)}
    found = next((tensor for part, tensor in saved.items() if part in name), lse)

    class Output:
        shape = (2, 3, 9, 8)
        grad_fn = type(name, (), {attribute: found})()

    given = saved_logsumexp(Output())  # type: ignore[arg-type]
    assert (given is None) == (name not in SAVED_LOGSUMEXP)
    assert given is None or torch.equal(given, lse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"images": torch.zeros(2, 3, 24, 24)},
            r"^images: expected \(N, 3, 21, 21\) or patches \(N, 49, 27\), got \(2, 3, 24, 24\)",
        ),
        ({"images": torch.zeros(3, 21, 21)}, "^images: expected"),
        ({"images": torch.zeros(2, 21, 21, 3)}, "^images: expected"),
        ({"key_mask": torch.zeros(2, 50, dtype=torch.bool)}, r"^key_mask: expected \(2, 49\), got \(2, 50\)"),
        (
            {"key_mask": torch.zeros(2, 49, dtype=torch.bool), "kept_tokens": torch.zeros(2, 4, dtype=torch.int64)},
            r"^key_mask: expected \(2, 3\), got \(2, 49\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(dtype=torch.float32)(**{"images": torch.zeros(2, 3, 21, 21), **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch size 5 does not divide the image size 21"),
        ({"heads": 5}, "5 heads do not divide the width 24"),
        ({"activation": "relu"}, "activation: expected one of quick_gelu, gelu"),
        ({"depth": 3}, "unknown fields in a ViT configuration: depth"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig.from_dict({**ODD.to_dict(), **change})
    assert ViTConfig.from_dict(ODD.to_dict()) == ODD


@pytest.mark.parametrize("cam", ["mm-cam", "grad-cam"])
def test_a_frozen_model_has_a_map_even_without_grad(cam: str) -> None:
    """The taps' graph is made for the call, and an unknown map is refused."""
    torch.manual_seed(0)
    model = tiny_classifier(["zero", "one"])
    images, labels = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8), torch.tensor([0, 1])
    expected = relevance_of(model, images, labels, cam)
    with torch.no_grad():
        found = relevance_of(model.frozen_copy(), images, labels, cam)
    assert expected.any()
    assert torch.equal(found, expected)
    assert not torch.equal(relevance_of(model, images, labels, "mm-cam", start_layer=2), expected)
    with pytest.raises(ValueError, match="unknown cam 'gradcam'; known: mm-cam, grad-cam, legrad"):
        relevance_of(model, images, labels, "gradcam")

"""Every map against its published definition, written out over attention matrices in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cammask_fast as cf
from cammask_fast.cam import CAMS, grad_cam, mm_cam, relevance_of, score_weights
from cammask_fast.config import TrainConfig
from cammask_fast.kernels.normalise import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps, VisionTransformer
from tests.test_step import TINY, batch

WITH_SCORE = [cam for cam in CAMS if cam != "rollout"]
IMAGES, LABELS = batch().images, batch().labels


def model(activation: str = "quick_gelu") -> Classifier:
    torch.manual_seed(3)
    found = Classifier(VisionTransformer(replace(TINY, activation=activation)), 4 * torch.randn(3, TINY.output_dim)).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def written_out(model: Classifier) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Attention probabilities (N, A, L, L) and outputs (N, L, D) of all layers, with all tokens in each, and the logits."""
    visual, config = model.visual, model.visual.config
    pixels = normalise(IMAGES, dtype=torch.float64)
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x, probabilities, outputs = visual.ln_pre(x), [], []
    blocks: Any = visual.transformer.resblocks
    for block in blocks:
        packed = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = (part.unflatten(-1, (config.heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        x = x + block.attn.out_proj((p @ v).transpose(1, 2).flatten(2))
        hidden = block.mlp.c_fc(block.ln_2(x))
        active = F.gelu(hidden) if config.activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
        x = x + block.mlp.c_proj(active)
        probabilities.append(p)
        outputs.append(x)
    return probabilities, outputs, logits_of(model, x[:, 0])


def logits_of(model: Classifier, tokens_ND: Tensor) -> Tensor:
    return model.head(F.normalize(model.visual.ln_post(tokens_ND) @ model.visual.proj, dim=-1))


def legrad_written_out(model: Classifier, *, own: bool, start: int = 0, weights: Tensor | None = None) -> Tensor:
    """Sum over layers of the mean over heads and queries of relu(d score / d attention)."""
    probabilities, outputs, logits = written_out(model)
    total = torch.zeros(len(IMAGES), outputs[0].shape[1], dtype=torch.float64)
    for p, x in list(zip(probabilities, outputs, strict=True))[start:]:
        scores = logits_of(model, x.mean(1)) if own else logits
        chosen = scores.gather(1, LABELS[:, None]).sum() if weights is None else (scores * weights).sum()
        (gradient,) = torch.autograd.grad(chosen, p, retain_graph=True)
        total += gradient.clamp_min(0).mean(1).mean(1)
    return total[:, 1:]


def found(model: Classifier, cam: str, **options: Any) -> Tensor:
    return relevance_of(model, IMAGES, LABELS, cam, dtype=torch.float64, **options)


def assert_equal(ours: Tensor, gold: Tensor) -> None:
    assert gold.abs().max() > 0
    torch.testing.assert_close(ours, gold, rtol=1e-9, atol=1e-12 * gold.abs().max().item())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_legrad_is_its_definition(activation: str, own: bool, start: int) -> None:
    theirs = model(activation)
    gold = legrad_written_out(theirs, own=own, start=start)
    assert_equal(found(theirs, "legrad" if own else "legrad-final", start_layer=start), gold)


@pytest.mark.parametrize("start", [0, 2])
def test_rollout_is_the_product_of_averaged_attention(start: int) -> None:
    theirs = model()
    product = torch.eye(TINY.patches + 1, dtype=torch.float64)
    for p in written_out(theirs)[0][start:]:
        product = (torch.eye(TINY.patches + 1) + p.mean(1)) / 2 @ product
    torch.testing.assert_close(product.sum(-1), torch.ones_like(product[..., 0]))
    assert_equal(found(theirs, "rollout", start_layer=start), product[:, 0, 1:])


@pytest.mark.parametrize("contrast", ["mean", "runner-up"])
@pytest.mark.parametrize("cam", WITH_SCORE)
def test_a_contrast_explains_the_difference_of_scores(cam: str, contrast: str) -> None:
    """With one head whose label's row is the difference, no contrast gives the same map."""
    theirs = model()
    logits = written_out(theirs)[2].detach()
    contrasted = torch.stack(
        [difference(theirs, label, logits[n], contrast, cam, n) for n, label in enumerate(LABELS.tolist())]
    )
    ours = found(theirs, cam, contrast=contrast)
    assert_equal(ours, contrasted)
    assert not torch.allclose(ours, found(theirs, cam))


def difference(theirs: Classifier, label: int, logits: Tensor, contrast: str, cam: str, n: int) -> Tensor:
    """The map of image n at a class whose weights are the label's less those of the others."""
    others = [other for other in range(3) if other != label]
    if contrast == "runner-up":
        others = [max(others, key=lambda other: logits[other].item())]
    changed = theirs.frozen_copy()
    with torch.no_grad():
        for values in (changed.head.weight, changed.head.bias):
            values[label] -= torch.stack([values[other] for other in others]).mean(0)
    return relevance_of(changed, IMAGES[n : n + 1], LABELS[n : n + 1], cam, dtype=torch.float64)[0]


def test_the_weights_of_a_contrast() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [1.0, 5.0, 3.0, 4.0]])
    labels = torch.tensor([1, 2])
    assert score_weights(logits, labels).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert score_weights(logits, labels, "runner-up").tolist() == [[0, 1, 0, -1], [0, -1, 1, 0]]
    torch.testing.assert_close(score_weights(logits, labels, "mean")[0], torch.tensor([-1 / 3, 1, -1 / 3, -1 / 3]))
    minus = torch.full((1, 2), -torch.inf)
    assert score_weights(minus, torch.tensor([1]), "runner-up").tolist() == [[-1, 1]]


def test_the_functions_take_a_contrast_as_relevance_of_does() -> None:
    theirs, taps = model(), Taps()
    logits = theirs(normalise(IMAGES, dtype=torch.float64), taps=taps).logits
    for function, cam in ((mm_cam, "mm-cam"), (grad_cam, "grad-cam")):
        assert_equal(function(logits, LABELS, taps, contrast="mean"), found(theirs, cam, contrast="mean"))


def test_own_scores_leave_the_prediction_as_it_is() -> None:
    theirs, pixels, taps = model(), normalise(IMAGES, dtype=torch.float64), Taps(own_scores=True)
    assert torch.equal(theirs(pixels).logits, theirs(pixels, taps=taps).logits)
    outputs = written_out(theirs)[1]
    for pooled, x in zip(taps.pooled, outputs, strict=True):
        torch.testing.assert_close(pooled, x.mean(1))
    assert [len(one) for one in (taps.values, taps.hidden, taps.attended, taps.outputs)] == [TINY.layers] * 4
    assert taps.outputs[-1].shape[2] == TINY.patches + 1


@pytest.mark.parametrize("cam", ["legrad", "rollout"])
def test_maps_without_a_backward_pass_make_no_graph(cam: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass through the model")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(VisionTransformer, "forward", without_grad(VisionTransformer.forward))
    assert found(model(), cam).any()


def without_grad(forward: Any) -> Any:
    def checked(self: VisionTransformer, *args: Any, **options: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return forward(self, *args, **options)

    return checked


@pytest.mark.parametrize("cam", CAMS)
def test_bf16_follows_float64(cam: str) -> None:
    theirs = model()
    gold = found(theirs, cam)
    small = theirs.float().frozen_copy().stored_in(torch.bfloat16)
    ours = relevance_of(small, IMAGES, LABELS, cam, dtype=torch.bfloat16)
    assert ours.dtype == torch.float32
    assert (ours - gold).abs().max() < 0.06 * gold.max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cam": "grad-cam", "cam_start_layer": 1}, "cam_start_layer: Grad-CAM looks at the last layer only; leave it at 0"),
        ({"cam": "rollout", "cam_contrast": "mean"}, "cam_contrast: attention rollout has no class score; leave it at none"),
        ({"cam_contrast": "second"}, "unknown cam_contrast 'second'; known: none, mean, runner-up"),
    ],
)
def test_settings_that_a_map_cannot_honour_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
    options = {name.removeprefix("cam_"): value for name, value in settings.items() if name != "cam"}
    with pytest.raises(ValueError, match=message):
        found(model(), settings.get("cam", "mm-cam"), **options)


def test_a_contrast_needs_a_second_class() -> None:
    alone = Classifier(VisionTransformer(TINY), torch.ones(1, TINY.output_dim))
    with pytest.raises(ValueError, match="cam_contrast: there is one class only; give two or more"):
        relevance_of(alone, IMAGES, torch.zeros_like(LABELS), "legrad", contrast="mean")


@pytest.mark.parametrize("cam", CAMS)
def test_a_start_layer_beyond_the_model_and_labels_that_do_not_fit_are_refused(cam: str) -> None:
    with pytest.raises(ValueError, match=r"cam_start_layer: expected 0\.\.2 for this model, got 3"):
        found(model(), cam, start_layer=3)
    with pytest.raises(ValueError, match="labels: expected 0 to 2, got 0 to 3"):
        relevance_of(model(), IMAGES, torch.tensor([0, 1, 2, 3]), cam, dtype=torch.float64)


@pytest.mark.slow
def test_the_front_door_takes_every_map_and_a_contrast() -> None:
    tiny, images = cf.load("tiny"), torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    maps = {cam: cf.cam(tiny, images, ["zero", "one"], kind=cam).relevance for cam in CAMS}
    assert all(found.any() for found in maps.values())
    assert len({tuple(found.flatten().tolist()) for found in maps.values()}) == len(CAMS)
    contrasted = cf.cam(tiny, images, ["zero", "one"], kind="legrad", contrast="runner-up", start_layer=2).relevance
    assert not torch.allclose(contrasted, maps["legrad"])
    with pytest.raises(ValueError, match="cam_contrast: there is one class only"):
        cf.cam(tiny, images, "zero", contrast="mean")

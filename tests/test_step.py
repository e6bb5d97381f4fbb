"""The training step against plain autograd of the written-out loss, and the training loop around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from cammask_fast import step as step_module
from cammask_fast.cam import cls_rollout, grad_cam, mm_cam, relevance_of
from cammask_fast.cam import maps as maps_module
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader, Batch
from cammask_fast.kernels.normalise import normalise
from cammask_fast.masking import MaskRandomness, counterfactual
from cammask_fast.model.classifier import Classifier, compute_weights, keeps_precision
from cammask_fast.model.vit import Taps, VisionTransformer, ViTConfig
from cammask_fast.state import TrainState
from cammask_fast.step import build_step, build_strategy, sample_step_randomness
from cammask_fast.train import NonFiniteLoss, fine_tune

TINY = ViTConfig(image_size=12, patch_size=3, width=16, layers=3, heads=2, output_dim=6)
WEIGHTS = {"w_task": 0.7, "w_distill": 3.0, "kd_temperature": 2.0}
FD = TrainConfig(method="ft-fd", **WEIGHTS)  # type: ignore[arg-type]
CONFIGS = {
    "ft": replace(FD, method="ft"),
    "wise-ft": replace(FD, method="wise-ft"),
    "ft-fd": FD,
    "ft-kd": replace(FD, method="ft-kd"),
    "masked-object": replace(FD, method="masked-object"),
    "masked-context": replace(FD, method="masked-context"),
    "masked-random": replace(FD, method="masked-random"),
    "masked-topk": replace(FD, method="masked-topk"),
    "object-multi": replace(FD, masking="ObjMaskMultiFill(0.6)"),
    "context-multi": replace(FD, masking="CtxMaskMultiFill(0.3)"),
    "random-multi": replace(FD, masking="RandMaskMultiFill(0.5)"),
    "object-no-fill": replace(FD, masking="ObjMaskNoFill(0.3)"),
    "context-no-fill": replace(FD, masking="CtxMaskNoFill(0.6)"),
    "random-no-fill": replace(FD, masking="RandMaskNoFill(0.75)"),
    "context-top-k": replace(FD, masking="CtxMaskSingleFill(top=5)"),
    "kd-object": replace(FD, method="ft-kd", masking="ObjMaskSingleFill(0.3)"),
    "kd-no-fill": replace(FD, method="ft-kd", masking="ObjMaskNoFill(0.3)"),
    "grad-cam": replace(FD, method="masked-object", cam="grad-cam"),
    "late-layers": replace(FD, method="masked-object", cam_start_layer=1),
    "bilinear": replace(FD, method="masked-context", upsample="bilinear"),
    "bilinear-top-k": replace(FD, masking="ObjMaskSingleFill(top=5)", upsample="bilinear"),
    "legrad": replace(FD, method="masked-object", cam="legrad", cam_start_layer=1, cam_contrast="runner-up"),
    "legrad-final": replace(FD, method="masked-topk", cam="legrad-final", cam_start_layer=1),
    "rollout": replace(FD, method="masked-object", cam="rollout"),
    "contrast": replace(FD, method="masked-object", cam_contrast="mean"),
}


def classifier(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(VisionTransformer(TINY), 4 * torch.randn(3, TINY.output_dim))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def pair() -> tuple[Classifier, Classifier]:
    """A student that has moved away from its teacher, so that no loss is zero."""
    teacher = classifier().frozen_copy()
    student = classifier()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, teacher


def batch(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, 12, 12, 3), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.randint(0, 3, (count,), generator=generator), torch.arange(count))


def draws_for(config: TrainConfig, data: Batch) -> MaskRandomness | None:
    return sample_step_randomness(build_strategy(config), data, TINY.patches, torch.Generator().manual_seed(5))


def written_out(
    student: Classifier, teacher: Classifier, config: TrainConfig, data: Batch, draws: MaskRandomness | None
) -> Tensor:
    """w_task * CE + w_distill * D as METHOD states it: separate forwards for the CAM, the task and the distillation."""
    images, strategy = data.images.permute(0, 3, 1, 2).double() / 255, build_strategy(config)
    clean = normalise(images, dtype=torch.float64)
    log_p = torch.log_softmax(student(clean).logits, 1)
    loss = -config.w_task * torch.stack([log_p[n, label] for n, label in enumerate(data.labels)]).mean()
    if config.resolved.distill == "none":
        return loss
    pixels, tokens = clean, {}
    if strategy is not None:
        assert draws is not None
        taps = Taps()
        logits = student(clean, taps=taps).logits
        cam = None
        start, contrast = config.cam_start_layer, config.cam_contrast
        if strategy.needs_cam and config.cam == "grad-cam":
            cam = grad_cam(logits, data.labels, taps, contrast=contrast)
        elif strategy.needs_cam and config.cam == "mm-cam":
            cam = mm_cam(logits, data.labels, taps, start_layer=start, contrast=contrast)
        elif strategy.needs_cam:  # tests/test_maps.py has their definitions
            options = {"start_layer": start, "contrast": contrast, "dtype": torch.float64}
            cam = relevance_of(student, data.images, data.labels, config.cam, **options)  # type: ignore[arg-type]
        cam = cam if data.relevance is None else data.relevance.double()
        shown = counterfactual(images, cam, strategy, draws, grid=TINY.grid)
        pixels = normalise(shown.images, dtype=torch.float64)
        if strategy.fill == "none":  # every query, every block: no key among the masked patches
            tokens = {"key_mask": shown.mask}
    ours, theirs = student(pixels, **tokens), teacher(pixels, **tokens)
    if config.resolved.distill == "fd":
        return loss + config.w_distill * ((ours.features - theirs.features) ** 2).sum() / ours.features.numel()
    T = config.kd_temperature
    p, q = torch.softmax(theirs.logits / T, 1), torch.softmax(ours.logits / T, 1)
    return loss + config.w_distill * T**2 * (p * (p.log() - q.log())).sum() / len(p)


def wrong_gradients(model: Classifier, expected: dict[str, Tensor], *, tolerance: float = 1e-12) -> dict[str, float]:
    """Names and errors, relative to the global norm, of the parameters whose `.grad` differs."""
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        errors[name] = ((grad - expected[name]).abs().max() / norm).item()
    return {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_plain_autograd(name: str) -> None:
    config, data, (student, teacher) = CONFIGS[name], batch(), pair()
    draws = draws_for(config, data)
    loss = written_out(student, teacher, config, data, draws)
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    losses = build_step(student, teacher, config)(data, draws)
    assert losses.total.item() == pytest.approx(loss.item(), rel=1e-12)
    assert losses.total == config.w_task * losses.task + config.w_distill * losses.distill
    assert (losses.distill > 0) == (config.resolved.distill != "none")
    assert not any(part.requires_grad for part in losses)
    assert wrong_gradients(student, expected) == {}


@pytest.mark.parametrize("name", ["masked-object", "masked-topk", "kd-object"])
def test_the_masked_images_matter(name: str) -> None:
    """A step that distilled on clean images would not pass the test above."""
    config, data, (student, teacher) = CONFIGS[name], batch(), pair()
    masked = build_step(student, teacher, config)(data, draws_for(config, data))
    clean = build_step(student, teacher, replace(config, masking="none"))(data, None)
    assert masked.task == clean.task
    assert abs(masked.distill - clean.distill) > 1e-3 * clean.distill


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_accumulate_the_gradients_of_the_whole_batch(name: str) -> None:
    config, data, (student, teacher) = CONFIGS[name], batch(4), pair()
    whole = draws_for(config, data)
    step = build_step(student, teacher, config)
    total = step(data, whole).total
    expected = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    parts = []
    for first in (0, 2):
        draws = whole and whole.part(first, 2, data.images)
        half = data.map(lambda tensor: tensor[first : first + 2])  # noqa: B023
        parts.append(step(half, draws, scale=0.5).total)
    assert sum(parts).item() / 2 == pytest.approx(total.item(), rel=1e-12)  # type: ignore[union-attr]
    assert wrong_gradients(student, expected) == {}


@pytest.mark.parametrize("name", ["ft-fd", "masked-object", "kd-no-fill"])
def test_the_teacher_gets_no_gradients_and_stays_as_it_is(name: str) -> None:
    config, data, (student, teacher) = CONFIGS[name], batch(), pair()
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    build_step(student, teacher, config)(data, draws_for(config, data))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())


def test_a_linear_probe_trains_the_head_alone() -> None:
    student, config = classifier(), TrainConfig(method="lp")
    TrainState.create(student, config, steps_per_epoch=1)
    build_step(student, None, config)(batch(), None)
    assert {n for n, p in student.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    start = classifier(dtype=torch.float32)
    trained = fine_tune(start, dataset(), None, replace(SHORT, method="lp")).last.state_dict()
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, trained[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "zeroshot"}, "method 'zeroshot' trains nothing"),
        ({"masking": "ObjMaskNoFill(top=17)"}, r"k: expected 1..16 patches on this model's grid, got 17"),
        ({"cam_start_layer": 3}, r"cam_start_layer: expected 0..2 for this model, got 3"),
        ({"method": "ft", "masking": "ObjMaskNoFill(0.3)"}, "distils nothing"),
        ({"masking": "ObjMask"}, "unknown masking strategy 'ObjMask'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_step(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_step(*pair(), replace(FD, **change))  # type: ignore[arg-type]


SHORT = TrainConfig(method="masked-object", epochs=2, batch_size=4, optim=OptimConfig(lr=1e-3))


def dataset(*, seed: int = 0) -> ArrayLoader:
    data = batch(12)
    return ArrayLoader(
        data.images, data.labels, ResumableDistributedSampler(len(data.images), batch_size=4, shuffle=True, seed=seed)
    )


def weights(config: TrainConfig, *, dtype: torch.dtype = torch.float32) -> Tensor:
    model = fine_tune(classifier(dtype=dtype), dataset(seed=config.seed), None, config).last
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("method", ["ft-fd", "masked-object", "masked-random", "masked-topk"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(method: str) -> None:
    config = replace(SHORT, method=method)
    first = weights(config)
    torch.manual_seed(123)  # the global generator must not matter
    assert torch.equal(first, weights(config))
    assert not torch.equal(first, weights(replace(config, seed=1)))


def test_accumulation_in_the_loop_gives_the_run_of_whole_batches() -> None:
    config = replace(SHORT, method="ft-fd")
    whole, parts = weights(config, dtype=torch.float64), weights(replace(config, accumulate=2), dtype=torch.float64)
    assert torch.allclose(whole, parts, rtol=0, atol=1e-11)  # Adam hides a wrong scale down to its eps


@pytest.mark.parametrize(("log_every", "most", "steps"), [(1, 1, 1), (1, 3, 3), (2, 3, 4), (100, 10, 6)])
def test_losses_that_are_not_finite_stop_the_run(log_every: int, most: int, steps: int) -> None:
    broken = classifier(dtype=torch.float32)
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    with pytest.raises(NonFiniteLoss, match=f"not finite in {steps} steps in a row, from step 1 on"):
        fine_tune(broken, dataset(), None, replace(SHORT, max_skipped=most), log_every=log_every)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("masking", ["ObjMaskSingleFill(0.3)", "CtxMaskNoFill(0.6)", "ObjMaskNoFill(top=50%)"])
def test_a_relevance_that_is_not_finite_reaches_the_loss(monkeypatch: pytest.MonkeyPatch, masking: str, value: float) -> None:
    def broken_rollout(taps: Taps, gradients: Sequence[Tensor]) -> Tensor:
        return cls_rollout(taps, gradients).index_fill(1, torch.tensor([2]), value)

    monkeypatch.setattr(maps_module, "cls_rollout", broken_rollout)
    config, data = replace(FD, masking=masking), batch()
    losses = build_step(*pair(), config)(data, draws_for(config, data))
    assert losses.task.isfinite()
    assert losses.total.isnan()
    config = replace(SHORT, masking=masking, max_skipped=1)
    with pytest.raises(NonFiniteLoss, match="in 1 steps in a row, from step 1 on"):
        fine_tune(classifier(dtype=torch.float32), dataset(), None, config, log_every=1)


def test_single_precision_follows_double_precision() -> None:
    config, data, (student, teacher) = CONFIGS["masked-object"], batch(), pair()
    draws = draws_for(config, data)
    double = build_step(student, teacher, config)(data, draws)
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    small = Classifier(VisionTransformer(TINY), torch.zeros(3, TINY.output_dim))
    small.load_state_dict(student.state_dict())
    single = build_step(small, teacher.float(), config)(data, draws)
    assert single.total.dtype == torch.float32
    assert single.total.item() == pytest.approx(double.total.item(), rel=3e-5)
    assert wrong_gradients(small, expected, tolerance=3e-5) == {}
    assert F.cross_entropy(small(normalise(data.images)).logits, data.labels).item() == pytest.approx(single.task.item())


IN_BF16 = {name: replace(CONFIGS[name], precision="bf16") for name in ("ft", "masked-object", "masked-topk", "kd-no-fill")}


def single_pair() -> tuple[Classifier, Classifier]:
    student, teacher = pair()
    return student.float(), teacher.float()


def gradients_in(student: Classifier) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", IN_BF16)
def test_gradients_at_bf16_weights_are_those_that_pass_through_their_cast(name: str) -> None:
    """To the bit, with gradients of both passes in one sum, in float32, and the master weights as they were."""
    config, data, (student, teacher) = IN_BF16[name], batch(), single_pair()
    draws, parameters = draws_for(config, data), dict(student.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    cast = step_module._autograd_forward(
        lambda patches, **options: functional_call(student, compute_weights(parameters, torch.bfloat16), patches, options),
        config,
    )
    body = step_module.step_body(TINY, config, torch.bfloat16)
    losses = body(cast, teacher.stored_in(torch.bfloat16), data, draws, 1.0)
    expected = gradients_in(student)
    student.zero_grad()
    again = build_step(student, teacher, config)(data, draws)
    assert torch.equal(torch.stack(again).nan_to_num(), torch.stack(losses).nan_to_num())
    assert {name: g.dtype for name, g in gradients_in(student).items()} == dict.fromkeys(parameters, torch.float32)
    assert wrong_gradients(student, expected, tolerance=0) == {}
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())


def test_steps_in_bf16_use_the_same_memory_and_forget_the_step_before() -> None:
    config, data, (student, teacher) = IN_BF16["masked-object"], batch(), single_pair()
    step, draws = build_step(student, teacher, config), draws_for(config, data)
    step(data, draws)
    once, addresses = gradients_in(student), {n: p.grad.data_ptr() for n, p in student.named_parameters() if p.grad is not None}
    step(data, draws)
    assert wrong_gradients(student, {name: 2 * g for name, g in once.items()}, tolerance=1e-6) == {}
    student.zero_grad(set_to_none=True)
    step(data, draws)
    assert wrong_gradients(student, once, tolerance=0) == {}
    cast = [name for name in addresses if not keeps_precision(name)]
    assert len(cast) > 20
    assert {n: student.get_parameter(n).grad.data_ptr() for n in cast} == {n: addresses[n] for n in cast}  # type: ignore[union-attr]


def test_steps_in_bf16_see_weights_that_moved() -> None:
    config, data, (student, teacher) = IN_BF16["masked-object"], batch(), single_pair()
    step, draws = build_step(student, teacher, config), draws_for(config, data)
    step(data, draws)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.25)
    student.zero_grad()
    losses, found = step(data, draws), gradients_in(student)
    student.zero_grad()
    assert build_step(student, teacher, config)(data, draws) == losses
    assert wrong_gradients(student, found, tolerance=0) == {}


def test_a_linear_probe_in_bf16_trains_the_head_alone() -> None:
    student, config = classifier(dtype=torch.float32), TrainConfig(method="lp", precision="bf16")
    TrainState.create(student, config, steps_per_epoch=1)
    build_step(student, None, config)(batch(), None)
    assert gradients_in(student).keys() == {"head.weight", "head.bias"}


def test_the_rollout_stays_float32_under_half_precision() -> None:
    data, student = batch(), classifier(dtype=torch.bfloat16)
    taps = Taps()
    cam = mm_cam(student(normalise(data.images, dtype=torch.bfloat16), taps=taps).logits, data.labels, taps)
    assert cam.dtype == torch.float32
    assert cam.isfinite().all()
    assert (cam > 0).any()

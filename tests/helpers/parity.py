"""Our code against tensors of the authors' code: `python -m tests.parity FILE.npz …`.

One line per array of a file: name, largest error, tolerance, verdict. Exit code 1 when an array disagrees or is not understood,
2 when a file cannot be read. Files `…-grads-a.npz` and `…-grads-b.npz` need their base file beside them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm, parameters_to_vector

from cammask_fast.cam import class_score, grad_cam, mm_cam
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.kernels.reference import normalise_relevance, patch_select
from cammask_fast.losses import feature_distillation, logit_distillation
from cammask_fast.masking import MaskRandomness, counterfactual, masked_input, parse_strategy, sample_mask_randomness
from cammask_fast.model.classifier import Classifier, Prediction
from cammask_fast.model.vit import Attention, Taps
from cammask_fast.optim import build_optimizer
from cammask_fast.step import build_step
from tests.helpers.parity_golden import (
    Array,
    Case,
    Check,
    Golden,
    Quantity,
    Unreadable,
    close,
    exact,
    judge,
    load_case,
    of_max,
    our_name,
    read_arrays,
    relative,
)

FEATURES, CAM, PROBE = 2e-5, 5e-5, 5e-6  # float32 tolerances, suggested by those who made the files
LOSS, LATER_LOSS, GRADIENT = 3e-5, 5e-5, 3e-5  # relative; later: after the first AdamW step
FLOAT64 = 1e-10
HISTORY = (
    ("loss", LOSS, LATER_LOSS),
    ("loss_task", LOSS, LATER_LOSS),
    ("loss_distill", LOSS, LATER_LOSS),
    ("grad_norm_before_clip", GRADIENT, GRADIENT),
)
"""What an AdamW run notes of every step, and its tolerances in float32 at the first step and later."""
ORDERS = 8
"""Orders of the same sums from which float32's own error is taken."""
FILLS = {
    "ObjMaskSingleFill": 0.3,
    "CtxMaskSingleFill": 0.5,
    "ObjMaskMultiFill": 0.6,
    "CtxMaskMultiFill": 0.3,
    "RandMaskSingleFill": 0.5,
    "RandMaskMultiFill": 0.5,
}
NO_FILLS = {"ObjMaskNoFill": 0.3, "CtxMaskNoFill": 0.6}
MODES = {
    "fd": TrainConfig(method="ft-fd"),
    "fd_image_mask": TrainConfig(method="ft-fd", masking="ObjMaskSingleFill(0.3)"),
    "fd_attn_mask": TrainConfig(method="ft-fd", masking="ObjMaskNoFill(0.3)"),
    "fd_mae_mask": TrainConfig(method="ft-fd", masking="RandMaskNoFill(0.75)"),
    "kd": TrainConfig(method="ft-kd"),
    "kd_image_mask": TrainConfig(method="ft-kd", masking="ObjMaskSingleFill(0.3)"),
}
Quantities = Iterator[tuple[str, Quantity]]


def relevance(case: Case) -> Tensor:
    taps = Taps()
    logits = case.student(case.pixels, taps=taps).logits
    return mm_cam(logits, case.labels, taps)


def generator(seed: Array) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def clean(case: Case) -> Quantities:
    with torch.no_grad():
        student, teacher = case.student(case.pixels), case.teacher(case.pixels)
    config = TrainConfig()
    yield "clean/features", close(student.features, FEATURES)
    yield "clean/logits", of_max(student.logits, FEATURES)
    yield "clean/teacher_features", close(teacher.features, FEATURES)
    yield "clean/teacher_logits", of_max(teacher.logits, FEATURES)
    yield "loss/ce_clean", relative(F.cross_entropy(student.logits, case.labels), LOSS)
    yield "loss/w_task", exact(config.w_task)
    yield "loss/w_distill", exact(config.w_distill)
    yield "loss/kd_temp", exact(config.kd_temperature)


def cams_and_masks(case: Case, golden: Golden) -> Quantities:
    taps = Taps()
    logits = case.student(case.pixels, taps=taps).logits
    maps = {"mmcam": mm_cam(logits, case.labels, taps), "gradcam": grad_cam(logits, case.labels, taps)}
    for name, cam in maps.items():
        yield f"cam/{name}", of_max(cam, CAM)
        yield f"cam/{name}_norm", close(normalise_relevance(cam), CAM)
    thresholds = golden["mask/thresholds"]
    for prefix, cam in (("", maps["mmcam"]), ("gradcam_", maps["gradcam"])):
        distances = [(normalise_relevance(cam).double() - threshold).abs().min() for threshold in thresholds]
        yield f"mask/{prefix}margin", close(torch.stack(distances), CAM)
        for threshold in thresholds:
            yield f"mask/{prefix}obj_{threshold:g}", exact(patch_select(cam, threshold=threshold).mask)
            if not prefix:
                yield f"mask/ctx_{threshold:g}", exact(patch_select(cam, context=True, threshold=threshold).mask)


def attention(case: Case) -> Quantities:
    """Probabilities and their gradients, recomputed as the relevance kernel does, against those that the authors stored."""
    taps = Taps()
    case.student(case.pixels, taps=taps)
    last = len(taps.keys) - 1
    width, attn = case.vit.width, case.student.get_submodule(f"visual.transformer.resblocks.{last}.attn")
    assert isinstance(attn, Attention)
    assert taps.last_ln_1 is not None
    full_query = F.linear(taps.last_ln_1, attn.in_proj_weight[:width], attn.in_proj_bias[:width])  # ours reads only its CLS row
    taps.queries[last] = full_query.unflatten(-1, (case.vit.heads, -1)).transpose(1, 2)
    stacked = [torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) for q, k in zip(taps.queries, taps.keys, strict=True)]
    probabilities = torch.stack(stacked, 1)  # (N, layers, A, L, L)
    yield "attn/img0", close(probabilities[0], FEATURES)
    entropy = -(probabilities.double() * probabilities.double().log()).sum(-1).mean((0, 2, 3))
    yield "attn/entropy_mean", close(entropy, FEATURES)
    taps = Taps()
    score = class_score(case.student(case.pixels, taps=taps).logits, case.labels)
    gradients = [g[0] @ v[0].mT for g, v in zip(torch.autograd.grad(score, taps.outputs), taps.values, strict=True)]
    gradients[last] = F.pad(gradients[last], (0, 0, 0, case.vit.patches))  # only the CLS row is not zero
    yield "attn_grad/img0", of_max(torch.stack(gradients), CAM)


def recorded_draws(golden: Golden, prefix: str, case: Case) -> MaskRandomness:
    """The draws that a golden file holds for one fill."""
    count, patches = len(case.labels), case.vit.patches
    uniform = golden.tensor(f"{prefix}/p").view(count, patches) if "Rand" in prefix else None
    donors = golden.tensor(f"{prefix}/idx" if "Single" in prefix else f"{prefix}/donor")
    return MaskRandomness(uniform, donors if "Single" in prefix else donors.view(count, patches))


def fill(case: Case, golden: Golden, kind: str, cam: Tensor) -> Quantities:
    prefix, strategy = f"fill/{kind}", parse_strategy(f"{kind}({FILLS[kind]})")
    count, grid = len(case.labels), case.vit.grid
    drawn = sample_mask_randomness(strategy, count=count, patches=grid**2, generator=generator(golden[f"{prefix}/seed"]))
    assert drawn.donors is not None
    if drawn.uniform is not None:
        yield f"{prefix}/p", exact(drawn.uniform.view(count, 1, grid, grid))
    if strategy.fill == "single":
        yield f"{prefix}/idx", exact(drawn.donors)
        yield f"{prefix}/donor", exact(drawn.donors.view(count, 1, 1).expand(count, grid, grid))
    else:
        shift = (drawn.donors - torch.arange(count)[:, None]) % count
        yield f"{prefix}/idx_shift", exact(shift.view(count, 1, grid, grid))
        yield f"{prefix}/donor", exact(drawn.donors.view(count, grid, grid))
    draws = recorded_draws(golden, prefix, case)
    filled = counterfactual(case.images, cam, strategy, draws, grid=grid)
    yield f"{prefix}/mask", exact(filled.mask.view(count, grid, grid))
    yield f"{prefix}/images_u8", exact(filled.images.permute(0, 3, 1, 2))
    with torch.no_grad():
        pixels = masked_input(case.images, cam, strategy, draws, grid=grid).pixels
        assert pixels is not None
        student, teacher = case.student(pixels), case.teacher(pixels)
    yield f"{prefix}/features", close(student.features, FEATURES)
    yield f"{prefix}/teacher_features", close(teacher.features, FEATURES)
    yield f"{prefix}/loss_fd", relative(feature_distillation(student.features, teacher.features), LOSS)
    yield f"{prefix}/loss_kd", relative(logit_distillation(student.logits, teacher.logits, temperature=10.0), LOSS)


def kept_tokens(golden: Golden) -> Tensor:
    """The recorded tokens of random no-fill ascending as ours are: (N, n_keep + 1)."""
    return golden.tensor("nofill/RandMaskNoFill/token_idx").T.sort(1).values


def no_fill(case: Case, golden: Golden, kind: str, cam: Tensor) -> Quantities:
    prefix, count, patches = f"nofill/{kind}", len(case.labels), case.vit.patches
    if kind in NO_FILLS:
        strategy, draws = parse_strategy(f"{kind}({NO_FILLS[kind]})"), MaskRandomness()
    else:
        strategy, draws = parse_strategy(f"{kind}(0.75)"), MaskRandomness(kept_tokens=kept_tokens(golden))
        official, keep = generator(golden[f"{prefix}/seed"]), strategy.keep_count(patches)
        tokens = [F.pad(torch.randperm(patches, generator=official)[:keep] + 1, (1, 0)) for _ in range(count)]
        yield f"{prefix}/token_idx", exact(torch.stack(tokens, 1))
    masked = masked_input(case.images, cam, strategy, draws, grid=case.vit.grid)
    if strategy.needs_cam:
        yield f"{prefix}/mask", exact(counterfactual(case.images, cam, strategy, draws, grid=case.vit.grid).mask)
    with torch.no_grad():
        student = case.student(case.pixels, kept_tokens=masked.kept_tokens, key_mask=masked.key_mask)
        teacher = case.teacher(case.pixels, kept_tokens=masked.kept_tokens, key_mask=masked.key_mask)
    yield f"{prefix}/features", close(student.features, FEATURES)
    yield f"{prefix}/logits", of_max(student.logits, FEATURES)
    yield f"{prefix}/teacher_features", close(teacher.features, FEATURES)
    yield f"{prefix}/loss_fd", relative(feature_distillation(student.features, teacher.features), LOSS)


def parameter_names(golden: Golden) -> list[str]:
    return list(golden["grad/param_names"].tolist())


def step(
    case: Case, golden: Golden, mode: str, *, prefix: str = "", loss: float = LOSS, gradient: float = GRADIENT
) -> Quantities:
    """One training step; with the prefix `f64/` only what the files hold in float64."""
    config, names = MODES[mode], parameter_names(golden)
    if mode.endswith("image_mask"):
        draws = recorded_draws(golden, "fill/ObjMaskSingleFill", case)
    else:
        draws = MaskRandomness(kept_tokens=kept_tokens(golden) if mode == "fd_mae_mask" else None)
    case.student.zero_grad()
    losses = build_step(case.student, case.teacher, config)(batch_of(case), draws)
    parameters = dict(case.student.named_parameters())
    gradients = [gradient_of(parameters[our_name(name)]) for name in names]
    total = get_total_norm(gradients)
    yield f"{prefix}step/{mode}/loss", relative(losses.total, loss)
    yield f"{prefix}step/{mode}/loss_task", relative(losses.task, loss)
    yield f"{prefix}step/{mode}/loss_distill", relative(losses.distill, loss)
    norms = torch.stack([g.norm() for g in gradients])
    yield f"{prefix}step/{mode}/param_grad_norms", close(norms, gradient, scale=total)
    yield f"{prefix}step/{mode}/grad_norm", relative(total, gradient)
    if prefix:
        return
    for name, value in zip(names, gradients, strict=True):
        yield f"grad/{mode}/{name}", close(value.clone(), gradient, scale=total)
    clip_grad_norm_(case.student.parameters(), config.optim.clip_norm)
    yield f"step/{mode}/grad_norm_clipped", relative(get_total_norm(gradients), gradient)


def reordered(model: Classifier, random: torch.Generator) -> None:
    """Put the channels of the residual stream and the hidden units of each MLP in another order, in place: in exact arithmetic
    the same function and the same training, in float32 the same sums in another order."""
    vit = model.visual
    hidden = len(vit.get_parameter("transformer.resblocks.0.mlp.c_fc.bias"))
    stream, units = (torch.randperm(size, generator=random) for size in (vit.config.width, hidden))
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if name.endswith(("in_proj_weight", "c_fc.weight", "positional_embedding")):
                p.copy_(p[:, stream])
            elif not name.endswith(("in_proj_bias", "c_fc.bias")):
                p.copy_(p[stream])
            if ".c_fc." in name:
                p.copy_(p[units])
            elif name.endswith("c_proj.weight"):
                p.copy_(p[:, units])


def batch_of(case: Case) -> Batch:
    return Batch(case.images, case.labels, torch.arange(len(case.labels)))


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class AdamWRun(NamedTuple):
    """Three optimiser steps. history: (4, steps), loss, its two parts, gradient norm. masks, donors: of each step. before: all
    parameters at the start, flattened, in the order of the files. after: the clean batch's prediction at the end."""

    history: Tensor
    masks: Tensor
    donors: Tensor
    before: Tensor
    parameters: dict[str, Tensor]
    after: Prediction


def run_adamw(golden: Golden, dtype: torch.dtype, random: torch.Generator | None = None) -> AdamWRun:
    """Mode fd_image_mask on one batch at a constant learning rate. random: take all sums in another order."""
    case = load_case(golden, dtype)
    if random is not None:
        reordered(case.student, random)
        reordered(case.teacher, random)
    lr, beta1, beta2, eps, decay, clip = golden["adamw/hparams"].tolist()
    config = MODES["fd_image_mask"]
    optim = OptimConfig(lr=lr, beta2=beta2, eps=eps, weight_decay=decay, clip_norm=clip)
    named = dict(case.student.named_parameters())
    parameters = {name: named[our_name(name)] for name in parameter_names(golden)}
    optimizer = build_optimizer(parameters.values(), optim)
    if optimizer.defaults["betas"] != (beta1, beta2):
        raise Unreadable(f"no golden file: AdamW's betas are {beta1} and {beta2}, ours {optimizer.defaults['betas']}")
    take_step = build_step(case.student, case.teacher, config)
    strategy = parse_strategy(config.resolved.masking)
    before = parameters_to_vector(parameters.values()).detach().clone()
    history, masks, donors = [], [], []
    for seed, recorded in zip(golden["adamw/seeds"], golden.tensor("adamw/idx"), strict=True):
        drawn = sample_mask_randomness(
            strategy, count=len(recorded), patches=case.vit.patches, generator=generator(seed)
        ).donors
        assert drawn is not None
        donors.append(drawn)
        masks.append(patch_select(relevance(case), threshold=strategy.threshold).mask)
        optimizer.zero_grad(set_to_none=True)
        losses = take_step(batch_of(case), MaskRandomness(donors=recorded))
        history.append([*losses[:3], clip_grad_norm_(parameters.values(), optim.clip_norm)])
        optimizer.step()
    with torch.no_grad():
        after = case.student(case.pixels)
    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    steps = torch.tensor(history, dtype=before.dtype).T
    return AdamWRun(steps, torch.stack(masks), torch.stack(donors), before, detached, after)


def adamw(golden: Golden) -> Quantities:
    """Adam turns the rounding noise of zero gradients into steps of up to lr. The key biases, all of whose gradients are zero,
    are therefore compared only in norms, where such steps are allowed for. What depends on all parameters is compared within
    the suggested tolerance plus twice float32's own error: the largest distance of our float32 runs, with their sums in several
    orders, from our float64 run, which agrees with theirs."""
    random = torch.Generator().manual_seed(0)
    singles = [run_adamw(golden, torch.float32, random if order else None) for order in range(ORDERS)]
    single, double = singles[0], run_adamw(golden, torch.float64)
    width = int(golden.settings["width"])
    kbias = torch.cat([key_biases(name, p, width).flatten() for name, p in single.parameters.items()])
    probe = golden.tensor("adamw/probe_idx")
    for row, (name, first, later) in enumerate(HISTORY):
        steps = torch.stack([run.history[row] for run in singles])
        tolerance = torch.tensor([first, later, later])
        yield f"adamw/{name}", widened(steps, tolerance, double.history[row], double.history[row])
        yield f"f64/adamw/{name}", relative(double.history[row], FLOAT64)
    for prefix, run, norm, element in (("", single, LOSS, PROBE), ("f64/", double, FLOAT64, FLOAT64)):
        vector = parameters_to_vector(run.parameters.values())
        yield f"{prefix}adamw/probe", close(vector[probe], element)
        yield f"{prefix}adamw/norm_all", relative(vector.norm(), norm)
        yield f"{prefix}adamw/norm_all_no_kbias", relative(vector[~kbias].norm(), norm)
    yield "adamw/idx", exact(single.donors)
    yield "adamw/masks", exact(single.masks)
    yield "adamw/probe_before", exact(single.before[probe])
    lr = golden["adamw/hparams"][0]
    sizes = np.array([float(p.norm()) for p in single.parameters.values()], dtype=np.float32)
    noise = [3 * lr * float(key_biases(name, p, width).sum()) ** 0.5 for name, p in single.parameters.items()]
    yield "adamw/param_norms", close(sizes, LATER_LOSS, scale=np.maximum(sizes, np.array(noise) / LATER_LOSS))
    features, logits = (torch.stack([run.after[part] for run in singles]) for part in (0, 1))
    tolerance = torch.tensor(FEATURES)
    yield "adamw/features_after", widened(features, tolerance, double.after.features, torch.ones(()))
    yield "adamw/logits_after", widened(logits, tolerance, double.after.logits, double.after.logits.abs().amax(1, keepdim=True))


def widened(singles: Tensor, tolerance: Tensor, double: Tensor, scale: Tensor) -> Quantity:
    """The first of the float32 runs (R, …), relative to `scale`, within the tolerance plus twice the largest error of all; the
    steps of a history have a tolerance and an error each."""
    errors = (singles - double).abs() / scale
    largest = errors.amax(0) if tolerance.ndim else errors.max()
    allowed = tolerance + 2 * largest
    return close(singles[0], float(tolerance.min()), scale=scale * allowed / tolerance.min())


def key_biases(name: str, parameter: Tensor, width: int) -> Tensor:
    """True at the elements of a parameter whose gradient is zero in exact arithmetic: softmax ignores a key bias."""
    mask = torch.zeros_like(parameter, dtype=torch.bool)
    if name.endswith("in_proj_bias"):
        mask[width : 2 * width] = True
    return mask


def in_float64(case: Case, golden: Golden) -> Quantities:
    taps = Taps()
    features, logits = case.student(case.pixels, taps=taps)
    yield "f64/features", close(features, FLOAT64)
    yield "f64/logits", of_max(logits, FLOAT64)
    yield "f64/cam_mmcam", of_max(mm_cam(logits, case.labels, taps), FLOAT64)
    yield "f64/cam_gradcam", of_max(grad_cam(logits, case.labels, taps), FLOAT64)
    for mode in MODES:
        yield from step(case, golden, mode, prefix="f64/", loss=FLOAT64, gradient=FLOAT64)


def compute(arrays: Mapping[str, Array]) -> tuple[dict[str, Quantity], set[str]]:
    """Everything that golden files hold, by our code from a base file's inputs; and the names of the inputs it read."""
    golden = Golden(arrays)
    quantities: dict[str, Quantity] = {}
    case = load_case(golden, torch.float32)
    cam = relevance(case)
    quantities.update(clean(case))
    quantities.update(cams_and_masks(case, golden))
    quantities.update(attention(case))
    for kind in FILLS:
        quantities.update(fill(case, golden, kind, cam))
    for kind in (*NO_FILLS, "RandMaskNoFill"):
        quantities.update(no_fill(case, golden, kind, cam))
    for mode in MODES:
        quantities.update(step(case, golden, mode))
    double = load_case(golden, torch.float64)
    quantities.update(in_float64(double, golden))
    quantities.update(adamw(golden))
    return quantities, golden.inputs


def check(arrays: Mapping[str, Array], quantities: Mapping[str, Quantity], inputs: set[str]) -> list[Check]:
    """Judge a base file, or a file of gradients, against `compute` of the base file."""
    modes = {name.split("/")[1] for name in arrays if name.startswith("grad/") and name.count("/") == 2}
    is_base = "images_u8" in arrays
    expected = {
        name: quantity
        for name, quantity in quantities.items()
        if (name.split("/")[1] in modes if name.startswith("grad/") else is_base)
    }
    return list(judge(arrays, expected, inputs))


def main(paths: list[str]) -> int:
    torch.set_num_threads(1)
    failures = 0
    try:
        for path in map(Path, paths):
            arrays = read_arrays(path)
            base = path.with_name(re.sub(r"-grads-[a-z]\.npz$", ".npz", path.name))
            checks = check(arrays, *compute(arrays if base == path else read_arrays(base)))
            failed = [c for c in checks if not c.passed]
            print(f"{path}", *checks, sep="\n")
            print(f"{path.name}: {len(checks)} arrays, {len(failed)} failed", *(f"  {c}" for c in failed), sep="\n")
            failures += len(failed)
    except Unreadable as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    if not paths:
        print("usage: python -m tests.parity FILE.npz …", file=sys.stderr)
        return 2
    return 1 if failures else 0

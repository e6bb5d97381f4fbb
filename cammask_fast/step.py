"""One training step of every method: losses, gradients and the update, with the least arithmetic the method allows.

The step is written once, over `StudentForward`: a forward of the student that can be differentiated at its taps and at its
weights. Eagerly a pass is autograd's graph; in the compiled step it is `torch.func.vjp`, which traces into one flat graph. One
clean forward serves the CAM and the task loss; the CAM's pullback computes no weight gradients; the clean graph is gone before
the masked forward begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, vjp

from cammask_fast import distributed
from cammask_fast.cam import map_of, own_layer_gradients, score_weights
from cammask_fast.config import TrainConfig, check_map
from cammask_fast.data.types import Batch
from cammask_fast.distributed.overlap import overlap_options
from cammask_fast.inductor_options import inductor_options
from cammask_fast.kernels.normalise import normalise
from cammask_fast.losses import feature_distillation, logit_distillation
from cammask_fast.masking import (
    MaskedInput,
    MaskRandomness,
    Strategy,
    entropy,
    mask_share,
    masked_input,
    parse_strategy,
    sample_mask_randomness,
)
from cammask_fast.masking.kept import check_kept, keeps_maps
from cammask_fast.model.classifier import Classifier, ComputeCopy, Prediction, compute_weights, keeps_precision
from cammask_fast.model.vit import Taps, ViTConfig
from cammask_fast.optim import FlatAdamW, clipped_step
from cammask_fast.precision import compute_dtype
from cammask_fast.runtime.notices import warn
from cammask_fast.state import TrainState


class Losses(NamedTuple):
    """Scalars on the device, detached.

    total: w_task * task + w_distill * distill. mask_share: share of the patches that were masked. cam_entropy: entropy of the
    relevance over the patches, mean over the batch, 1 for an even map, 0 for a single patch; NaN where the method has no map.
    """

    total: Tensor
    task: Tensor
    distill: Tensor
    mask_share: Tensor
    cam_entropy: Tensor

    @classmethod
    def of(cls, total: Tensor, task: Tensor, distill: Tensor, masked: Tensor | None = None) -> Losses:
        """The losses of a step that computes no map.

        Args:
            total: w_task * task + w_distill * distill, scalar.
            task: cross-entropy, scalar.
            distill: distillation loss, scalar.
            masked: share of masked patches, scalar; None is 0.

        Returns:
            The same values detached, in the dtype of `task`; cam_entropy is NaN.
        """
        total, task, distill = total.detach(), task.detach(), distill.detach()
        share = torch.zeros_like(task) if masked is None else masked.to(task.dtype)
        return cls(total, task, distill, share, torch.full_like(task, torch.nan))


class Step(Protocol):
    """Adds the gradients of one micro-batch, multiplied by `scale` (1 / number of micro-batches), to the student's `.grad`."""

    def __call__(self, batch: Batch, draws: MaskRandomness | None, *, scale: float = 1.0) -> Losses: ...


class TrainStep(Protocol):
    """One optimiser step over micro-batches and their random numbers.

    It computes the gradients, sums them over the processes, clips, updates, advances the schedule and adds to
    `TrainState.tally`. Returns the mean losses of this process.
    """

    def __call__(self, parts: Sequence[tuple[Batch, MaskRandomness | None]]) -> Losses: ...


class Cotangents(NamedTuple):
    """Gradients of a loss at a prediction, (N, E) and (N, K); None where the loss does not read it."""

    features: Tensor | None = None
    logits: Tensor | None = None


class StudentForward(NamedTuple):
    """One forward of the student, differentiable at its taps and at its weights.

    tap_gradients: maps a cotangent (N, K) of the score at the logits to the gradients that the map reads, without any weight
    gradient.
    pull_back: maps cotangents to weight gradients and adds them to those of the step; the last call of a pass.
    """

    prediction: Prediction
    taps: Taps | None
    tap_gradients: Callable[[Tensor], Iterable[Tensor]]
    pull_back: Callable[[Cotangents], None]


class Forward(Protocol):
    """Runs the student on normalised patches (N, P, 3 * p * p); with `tapped` the taps of the CAM are differentiable."""

    def __call__(self, patches: Tensor, masked: MaskedInput | None = None, *, tapped: bool = False) -> StudentForward: ...


WITHOUT_GRADIENTS = (
    "the student has no gradients: call the step outside torch.no_grad() and torch.inference_mode(), with parameters that "
    "require gradients"
)

Teacher = Callable[..., Prediction]
LossAndBackward = Callable[[Forward, Teacher | None, Batch, MaskRandomness | None, float], Losses]


def build_strategy(config: TrainConfig) -> Strategy | None:
    """The masking strategy of a run, or None for clean images. Raises ValueError on settings that do not fit it."""
    masking = config.resolved.masking
    strategy = None if masking == "none" else parse_strategy(masking, upsample=config.upsample)
    check_kept(config, strategy)
    return strategy


def build_step(student: Classifier, teacher: Classifier | None, config: TrainConfig) -> Step:
    """The gradients of a method, computed eagerly.

    Args:
        student: its gradients are added to `.grad`.
        teacher: the frozen zero-shot classifier; needed where the method distils. Stored once in the compute dtype.
        config: settings of the method.

    Returns:
        A function of a batch, its random numbers and a scale.

    Raises:
        ValueError: for a method that trains nothing, a top-k or a `cam_start_layer` beyond the model.
    """
    dtype = compute_dtype(config.precision, student.head.weight)
    body, stored = step_body(student.visual.config, config, dtype), teacher and teacher.stored_in(dtype)
    forward = eager_forward(student, config, dtype)

    def step(batch: Batch, draws: MaskRandomness | None, *, scale: float = 1.0) -> Losses:
        return body(forward(), stored, batch, draws, scale)

    return step


def build_train_step(
    state: TrainState,
    teacher: Classifier | None,
    config: TrainConfig,
    *,
    processes: int = 1,
    backend: Callable[..., Any] | str = "inductor",
) -> TrainStep:
    """The whole optimiser step of `state`: eager over torch's AdamW, one compiled graph over `FlatAdamW`.

    The compiled step takes the batch, its random numbers and the optimiser's tensors, and changes the latter in place. Nothing
    leaves the device, and only another number of images compiles another graph. With several micro-batches, the gradients of
    one are one graph and the update is another. A step whose loss or gradient is not finite changes only the tally and the
    schedule.

    Args:
        state: student, optimiser, schedule and step statistics.
        teacher: the frozen zero-shot classifier; needed where the method distils.
        config: settings of the method; `compile` is the mode of torch.compile.
        processes: number of processes that share a batch; their gradients are averaged.
        backend: of torch.compile, for tests.

    Returns:
        A function of the micro-batches and their random numbers.

    Raises:
        ValueError: for settings that cannot work, see `build_step`.
    """
    optimizer = state.optimizer
    if isinstance(optimizer, FlatAdamW):
        return _compiled_train_step(state, optimizer, teacher, config, processes, backend=backend)
    gradients, schedule = build_step(state.student, teacher, config), state.schedule
    assert schedule is not None
    trained = [p for p in state.student.parameters() if p.requires_grad]

    def train_step(parts: Sequence[tuple[Batch, MaskRandomness | None]]) -> Losses:
        optimizer.zero_grad(set_to_none=True)
        losses = _mean([gradients(batch, draws, scale=1 / (len(parts) * processes)) for batch, draws in parts])
        loss = losses.total
        if processes > 1:
            summed, loss = distributed.sum_gradients([_gradient(p) for p in trained], loss / processes)
            for parameter, gradient in zip(trained, summed, strict=True):
                parameter.grad = gradient
        clipped = clipped_step(optimizer, trained, loss, clip_norm=config.optim.clip_norm)
        schedule.step()
        state.update(losses._replace(total=loss), clipped)
        return losses

    return train_step


def compiled_or_eager_step(
    state: TrainState,
    teacher: Classifier | None,
    config: TrainConfig,
    *,
    steps_per_epoch: int,
    processes: int = 1,
    backend: Callable[..., Any] | str = "inductor",
) -> TrainStep:
    """`build_train_step`, and what becomes of a run whose step cannot be compiled.

    With `compile` auto the run goes on eagerly, which one warning says with the reason; with a mode that was asked for it ends.
    One process finds out in its first step, before anything has changed; several processes compile something small before, as
    all must go the same way.

    Args:
        state: as for `build_train_step`; one for the compiled step becomes one for the eager step.
        teacher: as for `build_train_step`.
        config: as for `build_train_step`.
        steps_per_epoch: of the schedule.
        processes: as for `build_train_step`.
        backend: as for `build_train_step`.

    Returns:
        A function of the micro-batches and their random numbers.

    Raises:
        ValueError: as `build_train_step`, at once; and in the first step, when a mode that was asked for cannot be compiled.
    """
    step = build_train_step(state, teacher, config, processes=processes, backend=backend)
    if not isinstance(state.optimizer, FlatAdamW):
        return step
    from torch._dynamo.exc import TorchDynamoException  # takes a second: only where something is compiled

    may_fall_back, first = config.compile == "auto", True

    def eager_instead(reason: str) -> TrainStep:
        warn(f"the step cannot be compiled and runs eagerly, which is slower ({reason}); --compile off chooses that")
        state.make_eager(config, steps_per_epoch=steps_per_epoch)
        return build_train_step(state, teacher, config, processes=processes)

    if may_fall_back and processes > 1:
        faults = [fault for fault in distributed.all_gather_object(compiler_fault(state.tally.device, backend)) if fault]
        if faults:
            return eager_instead(faults[0])
        may_fall_back = False

    def train_step(parts: Sequence[tuple[Batch, MaskRandomness | None]]) -> Losses:
        nonlocal step, first
        if not first:
            return step(parts)
        try:
            losses = step(parts)
        except TorchDynamoException as error:
            if not may_fall_back:
                raise ValueError(
                    f"the step cannot be compiled ({compiler_reason(error)}): use --compile off, or mend the compiler"
                ) from None
            step = eager_instead(compiler_reason(error))
            losses = step(parts)
        first = False
        return losses

    return train_step


def compiler_fault(device: torch.device, backend: Callable[..., Any] | str = "inductor") -> str | None:
    """Why torch.compile does not work on a device, in one line; None where it does, which a small function shows."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # a broken installation raises anything
        return compiler_reason(error)
    return None


def compiler_reason(error: BaseException) -> str:
    """The line of a compiler's error that says most."""
    text = str(error).split("Set TORCHDYNAMO_VERBOSE=1")[0]
    if "InvalidCxxCompiler" in text:
        return "no working C++ compiler; Debian: apt-get install g++"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("backend=")]
    return lines[0] if lines else type(error).__name__


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _compiled_train_step(
    state: TrainState,
    optimizer: FlatAdamW,
    teacher: Classifier | None,
    config: TrainConfig,
    processes: int,
    *,
    backend: Callable[..., Any] | str,
) -> TrainStep:
    student = state.student
    dtype = compute_dtype(config.precision, student.head.weight)
    body, stored = step_body(student.visual.config, config, dtype), teacher and teacher.stored_in(dtype)
    frozen = compute_weights({n: p for n, p in student.named_parameters() if not p.requires_grad}, dtype)

    def gradients_and_losses(batch: Batch, draws: MaskRandomness | None, scale: float) -> tuple[list[Tensor], Losses]:
        found: list[dict[str, Tensor]] = []
        weights, cast = optimizer.weights(), optimizer.parts(optimizer.flat.to(dtype))  # one cast serves all passes
        trained = {name: weight if keeps_precision(name) else cast[name] for name, weight in weights.items()}
        forward = _functional_forward(student, trained, frozen, config, dtype, found)
        losses = body(forward, stored, batch, draws, scale)
        summed, *others = [[pulled[name].flatten().to(w.dtype) for name, w in weights.items()] for pulled in found]
        for other in others:  # one kernel for all parameters, unless every bucket of them travels as soon as it is there
            one_by_one = [a + b for a, b in zip(summed, other, strict=True)]
            summed = one_by_one if processes > 1 else list(torch._foreach_add(summed, other))
        return summed, losses

    def apply(gradients: Sequence[Tensor], losses: Losses) -> None:
        loss = losses.total
        if processes > 1:
            gradients, loss = distributed.sum_gradients(gradients, loss / processes)
        clipped = optimizer.update(torch.cat([g.flatten() for g in gradients]), loss)
        state.update(losses._replace(total=loss), clipped)

    def losses_of_update(batch: Batch, draws: MaskRandomness | None) -> Losses:
        found, losses = gradients_and_losses(batch, draws, 1 / processes)
        apply(found, losses)
        return losses

    def flat_gradient_and_losses(batch: Batch, draws: MaskRandomness | None, scale: float) -> tuple[Tensor, Losses]:
        found, losses = gradients_and_losses(batch, draws, scale)
        return torch.cat([g.flatten() for g in found]), losses

    def apply_flat(gradient: Tensor, losses: Losses) -> None:
        apply(list(optimizer.parts(gradient).values()), losses)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        mode = "default" if config.compile in ("auto", "off") else config.compile
        kwargs: dict[str, Any] = {"options": inductor_options(mode)} if backend == "inductor" else {}
        if processes > 1 and backend == "inductor":  # gradients travel while the backward pass goes on
            kwargs["options"] |= overlap_options()
        return torch.compile(function, fullgraph=True, backend=backend, **kwargs)

    moments = (optimizer.exp_avg, optimizer.exp_avg_sq)
    tensors = (optimizer.flat, *moments, optimizer.step, optimizer.position, optimizer.rates, state.tally, state.sums)
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)  # a CUDA graph may change them in place and copies none of them
    distributed.watch_compiler()
    update_graph, gradient_graph, apply_graph = (
        compiled(losses_of_update),
        compiled(flat_gradient_and_losses),
        compiled(apply_flat),
    )

    @torch.no_grad()
    def train_step(parts: Sequence[tuple[Batch, MaskRandomness | None]]) -> Losses:
        if len(parts) == 1:
            return Losses(*update_graph(*parts[0]))
        total, losses = torch.zeros_like(optimizer.flat), []
        for batch, draws in parts:
            gradient, loss = gradient_graph(batch, draws, 1 / (len(parts) * processes))
            total.add_(gradient)
            losses.append(Losses(*(scalar.clone() for scalar in loss)))  # a CUDA graph writes its results to the same memory
        mean = _mean(losses)
        apply_graph(total, mean)
        return mean

    return train_step


def _mean(losses: Sequence[Losses]) -> Losses:
    return Losses(*(torch.stack(part).mean() for part in zip(*losses, strict=True))) if len(losses) > 1 else losses[0]


def step_body(vit: ViTConfig, config: TrainConfig, dtype: torch.dtype) -> LossAndBackward:
    """The losses and backward passes of a method, over any `Forward`.

    In order: clean forward, CAM, weight gradients of the task loss, masked input, teacher, masked forward, weight gradients of
    the distillation loss.

    Args:
        vit: shape of the image tower.
        config: settings of the method.
        dtype: of the normalised pixels.

    Returns:
        A function of a forward, the teacher, a batch, its random numbers and a scale.

    Raises:
        ValueError: for a method that trains nothing, a top-k or a `cam_start_layer` beyond the model.
    """
    method, strategy = config.resolved, build_strategy(config)
    if method.trained == "none":
        raise ValueError(f"method {config.method!r} trains nothing; use `cammask evaluate` or `cammask zeroshot`")
    if strategy is not None and strategy.threshold is None:
        strategy.k(vit.patches)
    check_map(config.cam, start_layer=config.cam_start_layer, contrast=config.cam_contrast, layers=vit.layers)
    layout: dict[str, Any] = {"dtype": dtype, "layout": "patches"}
    by_student = strategy is not None and strategy.needs_cam and not keeps_maps(config)

    def task_loss_and_cotangents(prediction: Prediction, labels: Tensor, weight: float) -> tuple[Tensor, Cotangents]:
        gradient, loss = grad_and_value(F.cross_entropy)(prediction.logits, labels)
        return loss, Cotangents(logits=weight * gradient)

    @torch.no_grad()
    def teachers(teacher: Teacher, batch: Batch, seen: Tensor, masked: MaskedInput | None = None) -> Tensor:
        """Its features (N, E) or logits (N, K), whichever is distilled."""
        if config.teacher_outputs == "kept":
            if batch.teacher_outputs is None:
                raise ValueError("the batch carries no outputs of the teacher: let ImageMemory add them, as fine_tune does")
            return batch.teacher_outputs.float()
        tokens = {} if masked is None else {"kept_tokens": masked.kept_tokens, "key_mask": masked.key_mask}
        theirs: Prediction = teacher(seen, **tokens)
        return theirs.features if method.distill == "fd" else theirs.logits

    def distillation_and_cotangents(ours: Prediction, theirs: Tensor, weight: float) -> tuple[Tensor, Cotangents]:
        if method.distill == "fd":
            gradient, loss = grad_and_value(feature_distillation)(ours.features, theirs)
            return loss, Cotangents(features=weight * gradient)
        distance = partial(logit_distillation, temperature=config.kd_temperature)
        gradient, loss = grad_and_value(distance)(ours.logits, theirs)
        return loss, Cotangents(logits=weight * gradient)

    def relevance_map(clean: StudentForward, labels: Tensor) -> Tensor:
        assert clean.taps is not None
        score = score_weights(clean.prediction.logits, labels, config.cam_contrast)  # summed over the batch
        return map_of(config.cam, clean.taps, clean.tap_gradients(score), start_layer=config.cam_start_layer)

    def kept_map(batch: Batch) -> Tensor:
        if batch.relevance is None:
            raise ValueError("the batch carries no relevance, and the run keeps it: let ImageMemory add it, as fine_tune does")
        return batch.relevance.float()

    def losses_and_backward(
        forward: Forward, teacher: Teacher | None, batch: Batch, draws: MaskRandomness | None, scale: float
    ) -> Losses:
        patches = normalise(batch.images, patch_size=vit.patch_size, **layout)
        clean = forward(patches, tapped=by_student)
        task, cotangents = task_loss_and_cotangents(clean.prediction, batch.labels, config.w_task * scale)
        if method.distill == "none":
            clean.pull_back(cotangents)
            return _losses(config, task, torch.zeros_like(task))
        assert teacher is not None
        weight = config.w_distill * scale
        if strategy is None:
            distill, more = distillation_and_cotangents(clean.prediction, teachers(teacher, batch, patches), weight)
            clean.pull_back(_add(cotangents, more))
            return _losses(config, task, distill)
        assert draws is not None
        cam = relevance_map(clean, batch.labels) if by_student else kept_map(batch) if strategy.needs_cam else None
        clean.pull_back(cotangents)
        del clean
        masked = masked_input(batch.images, cam, strategy, draws, grid=vit.grid, **layout)
        seen = patches if masked.pixels is None else masked.pixels
        theirs = teachers(teacher, batch, seen, masked)
        ours = forward(seen, masked)
        distill, cotangents = distillation_and_cotangents(ours.prediction, theirs, weight)
        if cam is not None:  # NaN compares as not masked: let it reach the loss instead of passing silently
            distill = distill.masked_fill(~cam.isfinite().all(), torch.nan)
        ours.pull_back(cotangents)
        losses = _losses(config, task, distill, mask_share(cam, strategy, draws, patches=vit.patches))
        return losses if cam is None else losses._replace(cam_entropy=entropy(cam).to(task.dtype))

    return losses_and_backward


def _add(one: Cotangents, other: Cotangents) -> Cotangents:
    return Cotangents(*(a if b is None else b if a is None else a + b for a, b in zip(one, other, strict=True)))


def _losses(config: TrainConfig, task: Tensor, distill: Tensor, masked: Tensor | None = None) -> Losses:
    return Losses.of(config.w_task * task + config.w_distill * distill, task, distill, masked)


def eager_forward(student: Classifier, config: TrainConfig, dtype: torch.dtype) -> Callable[[], Forward]:
    """Forward passes on autograd's graph; weight gradients are added to `.grad`.

    Args:
        student: the classifier to run.
        config: settings; `cam` and `cam_start_layer` choose the taps.
        dtype: compute dtype; weights of another dtype are cast once per step.

    Returns:
        A function to call once per step; its result runs the student with the weights of that moment.
    """
    own = partial(own_layer_gradients, activation=student.visual.config.activation, start_layer=config.cam_start_layer)
    if student.visual.conv1.weight.dtype == dtype:
        stored = {name: parameter.detach() for name, parameter in student.named_parameters()}
        return lambda: _autograd_forward(student, config, partial(own, stored))
    return partial(_forward_of_copy, student, ComputeCopy(student, dtype), config, own)


def _forward_of_copy(student: Classifier, weights: ComputeCopy, config: TrainConfig, own: Callable[..., Any]) -> Forward:
    cast = weights.refreshed()
    detached = {name: weight.detach() for name, weight in cast.items()}
    return _autograd_forward(partial(_with_weights, student, cast), config, partial(own, detached))


def _with_weights(student: Classifier, weights: dict[str, Tensor], patches: Tensor, **options: Any) -> Prediction:
    prediction: Prediction = functional_call(student, weights, (patches,), options)
    return prediction


OwnGradients = Callable[[Taps, Tensor], Iterable[Tensor]]
"""`own_layer_gradients` of a model's weights: from detached taps and the score's gradient (N, K) at a layer's logits."""


def _autograd_forward(call: Callable[..., Prediction], config: TrainConfig, own: OwnGradients | None = None) -> Forward:
    """own: for the map that takes each layer's own score."""

    def forward(patches: Tensor, masked: MaskedInput | None = None, *, tapped: bool = False) -> StudentForward:
        taps = Taps(own_scores=config.cam == "legrad") if tapped else None
        tokens = {} if masked is None else {"kept_tokens": masked.kept_tokens, "key_mask": masked.key_mask}
        prediction = call(patches, taps=taps, **tokens)
        if not prediction.logits.requires_grad:
            raise ValueError(WITHOUT_GRADIENTS)
        values = taps and taps.detached()

        def tap_gradients(score: Tensor) -> Iterable[Tensor]:
            assert taps is not None
            assert values is not None
            if config.cam == "rollout":
                return ()
            if config.cam == "legrad":
                assert own is not None
                return own(values, score)
            at: list[Any] = [taps.last_ln_1] if config.cam == "grad-cam" else taps.outputs[config.cam_start_layer :]
            if not at[0].requires_grad:
                raise ValueError(f"{WITHOUT_GRADIENTS}; a map needs them in the image tower, too")
            return torch.autograd.grad(prediction.logits, at, score, retain_graph=True)

        def pull_back(cotangents: Cotangents) -> None:
            used = [(out, cot) for out, cot in zip(prediction, cotangents, strict=True) if cot is not None]
            torch.autograd.backward([out for out, _ in used], [cot for _, cot in used])

        detached = Prediction(prediction.features.detach(), prediction.logits.detach())
        return StudentForward(detached, values, tap_gradients, pull_back)

    return forward


def _functional_forward(
    student: Classifier,
    trained: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    config: TrainConfig,
    dtype: torch.dtype,
    found: list[dict[str, Tensor]],
) -> Forward:
    """Passes over `torch.func.vjp`, which the compiler sees through; every pullback appends its weight gradients to `found`.
    trained, frozen: weights as a forward in `dtype` takes them."""
    vit = student.visual.config

    def forward(patches: Tensor, masked: MaskedInput | None = None, *, tapped: bool = False) -> StudentForward:
        tokens = {} if masked is None else {"kept_tokens": masked.kept_tokens, "key_mask": masked.key_mask}
        zeros = partial(torch.zeros, dtype=dtype, device=patches.device)
        probes: list[Tensor] = []
        if tapped and config.cam == "grad-cam":
            probes = [zeros(len(patches), vit.patches + 1, vit.width)]
        elif tapped and config.cam in ("mm-cam", "legrad-final"):
            rows = [vit.patches + 1] * (vit.layers - 1) + [1]
            probes = [zeros(len(patches), vit.heads, row, vit.width // vit.heads) for row in rows]

        def run(weights: Mapping[str, Tensor], probes: list[Tensor]) -> tuple[tuple[Tensor, Tensor], list[Any]]:
            taps = None
            if tapped:
                taps = Taps(ln_1_probe=probes[0]) if config.cam == "grad-cam" else Taps(output_probes=probes)
                taps.own_scores = config.cam == "legrad"
            prediction = functional_call(student, {**frozen, **weights}, (patches,), {"taps": taps, **tokens})
            tapped_values = []
            if taps is not None:
                last_ln_1 = [] if taps.last_ln_1 is None else [taps.last_ln_1]
                tapped_values = [taps.queries, taps.keys, taps.values, taps.attended, taps.hidden, taps.pooled, last_ln_1]
            return (prediction.features, prediction.logits), tapped_values

        (features, logits), pullback, values = vjp(run, trained, probes, has_aux=True)  # type: ignore[misc]

        def tap_gradients(score: Tensor) -> Iterable[Tensor]:
            if config.cam == "rollout":
                return ()
            if config.cam == "legrad":
                assert taps is not None
                weights, start = {**frozen, **trained}, config.cam_start_layer
                return own_layer_gradients(weights, taps, score, activation=vit.activation, start_layer=start)
            gradients = pullback((torch.zeros_like(features), score))[1]
            return gradients if config.cam == "grad-cam" else gradients[config.cam_start_layer :]

        def pull_back(cotangents: Cotangents) -> None:
            given = (torch.zeros_like(out) if c is None else c for out, c in zip((features, logits), cotangents, strict=True))
            found.append(pullback(tuple(given))[0])

        taps = None
        if tapped:
            *lists, last_ln_1 = values
            names = ("queries", "keys", "values", "attended", "hidden", "pooled")
            taps = Taps(**dict(zip(names, lists, strict=True)), last_ln_1=last_ln_1[0] if last_ln_1 else None)
        return StudentForward(Prediction(features, logits), taps, tap_gradients, pull_back)

    return forward


def sample_step_randomness(
    strategy: Strategy | None, batch: Batch, patches: int, generator: torch.Generator
) -> MaskRandomness | None:
    """Draw the random numbers of one micro-batch.

    Args:
        strategy: the masking strategy, None for clean images.
        batch: gives the number of images, N.
        patches: patches per image, P.
        generator: on the device of the batch; it advances.

    Returns:
        The draws, or None without a strategy.
    """
    if strategy is None:
        return None
    return sample_mask_randomness(strategy, count=len(batch.labels), patches=patches, generator=generator)

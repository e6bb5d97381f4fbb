"""The training loop of every method."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cammask_fast import distributed
from cammask_fast.cam import relevance_of
from cammask_fast.checkpoint import Checkpoints
from cammask_fast.config import TrainConfig
from cammask_fast.data.types import Batch, Loader
from cammask_fast.distributed import World
from cammask_fast.evaluate import accuracy
from cammask_fast.kernels.normalise import normalise
from cammask_fast.masking import MaskRandomness, counterfactual, sample_mask_randomness
from cammask_fast.masking.kept import ImageMemory
from cammask_fast.model.classifier import Classifier, interpolate
from cammask_fast.precision import compute_dtype, resolve, set_matmul_precision
from cammask_fast.progress import DataWait, Throughput, memory_bytes
from cammask_fast.runtime.run_dir import refuse_changes
from cammask_fast.runtime.signals import TrainingPreempted
from cammask_fast.state import Snapshot, StepStats, TrainState
from cammask_fast.step import build_strategy, compiled_or_eager_step, sample_step_randomness

Progress = Callable[[str, int, int, float, float], None]
"""Called as (phase, images done, images in total, mean loss since the last call, share of the time spent waiting for data)."""

STOPPED = "stopped at step {} of {}, saved; run the same command again to resume"
Parts = list[tuple[Batch, MaskRandomness | None]]


class FineTuned(NamedTuple):
    """best: the checkpoint with the best validation accuracy (for WiSE-FT: the last one interpolated with the zero-shot
    weights). last: the checkpoint after the last step. skipped: steps whose loss or gradient was not finite. best_epoch: of the
    best checkpoint, counted from 1."""

    best: Classifier
    last: Classifier
    skipped: int = 0
    best_epoch: int = 0


class NonFiniteLoss(ValueError):  # noqa: N818  (reads as what happened)
    """The loss or the gradients were NaN or infinite in too many steps in a row."""


def _never() -> bool:
    return False


def _nothing() -> None:
    pass


@dataclass(kw_only=True)
class Run:
    """What surrounds a training run: its processes, checkpoints, log and signals. The defaults just train."""

    world: World = field(default_factory=World)
    checkpoints: Checkpoints | None = None
    """On rank 0 of a run that is kept."""
    save_every: int = 0
    """Steps between two checkpoints beside those at the ends of epochs; 0: no checkpoints."""
    settings: Mapping[str, Any] | None = None
    """What a checkpoint must have been written with to be resumed here."""
    log: Callable[[Mapping[str, Any]], None] | None = None
    """Called with a record at every read of the losses and after every epoch."""
    evaluate: Callable[[Classifier], Mapping[str, float]] | None = None
    """Accuracies by name, in percent, of evaluation sets beside the validation images; called after every epoch."""
    resumed: Callable[[int, int, Path | None], None] | None = None
    """Gets the step from which the run resumes, the epochs that are complete, and the checkpoint."""
    stop: Callable[[], bool] = _never
    """Whether this process has been asked to save and leave."""
    after_step: Callable[[], None] = _nothing
    """Called at the end of every step, such as a profiler's."""
    debug: Path | None = None
    """Folder for what is known of a run that stopped on non-finite losses."""

    def resume(self, state: TrainState, loader: Loader) -> None:
        """Restore the state, its generator and its loader from the newest intact checkpoint, if there is one.

        Raises ValueError where the checkpoint was written with other settings.
        """
        if not self.save_every:
            return
        found = self.checkpoints.newest() if self.checkpoints is not None else None
        if found is not None:
            settings = self.settings or {}
            refuse_changes(found.settings, settings, found.path.parent.parent)
            if found.settings.get("images") != settings.get("images"):  # what was kept is of the former ones
                TrainState.forget_kept(found.saved)
        saved = distributed.broadcast_state(None if found is None else found.saved)
        if saved is not None:
            state.load_state_dict(saved)
            generators = saved.tensors["generators"]
            own = generators[self.world.rank if len(generators) == self.world.size else 0]
            state.generator.set_state(own.clone())  # set_state reads from the start of the storage, whatever the view
            loader.load_state_dict(saved.metadata["loader"])
        if self.resumed is not None:
            self.resumed(state.step, state.epoch, None if found is None else found.path)

    def save(self, state: TrainState, loader: Loader) -> None:
        """Write a checkpoint. Called by all processes at the same step and after every epoch, since it gathers their generators
        and what they keep of the images; rank 0 writes."""
        if state.kept is not None:
            state.kept.merge()
        if not self.save_every:
            return
        device = state.student.head.weight.device
        generators = distributed.all_gather_stack(state.generator.get_state().to(device)).cpu()
        if self.checkpoints is not None:
            tensors, metadata = state.state_dict()
            self.checkpoints.save(Snapshot({**tensors, "generators": generators}, {**metadata, "loader": loader.state_dict()}))

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self.checkpoints is not None:
            self.checkpoints.wait()


def fine_tune(
    pretrained: Classifier,
    train: Loader,
    validation: Loader | None,
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    log_every: int = 10,
    run: Run | None = None,
    start: Classifier | None = None,
) -> FineTuned:
    """Fine-tune a copy of a classifier.

    Args:
        pretrained: the zero-shot classifier: start of the student, teacher, and WiSE-FT's other end. It is left as it is.
        train: loader of the training images. Its batches are optimiser steps (this process's share of them where several
            train); `config.accumulate` cuts them into micro-batches.
        validation: loader of the images that choose the best checkpoint. None: the last checkpoint is the best one, as it
            always is for WiSE-FT.
        config: settings of the method.
        progress: called every `log_every` steps, see `Progress`.
        log_every: steps between two reads of the losses, which are also written to `run.log`.
        run: processes, checkpoints, log and signals; None trains without any.
        start: other weights for the student to start from, of the same classes; left as they are, too.

    Returns:
        The best and the last checkpoint, in evaluation mode, and the number of steps that were skipped.

    Raises:
        ValueError: for settings that cannot work.
        NonFiniteLoss: too many steps in a row had a loss or gradient that was not finite.
        TrainingPreempted: `run.stop` asked for it; a checkpoint was written if the run keeps any.
    """
    run = Run() if run is None else run
    if config.resolved.trained == "head":
        config = replace(config, optim=replace(config.optim, weight_decay=0.0))
    device, dtype = pretrained.head.weight.device, compute_dtype(config.precision, pretrained.head.weight)
    teacher, rank, steps = pretrained.frozen_copy(), run.world.rank, config.epochs * len(train)
    student = (teacher if start is None else start).frozen_copy().train()
    compiled = config.compile != "off" and (config.compile != "auto" or device.type == "cuda")
    set_matmul_precision(resolve(config.precision, device))
    state = TrainState.create(student, config, steps_per_epoch=len(train), compiled=compiled, rank=rank)
    frozen = teacher.stored_in(dtype)
    state.kept = ImageMemory.of_run(frozen, student, config, train)
    step = compiled_or_eager_step(state, frozen, config, steps_per_epoch=len(train), processes=run.world.size)
    run.resume(state, train)
    wait, vote, pace = DataWait(device), distributed.AsyncAnyFlag(), Throughput(state.step * config.batch_size)
    for epoch in range(state.epoch, config.epochs):
        train.set_epoch(epoch)
        for batch in wait.over(train):
            distributed.heartbeat(f"step {state.step + 1}")
            loaded = batch.to(device) if state.kept is None else state.kept.add_to(batch, device, epoch=epoch)
            parts = split_microbatches(loaded, config, state, run.world)
            step(parts)
            run.after_step()
            state.step += 1
            if state.step % log_every == 0 or state.step == steps:
                speed = pace.read(state.step * config.batch_size)
                log_and_check_finite(state, config, parts, run, steps, progress, wait.share, speed)
            stop = vote(run.stop())
            if stop or (run.save_every and state.step % run.save_every == 0):
                run.save(state, train)
            if stop:
                raise TrainingPreempted(STOPPED.format(state.step, steps))
            distributed.heartbeat(f"loading the images of step {state.step + 1}")
        stop = vote.count()
        if validation is not None or epoch + 1 == config.epochs:
            scores = epoch_scores(student.eval().stored_in(dtype), validation, run, device)
            state.keep_if_best(scores.get("validation", math.nan), take_last=validation is None or config.resolved.interpolate)
            student.train()
            if run.log is not None:
                run.log({"step": state.step, "epoch": epoch + 1, "accuracy": scores})
        state.epoch = epoch + 1
        run.save(state, train)
        if stop and state.epoch < config.epochs:
            raise TrainingPreempted(STOPPED.format(state.step, steps))
    best = teacher.frozen_copy()
    best.load_state_dict(state.best_weights)
    if config.resolved.interpolate:
        best.load_state_dict(interpolate(teacher.state_dict(), best.state_dict(), config.alpha))
    skipped, best_epoch = state.read_and_reset().skipped, state.best_step // len(train)
    return FineTuned(best.requires_grad_(True), student.requires_grad_(True).eval(), skipped, best_epoch)


def split_microbatches(batch: Batch, config: TrainConfig, state: TrainState, world: World) -> Parts:
    """Cut this process's batch into micro-batches and draw their masks and donors.

    Args:
        batch: images (n, H, W, 3) or (n, 3, H, W) and labels (n,) of this process, n = N / processes.
        config: settings; `accumulate` is the number of micro-batches, `donors` says whether donors come from the micro-batch or
            from the global batch.
        state: holds the number of patches and the generator.
        world: rank and number of processes.

    Returns:
        `config.accumulate` pairs of a micro-batch and its random numbers, None where the method masks nothing.
    """
    strategy, patches = build_strategy(config), state.student.visual.config.patches
    pieces = batch.chunks(config.accumulate)
    if strategy is None or config.donors == "batch":
        return [(piece, sample_step_randomness(strategy, piece, patches, state.generator)) for piece in pieces]
    own, size = len(batch.labels), len(pieces[0].labels)
    drawn = sample_mask_randomness(strategy, count=own * world.size, patches=patches, generator=state.generator)
    pool = batch.images if drawn.donors is None else distributed.all_gather_stack(batch.images).flatten(0, 1)
    return [(piece, drawn.part(world.rank * own + size * i, size, pool)) for i, piece in enumerate(pieces)]


def epoch_scores(model: Classifier, validation: Loader | None, run: Run, device: torch.device) -> dict[str, float]:
    """Accuracies after an epoch.

    Args:
        model: the student in evaluation mode.
        validation: loader of the validation images, if there are any.
        run: has the function that scores the run's evaluation sets.
        device: of the model.

    Returns:
        Top-1 accuracy in percent by name: `validation`, then the evaluation sets.
    """
    scores = {} if validation is None else {"validation": accuracy(model, validation, device=device)}
    return scores | dict(run.evaluate(model) if run.evaluate is not None else {})


def log_and_check_finite(
    state: TrainState,
    config: TrainConfig,
    parts: Parts,
    run: Run,
    steps: int,
    progress: Progress | None,
    waited: float,
    images_per_second: float,
) -> None:
    """Read the step statistics, which synchronises with the device, and report them.

    Args:
        state: its statistics are read and reset.
        config: settings; `max_skipped` bounds the steps in a row that may be skipped.
        parts: micro-batches and random numbers of the last step, for the debug files.
        run: has the log and the folder for debug files.
        steps: optimiser steps of the whole run.
        progress: see `Progress`; None reports nothing.
        waited: share of the time spent waiting for data, 0 to 1.
        images_per_second: throughput of all processes since the last read.

    Raises:
        NonFiniteLoss: `max_skipped` steps in a row, or all steps of a shorter run, were skipped.
    """
    tally = state.read_and_reset()
    if run.log is not None:
        values = {"loss": tally.loss, **tally.metrics, "lr": state.learning_rate(), "images_per_second": images_per_second}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        rest = {"data_wait": waited, "memory_bytes": memory_bytes(state.tally.device), "skipped": tally.skipped}
        run.log({"step": state.step, "epoch": state.epoch, **finite, **rest})
    if tally.bad_in_a_row >= min(config.max_skipped, steps):
        first = state.step - tally.bad_in_a_row + 1
        where = _debug_bundle(state, config, parts, run, tally)
        raise NonFiniteLoss(
            f"the loss or the gradients were not finite in {tally.bad_in_a_row} steps in a row, from step {first} on (they "
            "changed no weight): try a lower learning rate (--lr), a longer warm-up or --precision fp32, and check the "
            f"images{where}"
        )
    if progress is not None:
        progress("train", state.step * config.batch_size, steps * config.batch_size, tally.loss, waited)


def _debug_bundle(state: TrainState, config: TrainConfig, parts: Parts, run: Run, tally: StepStats) -> str:
    """Write what is known of the last step, which changed no weight, so that its masks can be made again: `debug.json` (step,
    sample ids, whether each one's logits are finite, norms of weights and gradients) and `masks.safetensors`. Returns words for
    the error message."""
    if run.debug is None:
        return ""
    strategy, vit, student = build_strategy(config), state.student.visual.config, state.student
    masks, finite = [], []
    with torch.no_grad():
        for batch, draws in parts:
            finite.append(student(normalise(batch.images, dtype=student.head.weight.dtype)).logits.isfinite().all(1))
            if strategy is not None and draws is not None:
                cam = None if batch.relevance is None else batch.relevance.float()
                if strategy.needs_cam and cam is None:
                    start, contrast = config.cam_start_layer, config.cam_contrast
                    cam = relevance_of(student, batch.images, batch.labels, config.cam, start_layer=start, contrast=contrast)
                masks.append(counterfactual(batch.images, cam, strategy, draws, grid=vit.grid).mask)
    ids = torch.cat([batch.sample_ids for batch, _ in parts]).to(finite[0].device)
    tensors = {"sample_ids": ids, "finite": torch.cat(finite).to(torch.uint8)}
    if masks:
        tensors["masks"] = torch.cat(masks).to(torch.uint8)
    tensors = {name: distributed.all_gather_stack(value).flatten(0, 1).cpu() for name, value in tensors.items()}
    gradients = {name: None if p.grad is None else _number(p.grad.norm()) for name, p in student.named_parameters()}
    report = {
        "step": state.step,
        "bad_in_a_row": tally.bad_in_a_row,
        "skipped": tally.skipped,
        "sample_ids": tensors["sample_ids"].tolist(),
        "samples_without_finite_logits": tensors["sample_ids"][tensors["finite"] == 0].tolist(),
        "weight_norms": {name: _number(p.norm()) for name, p in student.named_parameters()},
        "gradient_norms": gradients,
    }
    if run.world.is_main_process:
        try:
            run.debug.mkdir(parents=True, exist_ok=True)
            (run.debug / "debug.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            save_file({name: value.contiguous() for name, value in tensors.items()}, run.debug / "masks.safetensors")
        except OSError as error:
            print(f"cammask: cannot write {run.debug} ({error.strerror or error})", file=sys.stderr)
    return f"; the last step is in {run.debug}"


def _number(norm: Tensor) -> float | str:
    """JSON has no NaN."""
    value = float(norm.detach())
    return value if math.isfinite(value) else str(value)

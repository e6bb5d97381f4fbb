"""`cammask train`: one process, or one of several under torchrun."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from cammask_fast import __version__
from cammask_fast.checkpoint import Checkpoints, describe_run
from cammask_fast.checkpoint.heads import Classes
from cammask_fast.commands.checks import ABOVE_ZERO, positive
from cammask_fast.commands.extension import extension_of, prepare, refuse_finished, tell_better
from cammask_fast.commands.outcome import report, validated
from cammask_fast.commands.run_record import begin_record
from cammask_fast.commands.screen import TimeEstimate, screen
from cammask_fast.commands.settings import Chosen, flat, given_settings
from cammask_fast.commands.shared import Options, device_of, loader_config_of, save, say_unreadable, warn, zero_shot_model
from cammask_fast.commands.starting_point import ZERO_SHOT, starting_point
from cammask_fast.commands.trackers import Trackers, refuse_missing_packages
from cammask_fast.commands.watching import VALIDATION, Watched, accuracy_lines, comparison, diverged, log_of, watch
from cammask_fast.config import TrainConfig
from cammask_fast.data.augment import Augment
from cammask_fast.data.class_names import class_list
from cammask_fast.data.factory import DataSubset, TrainingData, open_training
from cammask_fast.data.text_files import read_text
from cammask_fast.distributed import World, all_gather_object, check_same_on_all_ranks, init_distributed
from cammask_fast.masking.kept import refuse_moving_pixels
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import vit_config
from cammask_fast.profiling import StepProfiler
from cammask_fast.progress import TrainingProgress
from cammask_fast.recipes.run_recipe import open_recipe
from cammask_fast.runtime.files import write_text
from cammask_fast.runtime.notices import noticed
from cammask_fast.runtime.run_dir import CHECKPOINTS, RunLock, RunLog, clear, record_launch, torchrun_id, was_launched_by
from cammask_fast.runtime.signals import GracefulShutdown
from cammask_fast.step import build_strategy
from cammask_fast.train import Run, fine_tune


def run_train(args: Options) -> None:
    """Run `cammask train`, in one process or in one of several under torchrun.

    Raises ValueError where the options or the data cannot work, or where the folder already holds another run.
    """
    recipe = open_recipe(args["recipe"]) if args["recipe"] else {}
    chosen = Chosen(given_settings(args, recipe.get("train", {})))
    config = chosen.config
    positive(args, *ABOVE_ZERO)
    refuse_missing_packages(args)
    out = args["out"] or Path("runs", f"{config.method}-seed{config.seed}")
    with init_distributed(device_of(args), timeout=args["timeout"]) as dist_info, GracefulShutdown() as stop:
        launchers = all_gather_object(torchrun_id())
        complete, ours = all_gather_object(((out / "run.json").exists(), was_launched_by(out, launchers)))[
            0
        ]  # as rank 0 sees the folder
        if complete and ours:
            return  # another process failed after the run was complete
        if args["extend"]:
            prepare(args, out, chosen, complete=complete, is_main_process=dist_info.is_main_process)
            all_gather_object(None)  # until rank 0 has done so
            args, chosen = extension_of(args, chosen, out)
        elif complete and not args["overwrite"]:
            refuse_finished(out, int(chosen.given.get("epochs", 0)))
        train_here(args, recipe, chosen, out, dist_info, stop, launchers)
        if args["extend"] and dist_info.is_main_process:
            tell_better(out, args["epochs_before"])


def train_here(
    args: Options, recipe: Mapping[str, Any], chosen: Chosen, out: Path, dist_info: World, stop: GracefulShutdown,
    launchers: Sequence[str | None],
) -> None:  # fmt: skip
    """Do one process's part of `cammask train`; the main process prints and writes.

    Args:
        args: options of the command line by name.
        recipe: the recipe's tables; empty without `--recipe`.
        chosen: the settings; those that fit the data are added here.
        out: folder of the run.
        dist_info: rank and number of processes.
        stop: tells whether a signal asked the process to save and leave.
        launchers: torchrun's id of this launch on every rank; None without torchrun.

    Raises:
        ValueError: for data, weights or settings that cannot work, or that differ between ranks.
        TrainingPreempted: a signal stopped the run after a checkpoint.
    """
    augment = Augment.parse(args["augment"])
    config = chosen.config
    build_strategy(config)
    refuse_moving_pixels(config, augment)
    point = starting_point(args, recipe, config, out)
    device, vit = device_of(args), vit_config(point.arch)
    trains = config.resolved.trained != "none"
    subset = DataSubset(
        val_share=args["val_share"], val_images=args["val_images"], shots=args["shots"], classes=class_list(args["classes"])
    )
    data = open_training(
        args["data"], image_size=vit.image_size, batch_size=lambda images: chosen.own_batch(point.arch, images, dist_info.size),
        seed=config.seed, subset=subset, augment=augment, class_names=args["class_names"],
        loader_config=loader_config_of(args, device, out, dist_info),
    )  # fmt: skip
    config = chosen.config
    if args["audit"] and data.validation is None:
        raise ValueError("--audit: there are no validation images to audit: give a val/ folder, or --val-share above 0")
    sets = watch(
        data.validation, args["eval"], image_size=vit.image_size, class_folders=data.class_folders,
        config=loader_config_of(args, device, out, dist_info),
    )  # fmt: skip
    teacher, start = point.models(
        config, Classes(data.class_names, data.class_folders),
        lambda: zero_shot_model(point.arch, point.pretrained, data.class_names, args["templates"], device), device,
    )  # fmt: skip
    settings = {
        **flat(config.to_dict()), **point.settings, "data": args["data"], "device": device,
        "augment": args["augment"], "loader": type(data.train).__name__, "processes": dist_info.size,
        "classes": digest(data.class_folders, data.class_names), "train_images": len(data.train.labels),
        "images": data.fingerprint, "train_labels": digest(data.train.labels.tolist()),
        "templates": digest(args["templates"] and read_text(args["templates"])), "cammask_fast": __version__,
    }  # fmt: skip
    check_same_on_all_ranks(settings)
    started = time.perf_counter()
    with RunLock(out) if dist_info.is_main_process else nullcontext():
        if dist_info.is_main_process:
            if args["overwrite"] and not was_launched_by(out, launchers):
                clear(out)
            record_launch(out, launchers)
            begun = begin_record(out, args, config, data, start=point.record, device=device, world=dist_info)
            for line in screen(
                arch=point.arch, weights=point.weights, tower=start.visual, data=data.summary, config=config,
                watched={name: len(one.labels) for name, one in sets.sets.items()}, steps=len(data.train),
                chosen=chosen.lines(), device=device, processes=dist_info.size, loader=type(data.train).__name__,
            ):  # fmt: skip
                print(line, flush=True)
        before: dict[str, dict[str, float]] = {}
        if trains:
            for name, model in point.untrained(teacher, start).items():
                before[name] = sets.scores(model)
                if dist_info.is_main_process:
                    for line in accuracy_lines(name, before[name], sets.images()):
                        print(line, flush=True)
        models, watched = (
            train_with_progress(teacher, start, data, config, args, out, settings, dist_info, stop, sets, before)
            if trains
            else ({"best": start}, {})
        )
        seconds = time.perf_counter() - started
        scores = sets.scores(models["best"])
        score = scores.get(VALIDATION)
        say_unreadable(dist_info, data.train, data.validation, *(one.loader for one in sets.sets.values()))
        record: Options = {}
        if dist_info.is_main_process:
            run = {
                **describe_run(config.to_dict(), score, data.class_names),
                **point.record, "data": args["data"], "device": device,
                "class_folders": data.class_folders, "train_images": len(data.train.labels), "seconds": round(seconds, 1),
                **watched, "processes": dist_info.size, "fitted": chosen.record(),
                "loader": type(data.train).__name__, "augment": args["augment"], "cammask_fast": __version__,
                "trained_on": data.path if trains else None, "notices": noticed(),
                **point.measured(before),
                "accuracy": scores,
            }  # fmt: skip
            save(out, models, point.arch, data.class_names, run)
            record = {**run, **begun, "class_names": data.class_names}
            write_text(out / "run.json", json.dumps(record, indent=1) + "\n")
            for line in comparison(before[point.start_name], scores, point.start_name) if trains else ():
                print(line)
            if "best_epoch" in watched:
                print(f"best epoch: {watched['best_epoch']} of {config.epochs}")
            found = f"{validated(before.get(ZERO_SHOT, {}).get(VALIDATION), score)}written to {out / 'best.safetensors'}"
            print(f"{config.method} on {len(data.class_names)} classes: {found}")
            if trains and not args["keep_optimizer"]:
                weights = {"student": out / "last.safetensors", "best": out / "best.safetensors"}
                Checkpoints(out / CHECKPOINTS, settings, warn=warn).drop_moments(weights)
        report(
            out, record, start, models["best"], data, config,
            audit=loader_config_of(args, device, out) if args["audit"] else None,
        )  # fmt: skip


def refuse_diverged(out: Path, config: TrainConfig, classes: int, before: float | None, images: int, dist_info: World) -> None:
    """Stop where a run has diverged, on all processes alike; see `watching.diverged`.

    Args:
        out: folder of the run, with its log.
        config: settings of the run.
        classes: their number, K.
        before: validation accuracy before training, percent; None without validation images.
        images: number of validation images.
        dist_info: rank and number of processes; the main process reads the log.

    Raises:
        ValueError: the run has diverged.
    """
    own = None
    if dist_info.is_main_process:
        own = diverged(log_of(out), classes=classes, before=before, images=images, lr=config.optim.lr, weight=config.w_task)
    said = all_gather_object(own)[0]
    if said is not None:
        raise ValueError(said)


def digest(*items: Any) -> str:
    """A fingerprint of JSON values, 12 hexadecimal digits of SHA-256, by which a resumed run recognises its data."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:12]


def train_with_progress(
    teacher: Classifier, start: Classifier, data: TrainingData, config: TrainConfig, args: Options, out: Path,
    settings: Options, dist_info: World, stop: GracefulShutdown, sets: Watched, before: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Classifier], Options]:  # fmt: skip
    """Train with a progress bar, a log and checkpoints.

    Args:
        teacher: the frozen model that is distilled.
        start: where the student starts; the same object as the teacher without `--init`.
        data: training and validation loaders.
        config: settings of the method.
        args: options of the command line by name.
        out: folder of the run.
        settings: what a checkpoint must have been written with to be resumed here.
        dist_info: rank and number of processes; the main process prints and writes.
        stop: tells whether a signal asked the process to save and leave.
        sets: the sets on which the run is watched.
        before: accuracies before training, by the name of the model; the last one is where the run starts.

    Returns:
        The trained models, `best` and `last`, and what was measured on the way: skipped steps, share of the time spent waiting
        for data, checkpoints written, seconds for which the slowest one held up the training, and seconds of training.

    Raises:
        ValueError: out of memory, with smaller settings to try; also whatever `train.fine_tune` raises.
    """

    steps = config.epochs * len(data.train)
    log_every = min(args["log_every"], len(data.train))
    main = dist_info.is_main_process
    with (
        Trackers(args, out, settings) as trackers,
        TrainingProgress(epochs=config.epochs, steps=steps, silent=not main) as progress,
    ):
        log = RunLog(out, warn=warn)

        def write(line: Mapping[str, Any]) -> None:
            for one in (log, progress, trackers):
                one.write(line)

        def resumed(step: int, epoch: int, path: Path | None) -> None:
            log.truncate_after(step, epoch)
            progress.begin(step)
            trackers.begin(step)
            if path is not None:
                print(f"cammask: resuming from step {step} of {steps}, {path}", file=sys.stderr)

        run = Run(
            evaluate=sets.evaluate if sets.sets else None,
            world=dist_info,
            save_every=args["save_every"],
            settings=settings,
            stop=lambda: stop.requested,
        )
        run.debug = out / "debug"
        profiler = StepProfiler(args["profile"], device_of(args)) if args["profile"] and dist_info.is_main_process else None
        if dist_info.is_main_process:
            run.checkpoints = Checkpoints(out / CHECKPOINTS, settings, keep=args["keep"], warn=warn)
            run.log = TimeEstimate(write, config=config, steps=steps, evaluation=sets.seconds)
            run.resumed = resumed
            run.after_step = profiler or run.after_step
        started = time.perf_counter()
        try:
            with profiler or nullcontext():
                tuned = fine_tune(teacher, data.train, data.validation, config, log_every=log_every, run=run, start=start)
        except torch.OutOfMemoryError as error:
            raise ValueError(out_of_memory(config, dist_info, error)) from None
        finally:
            run.finish()
        seconds = time.perf_counter() - started
    started_with, images = list(before.values())[-1].get(VALIDATION), sets.images().get(VALIDATION, 0)
    refuse_diverged(out, config, len(data.class_names), started_with, images, dist_info)
    stalls = [] if run.checkpoints is None else run.checkpoints.stalls
    watched = {
        "waited_for_data": round(progress.waited, 4), "skipped_steps": tuned.skipped,
        **({"best_epoch": tuned.best_epoch} if sets.validation is not None and not config.resolved.interpolate else {}),
        "checkpoint_stall": round(max(stalls, default=0.0), 4), "checkpoints_written": len(stalls),
        "training_seconds": round(seconds, 1),
    }  # fmt: skip
    return {"best": tuned.best, "last": tuned.last}, watched


def out_of_memory(config: TrainConfig, dist_info: World, error: BaseException) -> str:
    """The error message of a run that ran out of memory: what to try, preferably without changing the global batch.

    Args:
        config: settings of the run, of which batch size and accumulation count.
        dist_info: number of processes that share a batch.
        error: PyTorch's error, whose first line is quoted.

    Returns:
        One line.
    """
    own = config.batch_size // dist_info.size
    first = f"out of memory with {own // config.accumulate} images at a time ({str(error).splitlines()[0]})"
    more = next((n for n in range(config.accumulate + 1, own + 1) if own % n == 0), None)
    if more is None:
        return f"{first}: one image is too many; try a smaller --arch or --precision bf16"
    smaller = own // more * config.accumulate * dist_info.size
    return (
        f"{first}: try --accumulate {more}, which keeps the global batch of {config.batch_size} ({own // more} images at a "
        f"time), or --batch-size {smaller}"
    )

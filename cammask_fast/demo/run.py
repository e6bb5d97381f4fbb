"""The main job on the embedded benchmark: every method, several seeds, one report."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import queue
import resource
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cammask_fast.cam import relevance_of
from cammask_fast.cam.localisation import localisation, object_patches
from cammask_fast.config import TrainConfig, load_recipe
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES, Split, sample_scenes, stroke_coverage
from cammask_fast.data.datasets.texture_digits_splits import (
    OOD_SETS,
    TRAIN_IMAGES,
    evaluation_specifications,
    evaluation_splits,
    rendered,
    training_splits,
)
from cammask_fast.demo.report import write_report
from cammask_fast.evaluate import accuracy
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import parse_strategy
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.runtime.machine import cpu_name
from cammask_fast.train import fine_tune
from cammask_fast.viz.mask_images import apply
from cammask_fast.viz.plots import GalleryRow, gallery
from cammask_fast.wise_ft import interpolations

HEADLINE = "masked-object"
BASIC = ("ft", "ft-fd", "masked-object", "masked-context", "masked-random", "masked-topk")
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "lp": ("lp", {}),
    "ft-kd": ("ft-kd", {}),
    "masked-object-kd": ("masked-object-kd", {}),
    "masked-object-gradcam": ("masked-object", {"cam": "grad-cam"}),
    "masked-object-multi": ("masked-object", {"masking": "ObjMaskMultiFill(0.6)"}),
    "masked-context-multi": ("masked-context", {"masking": "CtxMaskMultiFill(0.3)"}),
    "masked-random-multi": ("masked-random", {"masking": "RandMaskMultiFill(0.5)"}),
    "masked-object-none": ("masked-object", {"masking": "ObjMaskNoFill(0.3)"}),
    "masked-context-none": ("masked-context", {"masking": "CtxMaskNoFill(0.6)"}),
    "masked-random-none": ("masked-random", {"masking": "RandMaskNoFill(0.75)"}),
}
ALPHAS = (0.5, 0.75)  # 0 is zero-shot, 1 fine-tuned; 0.25 lies next to zero-shot
CAM_CHUNK = 100
CAM_IMAGES = 300
MAX_WORKERS = 2  # each holds about 1.2 GB; the demo promises to stay under 4 GB
OBJECT_THRESHOLD = 0.3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one worker: train (nothing, for zero-shot), evaluate, look at the CAM."""

    name: str
    config: TrainConfig
    curve: bool
    """Evaluate the interpolations with the zero-shot weights too (of the last checkpoint, as WiSE-FT does)."""
    gallery: Path | None = None
    """Write a picture of the tuned model's masks to this file."""
    scans: str = "test"
    """Digit scans of the evaluation sets: `test`, or `val` where settings are chosen."""

    @property
    def trains(self) -> bool:
        """Whether the job trains anything."""
        return self.config.resolved.trained != "none"

    @property
    def images(self) -> int:
        """Training images, over all epochs."""
        if not self.trains:
            return 0
        return self.config.epochs * (TRAIN_IMAGES // self.config.batch_size) * self.config.batch_size


def tiny_config(recipe: str, seed: int, **changes: Any) -> TrainConfig:
    """The benchmark's settings for a method.

    Args:
        recipe: name of a file in recipes/tiny, without its ending.
        seed: of the run.
        **changes: fields of `TrainConfig` to set otherwise.

    Returns:
        The settings.
    """
    return TrainConfig.from_dict({**load_recipe(f"tiny/{recipe}")["train"], "seed": seed, **changes})


def jobs(seeds: Sequence[int], *, full: bool, gallery: Path | None = None) -> list[Job]:
    """The jobs of a demo: zero-shot once and the training runs per seed.

    Args:
        seeds: of the runs.
        full: add the methods of `FULL`.
        gallery: file for the pictures of the first seed's headline run.

    Returns:
        Jobs, longest first, so that the workers end together.
    """
    wanted: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in BASIC} | (FULL if full else {})
    curves = {"ft", HEADLINE} if full else {"ft"}
    runs = [
        Job(
            name=name,
            config=tiny_config(recipe, seed, **changes),
            curve=name in curves,
            gallery=gallery if name == HEADLINE and seed == seeds[0] else None,
        )
        for seed in seeds
        for name, (recipe, changes) in wanted.items()
    ]
    zero_shot = Job(name="zeroshot", config=replace(tiny_config("ft", seeds[0]), method="zeroshot"), curve=False)
    return [*sorted(runs, key=_work, reverse=True), zero_shot]


def _work(job: Job) -> float:
    """Measured seconds of a run, roughly: a masked step takes twice as long as FT's, an evaluated interpolation 4 s."""
    masked = job.config.resolved.masking != "none"
    return (30 if masked else 15) + (4 * len(ALPHAS) if job.curve else 0)


_events: Any = None


def _start_worker(events: Any) -> None:
    global _events
    _events = events
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed demo takes its workers along
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def run_job(job: Job) -> dict[str, Any]:
    """Train, evaluate on every test set, interpolate, and measure where the CAM lies. Runs in a worker process."""
    pretrained = tiny_classifier(CLASS_NAMES)
    train, validation = training_splits(job.config.seed, batch_size=job.config.batch_size)
    done = 0

    def progress(_phase: str, images: int, _total: int, _loss: float, _waited: float) -> None:
        nonlocal done
        _events.put(images - done)
        done = images

    result: dict[str, Any] = {"name": job.name, "seed": job.config.seed, "config": job.config.to_dict()}
    tuned = last = pretrained
    if job.trains:
        started = time.perf_counter()
        tuned, last, *_ = fine_tune(pretrained, train, validation, job.config, progress=progress)
        result["train_seconds"] = time.perf_counter() - started
    _events.put(job.images - done)
    result |= {"accuracy": evaluate_all(tuned, job.scans), "cam": cam_quality(tuned)}
    if job.curve:
        models = interpolations(pretrained, last, ALPHAS)
        result["curve"] = [(a, evaluate_all(model, job.scans)) for a, model in zip(ALPHAS, models, strict=True)]
    if job.gallery is not None:
        gallery(job.gallery, gallery_rows(tuned))
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


def evaluate_all(model: Classifier, scans: str = "test") -> dict[str, float]:
    """Accuracy in percent on the ID set and the four shifts."""
    return {name: accuracy(model, loader) for name, loader in evaluation_splits(scans=scans).items()}


def _cam_images() -> tuple[Split, Tensor, Tensor]:
    split = evaluation_specifications()["id"]
    images, labels = rendered(split)
    return split, images[:CAM_IMAGES], labels[:CAM_IMAGES]


def cam_quality(model: Classifier) -> dict[str, dict[str, float]]:
    """Localisation of both CAMs on images of the ID test set, in percent."""
    split, images, labels = _cam_images()
    grid = model.visual.config.grid
    touched = object_patches(stroke_coverage(sample_scenes(split)[slice(0, CAM_IMAGES)]), grid=grid)
    quality = {}
    for kind in ("mm-cam", "grad-cam"):
        chunks = zip(images.split(CAM_CHUNK), labels.split(CAM_CHUNK), strict=True)
        relevance = torch.cat([relevance_of(model, some, their_labels, kind) for some, their_labels in chunks])
        quality[kind] = localisation(relevance, touched, threshold=OBJECT_THRESHOLD)._asdict()
    return quality


def gallery_rows(model: Classifier, *, count: int = 6) -> list[GalleryRow]:
    """Rows for `plots.gallery`: the first test images with the strategies of the demo."""
    _, images, labels = _cam_images()
    images, labels = images[:32], labels[:32]
    grid = model.visual.config.grid
    relevance = relevance_of(model, images, labels, "mm-cam")
    generator = torch.Generator().manual_seed(0)
    strategies = {}
    for name in ("masked-object", "masked-context", "masked-random", "masked-topk"):
        strategy = parse_strategy(tiny_config(name, 0).resolved.masking)
        strategies[name.removeprefix("masked-")] = apply(strategy, images, len(images), relevance, generator, grid=grid)
    cams = normalise_relevance(relevance).view(-1, grid, grid)
    return [
        GalleryRow(CLASS_NAMES[labels[i]], images[i], cams[i], {n: (m[i], f[i]) for n, (m, f) in strategies.items()})
        for i in range(count)
    ]


def run_demo(out: Path, *, full: bool = False, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Run everything and write results.json, gallery.png, tradeoff.png, table.md and report.html.

    Args:
        out: folder, created when it is missing.
        full: add the methods of `FULL`.
        seeds: of the runs.

    Raises:
        ValueError: the folder cannot be written.
    """
    started = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from None
    todo = jobs(seeds, full=full, gallery=out / "gallery.png")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    workers = min(cores, MAX_WORKERS, len(todo))
    print(f"{sum(job.trains for job in todo)} training runs of {todo[0].images} images on {workers} processes", flush=True)
    finished = run_all(todo, workers=workers)
    results = summarise(finished, seeds)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results["peak_rss_mb"] = round(own + workers * max(r["peak_rss_mb"] for r in finished))
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["environment"] = environment(cores)
    results["full"] = full
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(write_report(out, results))


def run_all(todo: Sequence[Job], *, workers: int) -> list[dict[str, Any]]:
    """Run the jobs in worker processes of one thread each, with one progress bar over all images."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    bar = tqdm(total=sum(job.images for job in todo), unit="img", unit_scale=True, smoothing=0.05, mininterval=1.0)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(events,)) as pool, bar:
        futures: list[Future[dict[str, Any]]] = [pool.submit(run_job, job) for job in todo]
        while not all(future.done() for future in futures):
            try:
                bar.update(events.get(timeout=0.5))
            except queue.Empty:
                ready = sum(future.done() for future in futures)
                bar.set_postfix_str(f"{ready}/{len(futures)} runs")
            if any(future.done() and future.exception() for future in futures):
                pool.shutdown(cancel_futures=True)
                break
        while not events.empty():
            bar.update(events.get())
    return [future.result() for future in futures]


def summarise(finished: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Results by method, each a list with one value per seed, in percent. `finished` holds zero-shot once."""
    zero_shot_result = next(result for result in finished if result["name"] == "zeroshot")
    trained = [result for result in finished if result is not zero_shot_result]
    zero_shot = zero_shot_result["accuracy"]
    scores: dict[str, list[dict[str, float]]] = {"zeroshot": [zero_shot] * len(seeds)}
    cam: dict[str, list[Any]] = {"zeroshot": [zero_shot_result["cam"]] * len(seeds)}
    curves: dict[str, list[Any]] = {}
    for result in sorted(trained, key=lambda r: seeds.index(r["seed"])):
        scores.setdefault(result["name"], []).append(result["accuracy"])
        cam.setdefault(result["name"], []).append(result["cam"])
        if "curve" in result:
            curves.setdefault(result["name"], []).append([(0.0, zero_shot), *result["curve"]])
    for name, of_seeds in curves.items():
        halves = [dict(curve)[0.5] for curve in of_seeds]
        scores["wise-ft" if name == "ft" else f"wise-{name}"] = halves
    methods = {
        name: {
            "id": [s["id"] for s in of_seeds],
            "ood": {ood: [s[ood] for s in of_seeds] for ood in OOD_SETS},
            "ood_mean": [sum(s[ood] for ood in OOD_SETS) / len(OOD_SETS) for s in of_seeds],
        }
        for name, of_seeds in scores.items()
    }
    return {
        "methods": methods,
        "headline": HEADLINE,
        "seeds": list(seeds),
        "curves": curves,
        "cam": cam,
        "train_seconds": {r["name"]: round(r["train_seconds"], 1) for r in trained},
        "configs": {r["name"]: replace(TrainConfig.from_dict(r["config"]), seed=0).to_dict() for r in trained},
    }


def environment(cores: int) -> dict[str, Any]:
    """The machine and versions that a figure belongs to."""
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }

"""`cammask cam-bench`: which map of a model is the best? A table, JSON and CSV."""

from __future__ import annotations

import json
from typing import Any

from tqdm import tqdm

from cammask_fast.api.map_bench import MapScores, read_data
from cammask_fast.cam.benchmark import METRICS, MapProtocol, measure_maps
from cammask_fast.commands.audit import open_first
from cammask_fast.commands.evaluation import tell_seen
from cammask_fast.commands.predictions import write_csv
from cammask_fast.commands.shared import Options, device_of, loader_config_of, say_unreadable
from cammask_fast.distributed import World
from cammask_fast.runtime.env import launched
from cammask_fast.runtime.notices import noticed
from cammask_fast.viz.tables import markdown_table

HEADER = ("model", "data", "map", "metric", "value", "standard_error", "better")


def run_cam_bench(args: Options) -> None:
    """Run `cammask cam-bench`. Raises ValueError for options, models and data that cannot be measured."""
    if launched():
        raise ValueError("cam-bench runs in one process: start it without torchrun")
    device = device_of(args)
    if args["csv"] is not None:
        args["csv"].parent.mkdir(parents=True, exist_ok=True)
    protocol = MapProtocol(
        cams=tuple(args["cam"] or ()), groups=tuple(args["metrics"] or ()), start_layer=args["cam_start_layer"],
        contrast=args["cam_contrast"], upsample=args["upsample"],
        threshold=args["threshold"], tolerance=args["tolerance"], steps=args["steps"],
        seed=args["seed"],
    )  # fmt: skip
    opened = open_first(args, device)
    config = loader_config_of(args, device, args["csv"].parent if args["csv"] else None)
    size = opened.model.visual.config.image_size
    read = read_data(
        opened.model, opened.classes.folders, args["data"], config, masks=args["masks"], images=args["images"],
        explain=args["explain"], seed=protocol.seed,
    )  # fmt: skip
    tell_seen([read.name], opened.trained_on)
    say_unreadable(World(), read.loader)
    masks = read.coverage is not None
    with tqdm(desc="cam-bench", unit="img", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = measure_maps(
            opened.model, read.images, read.labels, coverage=read.coverage, protocol=protocol, progress=progress
        )
    scores = MapScores(found, images=len(read.images), masks=masks)
    settings = settings_of(args, protocol, size=size, device=device, masks=masks, images=scores.images)
    show(scores, settings, args)


def settings_of(args: Options, protocol: MapProtocol, *, size: int, device: str, masks: bool, images: int) -> dict[str, Any]:
    """What the figures depend on, as it is printed and written.

    Args:
        args: options of the command line.
        protocol: the settings of the metrics.
        size: the image's side.
        device: on which it was measured.
        masks: whether the objects are known.
        images: measured.

    Returns:
        Values by name.
    """
    known = "of the benchmark" if masks and args["masks"] is None else str(args["masks"] or "none")
    return {
        "model": args["model"], "data": args["data"], "masks": known,
        "images": images, "explained": args["explain"], "upsample": protocol.upsample, "threshold": protocol.threshold,
        "tolerance_px": round(protocol.tolerance * size / 224, 2), "steps": protocol.steps or size, "percents": "10 to 90",
        "cam_start_layer": protocol.start_layer, "cam_contrast": protocol.contrast, "seed": protocol.seed, "device": device,
        "passes_per_image_and_map": protocol.passes(size, masks=masks),
    }  # fmt: skip


def show(scores: MapScores, settings: dict[str, Any], args: Options) -> None:
    """Print the scores, and write `--csv`.

    Args:
        scores: by map.
        settings: what they depend on.
        args: options of the command line, of which `json` and `csv` are read.
    """
    if args["csv"] is not None:
        write_csv(args["csv"], HEADER, csv_rows(scores, settings))
    if args["json"]:
        maps = {
            name: {"values": score.values, "standard_errors": score.errors, "ms_per_image": score.milliseconds}
            for name, score in scores.items()
        }
        print(json.dumps({"settings": settings, "maps": maps, "notices": noticed()}, indent=1))
        return
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()) + "\n")
    print(markdown_table(["%, mean ± standard error", "", *scores], scores.rows()))


def csv_rows(scores: MapScores, settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A row per map and metric, and one with its time."""
    rows: list[tuple[Any, ...]] = []
    for cam, score in scores.items():
        for metric, value in score.values.items():
            higher = METRICS[metric].higher
            better = "" if higher is None else "higher" if higher else "lower"
            error = f"{score.errors[metric]:.6g}" if metric in score.errors else ""
            rows.append((settings["model"], settings["data"], cam, metric, f"{value:.6g}", error, better))
        rows.append((settings["model"], settings["data"], cam, "ms_per_image", f"{score.milliseconds:.6g}", "", "lower"))
    return rows

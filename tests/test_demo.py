"""The demo's parts at small size, in this process; the claim on the committed results."""

from __future__ import annotations

import json
import queue
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cammask_fast.cli import build_parser
from cammask_fast.commands.tiny_clip import next_commands
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import OOD_SETS
from cammask_fast.demo import run as demo
from cammask_fast.demo.report import claims, write_report
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.viz.plots import gallery

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished() -> list[dict[str, Any]]:
    """FT, FT_FD and the headline method for one seed and one epoch."""
    events: queue.Queue[int] = queue.Queue()
    demo._start_worker(events)
    wanted = [job for job in demo.jobs([0], full=False) if job.name in ("zeroshot", "ft", "ft-fd", demo.HEADLINE)]
    short = [replace(job, config=replace(job.config, epochs=1)) for job in wanted]
    results = [demo.run_job(job) for job in short]
    assert sum(events.queue) == sum(job.images for job in short), "progress counts every image once"
    return results


def test_a_demo_has_18_runs_and_the_full_one_every_strategy() -> None:
    basic = demo.jobs([0, 1, 2], full=False)
    assert len(basic) == 19
    assert sum(job.trains for job in basic) == 18
    maskings = {job.config.resolved.masking.split("(")[0] for job in demo.jobs([0], full=True)}
    assert {f"{s}Mask{f}Fill" for s in ("Obj", "Ctx", "Rand") for f in ("No", "Single", "Multi")} <= maskings


@pytest.mark.slow
def test_results_have_one_value_per_seed(finished: list[dict[str, Any]], tmp_path: Path) -> None:
    results = json.loads(json.dumps(demo.summarise(finished, [0])))
    assert set(results["methods"]) == {"zeroshot", "ft", "wise-ft", "ft-fd", demo.HEADLINE}
    for method in results["methods"].values():
        assert len(method["id"]) == len(method["ood_mean"]) == 1
        assert set(method["ood"]) == set(OOD_SETS)
        assert method["ood_mean"][0] == pytest.approx(sum(v[0] for v in method["ood"].values()) / len(OOD_SETS))
    zero = results["curves"]["ft"][0][0]
    assert zero[0] == 0
    assert zero[1]["id"] == results["methods"]["zeroshot"]["id"][0], "alpha 0 is zero-shot"
    results |= {"seconds": 1.0, "peak_rss_mb": 1, "environment": demo.environment(2)}
    gallery(tmp_path / "gallery.png", demo.gallery_rows(tiny_classifier(CLASS_NAMES), count=2))
    assert demo.HEADLINE in write_report(tmp_path, results)


@pytest.mark.slow
def test_one_epoch_learns(finished: list[dict[str, Any]]) -> None:
    zero_shot, tuned = (next(r for r in finished if r["name"] == name)["accuracy"] for name in ("zeroshot", "ft"))
    assert tuned["id"] > zero_shot["id"]


def test_the_cam_sits_on_the_digit() -> None:
    quality = demo.cam_quality(tiny_classifier(CLASS_NAMES))["mm-cam"]
    assert quality["energy"] > quality["area"] + 5
    assert quality["masked"] > quality["area"] + 5


@pytest.mark.slow
def test_a_worker_error_ends_the_demo() -> None:
    job = demo.jobs([0], full=False)[0]
    broken = replace(job, config=replace(job.config, optim=replace(job.config.optim, lr=1e30), epochs=1))
    with pytest.raises(ValueError, match="the loss or the gradients were not finite"):
        demo.run_all([broken], workers=1)


def test_the_committed_results_show_the_claim() -> None:
    results = json.loads((ROOT / "bench/results/demo.json").read_text())
    assert results["seeds"] == [0, 1, 2]
    assert all(held for _, _, held in claims(results)), claims(results)


def test_unwritable_output_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        demo.run_demo(tmp_path / "file" / "demo", seeds=(0,))


def test_the_next_commands_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = next_commands(".venv/bin/cammask")
    commands = [line for line in lines if line.startswith("    ")]
    assert len(commands) == 3
    for line in commands:
        name, *words = shlex.split(line)
        assert name == ".venv/bin/cammask"
        build_parser().parse_args(words)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/cammask")
    assert next_commands("/usr/bin/cammask")[1].split()[0] == "cammask"

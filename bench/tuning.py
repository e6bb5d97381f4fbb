"""Choose the distillation weight of every demo method on validation sets: `python -m bench.tuning METHOD=W1,W2 …`.

The sets share no digit scan and no random draw with the test sets, and the training seeds (100, 101, …) are none of the demo's.
Appends one JSON line per run to bench/results/tuning.jsonl and prints the mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from cammask_fast.data.datasets.texture_digits_splits import CORRELATION, OOD_SETS, OUTLINED, TRAIN_IMAGES
from cammask_fast.demo.run import Job, run_all, tiny_config

RECORDS = Path(__file__).parent / "results" / "tuning.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", nargs="+", metavar="RECIPE[/STRATEGY]=W1,W2", help="recipe of tiny/, strategy, weights to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = []
    for entry in options.grid:
        name, _, weights = entry.rpartition("=")
        recipe, _, masking = name.partition("/")
        for weight in map(float, weights.split(",")):
            for seed in options.seeds:
                config: dict[str, Any] = {"w_distill": weight, "masking": masking}
                if options.epochs:
                    config["epochs"] = options.epochs
                if options.lr:
                    config["optim"] = {"lr": options.lr}
                jobs.append(
                    Job(
                        name=f"{name}={weight:g}", config=tiny_config(recipe, seed, **config), curve=recipe == "ft", scans="val"
                    )
                )
    rows = defaultdict(list)
    with RECORDS.open("a") as records:
        for result in run_all(jobs, workers=options.workers):
            scores = [(result["name"], result["accuracy"])]
            scores += [(f"wise-ft alpha={alpha:g}", of_alpha) for alpha, of_alpha in result.get("curve", [])]
            for name, accuracy in scores:
                record = {"name": name, "seed": result["seed"], "config": result["config"], "accuracy": accuracy}
                setting = {"correlation": CORRELATION, "outlined": OUTLINED, "images": TRAIN_IMAGES}
                records.write(json.dumps(record | setting) + "\n")
                rows[name].append((accuracy["id"], *(accuracy[s] for s in OOD_SETS)))
    for name, of_seeds in rows.items():
        means = [statistics.mean(column) for column in zip(*of_seeds, strict=True)]
        ood = statistics.mean(means[1:])
        sets = "  ".join(f"{s} {m:.1f}" for s, m in zip(OOD_SETS, means[1:], strict=True))
        print(f"{name:42s} ID {means[0]:.2f}  OOD {ood:.2f}  both {(means[0] + ood) / 2:.2f}  | {sets}")


if __name__ == "__main__":
    main()

"""Training time until 99 % of the final in-distribution accuracy on the embedded benchmark, ours against the authors' step.

Both train the shipped tiny CLIP with the demo's settings on the same batches; evaluation is not part of the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from bench.records import cpu_environment
from bench.step.authors import build_authors_step
from cammask_fast.config import TrainConfig
from cammask_fast.data.datasets.texture_digits import CLASS_NAMES
from cammask_fast.data.datasets.texture_digits_splits import evaluation_splits, training_splits
from cammask_fast.demo.run import tiny_config
from cammask_fast.evaluate import accuracy
from cammask_fast.model.zero_shot import tiny_classifier
from cammask_fast.optim import build_schedule
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness
from cammask_fast.viz.tables import markdown_table

EVERY = 8
"""Steps between two evaluations."""
SHARE = 0.99


def train(provider: str, config: TrainConfig) -> list[tuple[float, float]]:
    """(seconds of training so far, accuracy in percent) after every EVERY steps."""
    teacher = tiny_classifier(CLASS_NAMES).frozen_copy()
    student = teacher.frozen_copy().train()
    loader, _ = training_splits(config.seed, batch_size=config.batch_size)
    test = evaluation_splits()["id"]
    state = TrainState.create(student, config, steps_per_epoch=len(loader))
    train_step = build_train_step(state, teacher, config)
    c = config.optim
    adamw = AdamW(student.parameters(), lr=c.lr, betas=(0.9, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
    schedule = build_schedule(adamw, c, total_steps=config.epochs * len(loader))
    authors, strategy, patches = (
        build_authors_step(student, teacher, config),
        build_strategy(config),
        student.visual.config.patches,
    )
    curve, spent, steps = [], 0.0, 0
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            draws = sample_step_randomness(strategy, batch, patches, state.generator)
            started = time.perf_counter()
            if provider == "ours-eager":
                train_step([(batch, draws)])
            else:
                adamw.zero_grad(set_to_none=True)
                authors(batch, draws)
                clip_grad_norm_(student.parameters(), c.clip_norm)
                adamw.step()
                schedule.step()
            spent, steps = spent + time.perf_counter() - started, steps + 1
            if steps % EVERY == 0:
                curve.append((spent, accuracy(student.eval(), test)))
                student.train()
    return curve


def seconds_until(curve: Sequence[tuple[float, float]], *, share: float = SHARE) -> float:
    """Seconds at the first evaluation that reaches `share` of the last one."""
    return next(seconds for seconds, reached in curve if reached >= share * curve[-1][1])


def measure(mode: str, *, seeds: int) -> list[dict[str, Any]]:
    """A record per provider and seed, in turn. Raises ValueError below five seeds."""
    if seeds < 5:
        raise ValueError("--time-to-accuracy: at least 5 seeds")
    records = []
    for seed in range(seeds):
        config = tiny_config(mode, seed)
        for provider in ("authors", "ours-eager"):
            curve = train(provider, config)
            records.append(
                {
                    "op": "time-to-accuracy", "provider": provider, "mode": mode, "seed": seed, "seconds": seconds_until(curve),
                    "final_accuracy": curve[-1][1], "seconds_in_total": curve[-1][0], **cpu_environment(),
                }
            )  # fmt: skip
    return records


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over the seeds."""
    rows, keys = [], ("seconds", "seconds_in_total", "final_accuracy")
    for provider in ("authors", "ours-eager"):
        columns = [[r[key] for r in records if r["provider"] == provider] for key in keys]
        rows.append([provider, *(f"{mean(column):.1f} ± {stdev(column):.1f}" for column in columns)])
    return markdown_table(["provider", "s to 99 % of the final ID accuracy", "s of training", "final ID accuracy, %"], rows)

"""What a finished training says of itself: zero-shot against fine-tuned, alarms, and `report.html`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cammask_fast.config import TrainConfig
from cammask_fast.data.factory import TrainingData
from cammask_fast.evaluate import confusion_counts
from cammask_fast.model.classifier import Classifier
from cammask_fast.runtime.notices import warn
from cammask_fast.viz.run_report import counterfactuals, write_run_report

MOST_SKIPPED = 0.01
"""Share of the steps that may be skipped before a run says so."""


def alarms(
    before: float | None, after: float | None, *, skipped: int, steps: int, started_from: str = "the zero-shot model"
) -> list[str]:
    """Sentences about a run that did not do what it should.

    Args:
        before: accuracy on the validation images of what the run started from, percent; None without any.
        after: that of the best checkpoint.
        skipped: steps whose loss or gradient was not finite.
        steps: of the run.
        started_from: words for what the run started from.

    Returns:
        The sentences; none for a run that went well.
    """
    found = []
    if before is not None and after is not None and after <= before:
        found.append(
            f"nothing was learnt: the best checkpoint has {after:.2f} % on the validation images and {started_from} "
            f"{before:.2f} %; try a higher --lr, more --epochs or a lower --w-distill"
        )
    if skipped > MOST_SKIPPED * steps:
        found.append(f"{skipped} of {steps} steps were skipped, as their loss or gradients were not finite: try a lower --lr")
    return found


def validated(before: float | None, after: float | None) -> str:
    """The two accuracies in words, empty without validation images."""
    if after is None:
        return ""
    if before is None:
        return f"validation accuracy {after:.2f} %, "
    return f"validation accuracy {after:.2f} % (zero-shot {before:.2f} %), "


def report(
    out: Path, record: Mapping[str, Any], zero_shot: Classifier, best: Classifier, data: TrainingData, config: TrainConfig
) -> list[str]:
    """Print the alarms of a run and write its report. A report that cannot be made never costs the run.

    Args:
        out: folder of the run.
        record: what `run.json` holds.
        zero_shot: the model before training.
        best: the best checkpoint.
        data: loaders and classes of the run.
        config: settings of the run.

    Returns:
        The alarms.
    """
    started, after = (record[name].get("validation") for name in ("start" if "init" in record else "zero_shot", "accuracy"))
    name = record.get("init", "the zero-shot model")
    said = alarms(started, after, started_from=name, skipped=record["skipped_steps"], steps=config.epochs * len(data.train))
    for line in said:
        print(f"cammask: {line}", file=sys.stderr)
    try:
        gallery = counts = None
        if data.validation is not None:
            counts = confusion_counts(best, data.validation, device=record["device"])
            batch = next(iter(data.validation)).to(record["device"])
            gallery = counterfactuals(zero_shot, best, batch.images, batch.labels, data.class_names, config)
        write_run_report(out, record, gallery=gallery, counts=counts, alarms=said)
    except Exception as error:  # the weights are written: pictures must not turn success into failure
        warn(f"no {out / 'report.html'} ({type(error).__name__}: {error})")
    return said

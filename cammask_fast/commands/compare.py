"""`cammask compare RUN…`: accuracies by method, paired differences, settings that differ; a table, JSON and HTML."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy.stats import t as student_t

from cammask_fast.commands.shared import Options
from cammask_fast.runtime.files import write_text
from cammask_fast.viz.html import Picture, picture, render
from cammask_fast.viz.run_report import read_log
from cammask_fast.viz.tables import markdown_table

ID = "validation"
STAR = "* where a 95 % interval (t) excludes zero."


class Group(NamedTuple):
    """Runs that differ in their seed alone. records: what their run.json hold, by seed."""

    name: str
    records: dict[int, Mapping[str, Any]]

    def values(self, data: str) -> dict[int, float]:
        """Accuracy in percent on an evaluation set, by seed."""
        found = {seed: accuracies(record).get(data) for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}


class Table(NamedTuple):
    """A table of the comparison, for the terminal and the page."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: str = ""


def run_compare(args: Options) -> None:
    """Run `cammask compare`: print tables of several runs, or write them as a page."""
    runs = [(path, read_run(path)) for path in args["runs"]]
    groups = grouped(runs)
    tables = [accuracy_table(groups), *paired_tables(groups), settings_table(groups)]
    if args["json"]:
        print(json.dumps({group.name: {name: group.values(name) for name in sets(groups)} for group in groups}, indent=1))
    else:
        for table in tables:
            print(f"{table.title}\n\n{markdown_table(table.header, table.rows)}\n")
            if STAR in table.text:
                print(f"{STAR}\n")
    if args["html"] is not None:
        title = f"{len(runs)} runs: {', '.join(group.name for group in groups)}"
        page = render(
            "compare.html", title=title, tables=tables, pictures=[*trade_off(groups), *epoch_curves(runs), *loss_curves(runs)]
        )
        args["html"].parent.mkdir(parents=True, exist_ok=True)
        write_text(args["html"], page)
        print(f"written to {args['html']}")


def read_run(path: Path) -> dict[str, Any]:
    """A finished run's run.json. Raises ValueError for a folder that holds none."""
    file = path / "run.json" if path.is_dir() else path
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        assert {"method", "seed"} <= record["config"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"{path} holds no finished run: expected a folder of `cammask train` with a run.json") from None
    return record


def accuracies(record: Mapping[str, Any]) -> dict[str, float]:
    """By evaluation set, in percent; runs of version 0.1.0 know their validation images only."""
    if "accuracy" in record:
        return dict(record["accuracy"])
    return {} if record.get("validation_accuracy") is None else {ID: record["validation_accuracy"]}


def grouped(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[Group]:
    """Runs of equal settings and data but for the seed, in the order given; a name is the method, with a folder where two
    groups share it. Raises ValueError for two runs of the same settings and seed."""
    of_settings: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for path, record in runs:
        of_settings.setdefault(json.dumps(_settings(record), sort_keys=True), []).append((path, record))
    methods = [members[0][1]["config"]["method"] for members in of_settings.values()]
    groups = []
    for members in of_settings.values():
        (first, record), method = members[0], members[0][1]["config"]["method"]
        seeds = {record["config"]["seed"]: record for _, record in members}
        if len(seeds) < len(members):
            twice = ", ".join(str(path) for path, _ in members)
            raise ValueError(f"runs with the same settings and the same seed: {twice}: give one of them")
        groups.append(Group(method if methods.count(method) == 1 else f"{method} ({first})", seeds))
    return groups


def sets(groups: Sequence[Group]) -> list[str]:
    """The evaluation sets of all runs, the validation images first."""
    names = dict.fromkeys(name for group in groups for record in group.records.values() for name in accuracies(record))
    return sorted(names, key=lambda name: name != ID)


def accuracy_table(groups: Sequence[Group]) -> Table:
    """Mean accuracy and deviation by group of runs and evaluation set."""
    names, rows = sets(groups), []
    for group in groups:
        before = [record["zero_shot"][ID] for record in group.records.values() if ID in record.get("zero_shot", {})]
        cells = [mean_std(list(group.values(name).values())) for name in names]
        rows.append([group.name, str(len(group.records)), *cells, mean_std(before)])
    header = ["run", "seeds", *names, f"zero-shot, {ID}"]
    return Table("Accuracy, %", header, rows, "Mean and standard deviation over seeds.")


def paired_tables(groups: Sequence[Group]) -> list[Table]:
    """Differences to the first group over the seeds that both have."""
    if len(groups) < 2:
        return []
    names, first, rows = sets(groups), groups[0], []
    for group in groups[1:]:
        cells = []
        for name in names:
            ours, theirs = group.values(name), first.values(name)
            differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            cells.append(mean_std(differences, sign=True) + (" *" if told_apart(differences) else ""))
        rows.append([f"{group.name} - {first.name}", *cells])
    return [Table("Paired differences, points", ["runs", *names], rows, f"Over the seeds that both have. {STAR}")]


def settings_table(groups: Sequence[Group]) -> Table:
    """The settings in which the groups differ."""
    of_group = {group.name: _settings(next(iter(group.records.values()))) for group in groups}
    keys = sorted({key for settings in of_group.values() for key in settings})
    different = [key for key in keys if len({json.dumps(settings.get(key)) for settings in of_group.values()}) > 1]
    rows = [[key, *(str(settings.get(key, "–")) for settings in of_group.values())] for key in different]
    return Table("Settings that differ", ["setting", *of_group], rows or [["none", *("" for _ in of_group)]])


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a result, without the seed, flat."""
    config = dict(record["config"])
    optim = config.pop("optim", {})
    data = {name: record.get(name) for name in ("arch", "pretrained", "init", "teacher", "data", "augment", "train_images")}
    return {name: value for name, value in {**config, **optim, **data}.items() if name != "seed"}


def mean_std(values: Sequence[float], *, sign: bool = False) -> str:
    """`81.20 ± 0.40`, without a deviation for one value, a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def told_apart(differences: Sequence[float]) -> bool:
    """Whether the 95 % t interval of the mean of paired differences excludes zero; never for fewer than two."""
    count = len(differences)
    if count < 2:
        return False
    half = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return abs(statistics.mean(differences)) > half


def trade_off(groups: Sequence[Group]) -> list[Picture]:
    """ID against the mean of the other sets, where runs have any."""
    others = [name for name in sets(groups) if name != ID]
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis, drawn = figure.subplots(), False
    for group in groups:
        found = [accuracies(record) for record in group.records.values()]
        whole = [one for one in found if others and one.keys() >= {ID, *others}]
        if whole:
            drawn = True
            axis.scatter(
                [one[ID] for one in whole], [statistics.mean(one[o] for o in others) for one in whole], label=group.name
            )
    starts = [record.get("zero_shot", {}) for group in groups for record in group.records.values()]
    known = {(one[ID], statistics.mean(one[o] for o in others)) for one in starts if others and one.keys() >= {ID, *others}}
    if drawn and known:
        axis.scatter(*zip(*sorted(known), strict=True), marker="x", color="black", label="zero-shot")
    _label(axis, f"{ID} accuracy, %", f"mean over {', '.join(others)}, %", legend=drawn)
    return [picture("In distribution against the other sets", figure)] if drawn else []


def epoch_curves(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[Picture]:
    """Validation accuracy by epoch of every run that has logged it."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis, drawn = figure.subplots(), False
    for path, record in runs:
        _, epochs = read_log(path)
        points = [(line["epoch"], line["accuracy"][ID]) for line in epochs if ID in line["accuracy"]]
        if points:
            drawn = True
            config = record["config"]
            axis.plot(*zip(*points, strict=True), marker=".", label=f"{config['method']}, seed {config['seed']}")
    _label(axis, "epoch", f"{ID} accuracy, %", legend=drawn)
    return [picture("Accuracy by epoch", figure)] if drawn else []


def loss_curves(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[Picture]:
    """Loss and its two parts by step of every run that has logged them."""
    parts = ("loss", "task", "distill")
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    axes, drawn = figure.subplots(1, len(parts)), False
    for path, record in runs:
        steps, _ = read_log(path)
        for axis, part in zip(axes, parts, strict=True):
            points = [(line["step"], line[part]) for line in steps if line.get(part) is not None]
            if points:
                drawn = True
                config = record["config"]
                axis.plot(*zip(*points, strict=True), lw=1, label=f"{config['method']}, seed {config['seed']}")
    for axis, part in zip(axes, parts, strict=True):
        _label(axis, "step", part, legend=axis.has_data() and axis is axes[0])
    return [picture("Losses by step", figure)] if drawn else []


def _label(axis: Any, x: str, y: str, *, legend: bool) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8)

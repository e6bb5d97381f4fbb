"""Tables, sentences and the HTML report of a demo, all made from its results."""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from cammask_fast.viz.plots import tradeoff
from cammask_fast.viz.tables import markdown_table

ORDER = ("zeroshot", "lp", "ft", "wise-ft", "ft-kd", "ft-fd", "masked-object", "masked-context", "masked-random", "masked-topk")
CAM_NAMES = {"mm-cam": "MM-CAM", "grad-cam": "Grad-CAM"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
"""


def mean_std(values: Sequence[float]) -> str:
    """`91.2 ± 0.4`: mean and sample standard deviation over seeds (no deviation for one seed)."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def both(method: Mapping[str, Any]) -> list[float]:
    """Mean of ID and average OOD accuracy per seed."""
    return [(i + o) / 2 for i, o in zip(method["id"], method["ood_mean"], strict=True)]


def _names(results: Mapping[str, Any]) -> list[str]:
    names = list(results["methods"])
    return sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))


def accuracy_table(results: Mapping[str, Any]) -> str:
    """Method x (ID, each shift, average OOD, mean of ID and OOD), in percent over the seeds."""
    sets = list(next(iter(results["methods"].values()))["ood"])
    rows = []
    for name in _names(results):
        method = results["methods"][name]
        cells = [method["id"], *(method["ood"][s] for s in sets), method["ood_mean"], both(method)]
        rows.append([f"**{name}**" if name == results["headline"] else name, *(mean_std(c) for c in cells)])
    return markdown_table(["method", "ID", *sets, "average OOD", "mean of ID and OOD"], rows)


def cam_table(results: Mapping[str, Any]) -> str:
    """Where the maps lie: share of CAM energy and of object-masked patches on the digit, against the digit's area."""
    rows = []
    for name in [n for n in _names(results) if n in results["cam"]]:
        for kind, label in CAM_NAMES.items():
            per_seed = [seed[kind] for seed in results["cam"][name]]
            rows.append([name, label, *(mean_std([s[key] for s in per_seed]) for key in ("energy", "masked", "area"))])
    return markdown_table(
        ["model", "map", "CAM energy on the digit, %", "masked patches on the digit, %", "digit's area, %"], rows
    )


def claims(results: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """The claims of the benchmark as (sentence, margin in points over its bar, held)."""
    methods, headline = results["methods"], results["headline"]

    def mean(name: str, key: str) -> float:
        return statistics.mean(methods[name][key])

    margins = [
        ("FT gains at least 3 points of ID over zero-shot", mean("ft", "id") - mean("zeroshot", "id") - 3),
        ("FT loses at least 3 points of average OOD to zero-shot", mean("zeroshot", "ood_mean") - mean("ft", "ood_mean") - 3),
        (f"{headline} is at least 5 OOD points above FT", mean(headline, "ood_mean") - mean("ft", "ood_mean") - 5),
        (f"{headline} keeps zero-shot's OOD within 0.5", mean(headline, "ood_mean") - mean("zeroshot", "ood_mean") + 0.5),
        (f"{headline} gains at least 3 points of ID over zero-shot", mean(headline, "id") - mean("zeroshot", "id") - 3),
    ]
    return [(sentence, margin, margin >= 0) for sentence, margin in margins]


def compared(name: str, other: str, differences: Sequence[float]) -> str:
    """One sentence on paired differences: mean, sign of each, and what a 95 % t interval says of the sign.

    Args:
        name: the method whose scores come first in each difference.
        other: the method whose scores are subtracted.
        differences: points of accuracy, `name` minus `other`, one per seed.

    Returns:
        The sentence; its verdict is `lower`, `higher` or `not told apart`.
    """
    mean, count = statistics.mean(differences), len(differences)
    shown = ", ".join(f"{d:+.2f}" for d in differences)
    text = f"{name} - {other}, mean of ID and OOD, per seed: {shown} (mean {mean:+.2f})"
    if count < 2:
        return f"{text}; one seed says nothing about the sign"
    half = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    low, high = mean - half, mean + half
    verdict = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
    signs = f"{sum(d < 0 for d in differences)} of {count} seeds negative"
    return f"{text}; 95 % interval {low:+.2f} to {high:+.2f} (t, {signs}): {verdict}"


def paired(results: Mapping[str, Any]) -> list[str]:
    """Headline minus FT_FD and WiSE-FT in the mean of ID and OOD, seed by seed, with the interval of the mean."""
    methods, headline = results["methods"], results["headline"]
    return [
        compared(headline, other, [a - b for a, b in zip(both(methods[headline]), both(methods[other]), strict=True)])
        for other in ("ft-fd", "wise-ft")
    ]


def reading(results: Mapping[str, Any]) -> list[str]:
    """What the tables show, in sentences whose signs and sizes come from the numbers."""
    methods = results["methods"]
    means = {name: {key: statistics.mean(methods[name][key]) for key in ("id", "ood_mean")} for name in _names(results)}
    zero, tuned = means["zeroshot"], means["ft"]
    flipped = statistics.mean(methods["ft"]["ood"]["flipped"]) - statistics.mean(methods["zeroshot"]["ood"]["flipped"])
    lines = [
        f"ft against zero-shot: {tuned['id'] - zero['id']:+.1f} points of ID, {flipped:+.1f} with the background flipped, "
        f"{tuned['ood_mean'] - zero['ood_mean']:+.1f} of average OOD"
    ]
    robust = [
        f"{name} ({m['id'] - zero['id']:+.1f} ID, {m['ood_mean'] - zero['ood_mean']:+.1f} OOD)"
        for name, m in means.items()
        if name != "zeroshot" and m["ood_mean"] >= zero["ood_mean"] - 0.5
    ]
    lines.append(f"methods that keep zero-shot's average OOD within 0.5 points: {', '.join(robust) or 'none'}")
    cam, headline = results["cam"], results["headline"]
    if "ft" in cam and headline in cam:
        for kind, label in CAM_NAMES.items():
            plain, masked = (statistics.mean(seed[kind]["energy"] for seed in cam[name]) for name in ("ft", headline))
            area = statistics.mean(seed[kind]["area"] for seed in cam[headline])
            lines.append(
                f"{label} energy on the digit: {masked:.1f} % after {headline}, {masked - plain:+.1f} points against ft, "
                f"{masked - area:+.1f} against the digit's area (chance)"
            )
    return lines


def summary(results: Mapping[str, Any]) -> str:
    """The report in Markdown: accuracies, claims, paired differences, CAM localisation, machine."""
    held = [f"- [{'x' if ok else ' '}] {sentence} (margin {margin:+.1f})" for sentence, margin, ok in claims(results)]
    sentences = [f"- {line}" for line in [*reading(results), *paired(results)]]
    return "\n".join([accuracy_table(results), "", *held, *sentences, "", cam_table(results), "", machine(results)])


def machine(results: Mapping[str, Any]) -> str:
    """Seeds, time, memory, machine and date of a demo, in one line."""
    env = results["environment"]
    return (
        f"{len(results['seeds'])} seeds; {results['seconds']:.0f} s and {results['peak_rss_mb']} MB on {env['cores']} cores "
        f"({env['cpu']}), torch {env['torch']}, {env['date']}"
    )


def accuracy_section(results: Mapping[str, Any]) -> str:
    """The short report in Markdown: accuracies, what they show, paired differences, machine and command."""
    sentences = [f"- {line}" for line in [*reading(results)[:2], *paired(results)]]
    command = "`make demo-full`" if results.get("full") else "`make demo`"
    return "\n".join([accuracy_table(results), "", *sentences, "", f"{command}: {machine(results)}"])


def _centres(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    methods = results["methods"]
    return {n: (statistics.mean(methods[n]["id"]), statistics.mean(methods[n]["ood_mean"])) for n in _names(results)}


def mean_curves(results: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Per interpolated method the (ID, average OOD) means over seeds, by alpha; alpha 1 is the method itself."""
    curves = {}
    centres = _centres(results)
    for name, per_seed in results["curves"].items():
        points = []
        for same_alpha in zip(*per_seed, strict=True):
            scores = [score for _, score in same_alpha]
            ood = [statistics.mean(v for k, v in s.items() if k != "id") for s in scores]
            points.append((statistics.mean(s["id"] for s in scores), statistics.mean(ood)))
        curves[f"zero-shot to {name} (WiSE-FT)"] = [*points, centres[name]]
    return curves


def write_report(out: Path, results: Mapping[str, Any]) -> str:
    """Write tradeoff.png, table.md and report.html to `out`, which holds gallery.png; returns the Markdown summary."""
    tradeoff(out / "tradeoff.png", _centres(results), mean_curves(results))
    text = summary(results)
    (out / "table.md").write_text(text + "\n")
    shown = (("ID against OOD", "tradeoff.png"), ("Counterfactuals", "gallery.png"))
    encoded = {title: base64.b64encode((out / name).read_bytes()).decode() for title, name in shown}
    pictures = "".join(f'<h2>{t}</h2><img alt="{t}" src="data:image/png;base64,{data}">' for t, data in encoded.items())
    held = "".join(
        f"<li>{'&#10003;' if ok else '&#10007;'} {html.escape(s)} (margin {m:+.1f})</li>" for s, m, ok in claims(results)
    )
    held += "".join(f"<li>{html.escape(line)}</li>" for line in [*reading(results), *paired(results)])
    settings = html.escape(json.dumps(dict(results["configs"], environment=results["environment"]), indent=1))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>cammask demo</title>
<style>{STYLE}</style>
<h1>Fine-tuning with counterfactual masked images</h1>
<p>Texture digits, accuracy in percent, mean ± std over seeds {", ".join(map(str, results["seeds"]))}.</p>
{_html_table(accuracy_table(results))}
<ul>{held}</ul>
{pictures}
<h2>Where the maps look</h2>
{_html_table(cam_table(results))}
<h2>Settings and machine</h2>
<pre>{settings}</pre>
<p>{results["seconds"]:.0f} s, peak memory {results["peak_rss_mb"]} MB.</p>
</html>
"""
    (out / "report.html").write_text(page)
    return f"{text}\n\nwritten to {out}: report.html, results.json, table.md, gallery.png, tradeoff.png"


def _html_table(markdown: str) -> str:
    lines = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    head = "".join(f"<th>{cell}</th>" for cell in lines[0])
    body = "".join("<tr>" + "".join(f"<td>{cell.replace('**', '')}</td>" for cell in line) + "</tr>" for line in lines[2:])
    return f"<table><tr>{head}</tr>{body}</table>"

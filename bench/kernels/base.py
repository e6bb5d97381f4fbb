"""Today's kernel benchmark with the kernels of another commit, in turn with those of this checkout.

The other commit stands in a temporary git worktree. A process per benchmark and tree runs the benchmark of this checkout; the
processes of the other tree import their `cammask_fast` from there, and all of them take turns in one run.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.records import ROOT, cpu_environment, interleaved
from bench.step.lanes import lanes
from cammask_fast.viz.tables import markdown_table

NOW, BASE = "now", "base"
OPS = ("counterfactual", "cls_relevance")


class Case(NamedTuple):
    """patches, images, side: of the fill's images. relevance_images, heads: of the relevance's layer."""

    patches: int
    images: int
    side: int
    relevance_images: int
    heads: int


@contextmanager
def checked_out(ref: str) -> Iterator[tuple[str, Path]]:
    """The short hash of a commit, and a folder from which its `cammask_fast`, and nothing else, can be imported.

    Raises:
        ValueError: git does not know the commit, or this is no git checkout.
    """
    with tempfile.TemporaryDirectory(prefix="cammask-base-") as temporary:
        tree, package = Path(temporary, "tree"), Path(temporary, "package")
        commit = _git("rev-parse", "--short", "--verify", "--end-of-options", f"{ref}^{{commit}}", ref=ref)
        _git("worktree", "add", "--detach", "--force", str(tree), commit, ref=ref)
        try:
            package.mkdir()
            (package / "cammask_fast").symlink_to(tree / "cammask_fast", target_is_directory=True)
            yield commit, package
        finally:
            _git("worktree", "remove", "--force", str(tree), ref=ref)


def _git(*arguments: str, ref: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise ValueError(f"--base {ref}: {said.removeprefix('fatal: ')}; give a commit, a branch or a tag of this checkout")
    return done.stdout.strip()


def build(op: str, case: Case, package: Path) -> Callable[[], object]:
    """Build our side of a benchmark, in a process of its own, with the `cammask_fast` that this process imports.

    Args:
        op: benchmark, of `OPS`.
        case: sizes of the inputs.
        package: tree whose `cammask_fast` must have been imported.

    Returns:
        The function to time.

    Raises:
        ValueError: another tree's `cammask_fast` was imported.
    """
    import cammask_fast
    from bench.kernels import cpu

    found = Path(cammask_fast.__file__).parent
    if found.resolve() != (package / "cammask_fast").resolve():
        raise ValueError(f"imported {found} instead of the package in {package}")
    if op == "counterfactual":
        functions = cpu.counterfactual_functions(case.images, case.patches, case.side)
    else:
        functions = cpu.relevance_functions(case.relevance_images, case.patches, case.heads, cpu.HEAD_WIDTH)
    return functions["reference"]


def records(ref: str, cases: Sequence[Case], *, repeats: int, ops: Sequence[str] = OPS) -> list[dict[str, Any]]:
    """Time the benchmarks at this tree and at another commit, in turn.

    Args:
        ref: the other commit, as git names it.
        cases: sizes of the inputs.
        repeats: rounds, in each of which every function is called once.
        ops: benchmarks.

    Returns:
        A record per benchmark, case and tree.

    Raises:
        ValueError: there is no such commit, or its kernels cannot run today's benchmark.
    """
    from bench.kernels.cpu import all_cores

    found = []
    with all_cores(), checked_out(ref) as (commit, package):
        environment = cpu_environment()
        for case in cases:
            for op in ops:
                packages = {NOW: ROOT, BASE: package}
                with lanes({name: (build, (op, case, tree)) for name, tree in packages.items()}, packages=packages) as runs:
                    times = interleaved(runs, repeats=repeats)
                for tree, seconds in times.items():
                    images = case.images if op == "counterfactual" else case.relevance_images
                    what = {"op": op, "provider": tree, "mode": "forward", "patches": case.patches, "images": images}
                    found.append(what | {"dtype": "float32", "base": commit} | seconds.fields() | environment)
    return found


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: median milliseconds of both trees, and how many times as long the base takes."""
    seconds = {(r["op"], r["patches"], r["provider"]): r["seconds_p50"] for r in found}
    rows = []
    for record in found:
        if record["provider"] == NOW:
            now, base = record["seconds_p50"], seconds[record["op"], record["patches"], BASE]
            names = [record["op"], str(record["patches"]), str(record["images"])]
            rows.append([*names, f"{1e3 * now:.2f}", f"{1e3 * base:.2f}", f"{base / now:.2f}x"])
    base_name = f"{found[0]['base']}, ms" if found else BASE
    return markdown_table(["op", "patches", "images", f"{NOW}, ms", base_name, "faster"], rows)

"""`bench kernels --cpu --base REF` at a tiny size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.kernels import base
from bench.records import ROOT

TINY = base.Case(patches=4, images=4, side=28, relevance_images=1, heads=2)


def worktrees() -> str:
    return subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_commit_against_this_checkout() -> None:
    found = base.records("HEAD", [TINY], repeats=3, ops=["cls_relevance"])
    assert [(r["op"], r["provider"], r["patches"], r["images"]) for r in found] == [
        ("cls_relevance", "now", 4, 1), ("cls_relevance", "base", 4, 1)
    ]  # fmt: skip
    assert all(0 < r["seconds_p20"] <= r["seconds_p50"] <= r["seconds_p80"] for r in found)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {head.startswith(r["base"]) for r in found} == {True}


def test_only_the_package_of_the_commit_is_imported_from_its_worktree() -> None:
    with base.checked_out("HEAD") as (_, package):
        assert [path.name for path in package.iterdir()] == ["cammask_fast"]
        source = package / "cammask_fast" / "kernels" / "cls_relevance.py"
        assert ROOT not in source.resolve().parents
        committed = subprocess.run(
            ["git", "show", "HEAD:kernels/cls_relevance.py"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        assert source.read_bytes() == committed
        with pytest.raises(ValueError, match=r"imported .* instead of the package in"):
            base.build("cls_relevance", TINY, package)  # in this process, which has imported today's
        assert str(package.parent) in worktrees()
    assert not package.exists()
    assert str(package.parent) not in worktrees()


def test_the_table_has_the_ratio_of_the_medians() -> None:
    record = {"op": "counterfactual", "patches": 49, "images": 64, "base": "abc1234", "seconds_p20": 0.0, "seconds_p80": 9.0}
    found = [record | {"provider": "now", "seconds_p50": 0.002}, record | {"provider": "base", "seconds_p50": 0.005}]
    title, _, row = base.markdown(found).splitlines()
    assert "abc1234, ms" in title
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["counterfactual", "49", "64", "2.00", "5.00", "2.50x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cpu", "--base", "no-such-commit"], "--base no-such-commit: Needed a single revision; give a commit"),
        (["--cpu", "--base", "--help"], "expected one argument"),
        (["--static", "--base", "HEAD"], "--base: give it with --cpu"),
    ],
)
def test_what_cannot_be_compared_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_outside_git_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"^--base HEAD: not a git repository"), base.checked_out("HEAD"):
        pass

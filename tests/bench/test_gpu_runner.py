"""Cases of `bench gpu` in processes of their own: each way to end costs one case, and a second call goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import runner
from bench.gpu.case import Case
from bench.gpu.child import is_out_of_memory
from bench.processes import children
from bench.records import read

WHERE = {"gpu": "a GPU", "commit": "abc"}


def case(name: str, part: str = "smoke", **options: Any) -> Case:
    return Case(name=name, part=part, function=f"tests.helpers.gpu_cases:{name.split()[0]}", **options)


def outcomes(out: Path, part: str = "smoke") -> list[tuple[str, str]]:
    return [(r["case"], r["result"]) for r in read(out / f"{part}.jsonl") if r["op"] == "case"]


def test_every_way_to_end_costs_one_case(tmp_path: Path) -> None:
    """Real processes: a crash, a hang, exceptions and a lack of memory between cases that end well."""
    sign = tmp_path / "sign"
    cases = [
        case("well", arguments={"count": 2}, expected=0),
        case("crashes", expected=0, of={"op": "step", "provider": "ours"}),
        case("hangs", arguments={"sign": str(sign)}, expected=0, limit=2),
        case("raises", arguments={"text": "CUDA error: an illegal memory access"}, expected=0),
        case("raises again", arguments={"text": "CUDA error: out of memory"}, expected=0),
        case("out_of_memory", expected=0),
        case("exits", expected=0),
        case("skips", expected=0),
        case("one needs", needs=("json", "no_such_module", "no_such.module"), expected=0),
        case("wrong", expected=0),
        case("one", expected=0),
    ]
    assert runner.run(cases, tmp_path, seconds=300, environment=WHERE) == 1
    records = read(tmp_path / "smoke.jsonl")
    assert outcomes(tmp_path) == [
        ("well", "ok"), ("crashes", "crashed"), ("hangs", "timed out"), ("raises", "failed"), ("raises again", "out of memory"),
        ("out_of_memory", "out of memory"), ("exits", "crashed"), ("skips", "skipped"), ("one needs", "skipped"),
        ("wrong", "failed"), ("one", "ok"),
    ]  # fmt: skip
    ended = {r["case"]: r for r in records if r["op"] == "case"}
    assert ended["crashes"]["error"] == "SIGSEGV: about to crash"
    assert ended["crashes"]["of"] == {"op": "step", "provider": "ours"}
    assert ended["hangs"]["error"] == "stopped after 2 s"
    assert ended["hangs"]["seconds"] >= 2
    assert ended["raises"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert ended["exits"]["error"].startswith("exit code 7")
    assert ended["skips"]["error"] == "needs a better machine"
    assert ended["one needs"]["error"] == "needs no_such_module, no_such.module"
    assert ended["wrong"]["error"] == "1 of its records: 1 is not 2"
    assert all(r["gpu"] == "a GPU" and r["part"] == "smoke" and r["seconds"] >= 0 for r in ended.values())
    measured = [(r["case"], r.get("number")) for r in records if r["op"] != "case"]
    assert measured == [
        ("well", 0), ("well", 1), ("crashes", None), ("hangs", None), ("raises", None), ("raises again", None), ("wrong", 0),
        ("wrong", None), ("one", None),
    ], "what was measured before the end is kept"  # fmt: skip
    assert int(sign.read_text()) not in children(1), "the children of a killed case are killed"
    assert not Path(f"/proc/{sign.read_text()}").exists() or "zombie" in Path(f"/proc/{sign.read_text()}/status").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert "==== crashes\nabout to crash\n" in log
    assert "Traceback" in log


class Clock:
    """Time passes when a pretended case runs."""

    def __init__(self, seconds: dict[str, float]):
        self.now, self.seconds, self.ran = 0.0, seconds, list[tuple[str, float]]()

    def __call__(self) -> float:
        return self.now

    def execute(self, case: Case, _: Path, limit: float) -> dict[str, Any]:
        self.ran.append((case.name, limit))
        took = self.seconds[case.name]
        self.now += min(took, limit)
        return {"result": "timed out", "error": f"stopped after {limit:.0f} s"} if took > limit else {"result": "ok"}


def dry_run(cases: Sequence[Case], out: Path, seconds: float, clock: Clock, **options: Any) -> int:
    return runner.run(cases, out, seconds=seconds, clock=clock, execute=clock.execute, **options)


def test_the_budget_is_kept_and_a_second_call_goes_on(tmp_path: Path) -> None:
    cases = [case("a", expected=30), case("b", expected=60, limit=90), case("c", expected=50), case("d", "step", expected=10)]
    clock = Clock({"a": 30, "b": 80, "c": 40, "d": 10})
    assert dry_run(cases, tmp_path, 100, clock) == 0
    assert clock.ran == [("a", 100), ("b", 70)], "the last one may not outlast the call"
    assert clock.now == 100
    assert outcomes(tmp_path) == [("a", "ok"), ("b", "not run"), ("c", "not run")]
    assert [r["error"] for r in read(tmp_path / "smoke.jsonl")[1:]] == ["out of time, stopped after 70 s", "out of time"]
    assert outcomes(tmp_path, "step") == [("d", "not run")]
    second = Clock({"b": 80, "c": 40, "d": 10})
    with (tmp_path / "smoke.jsonl").open("a") as file:
        file.write('{"op": "case", "case": "c", "resu')  # a machine that lost its power
    assert dry_run(cases, tmp_path, 100, second) == 0
    assert [name for name, _ in second.ran] == ["b", "d"], "what has ended is not repeated, and a short case still fits"
    third = Clock({"c": 40})
    assert dry_run(cases, tmp_path, 100, third) == 0
    assert [name for name, _ in third.ran] == ["c"]
    assert dry_run(cases, tmp_path, 100, Clock({})) == 0


def test_a_hang_costs_its_own_limit_and_is_not_repeated(tmp_path: Path) -> None:
    cases = [case("a", expected=5, limit=50), case("b", expected=5)]
    clock = Clock({"a": 1000, "b": 5})
    assert dry_run(cases, tmp_path, 100, clock) == 1
    assert clock.now == 55
    assert outcomes(tmp_path) == [("a", "timed out"), ("b", "ok")]
    assert dry_run(cases, tmp_path, 100, Clock({})) == 0


def test_a_part_has_a_budget_of_its_own(tmp_path: Path) -> None:
    cases = [case("a", expected=20), case("b", expected=20), case("c", "step", expected=20)]
    clock = Clock({"a": 35, "b": 20, "c": 20})
    assert dry_run(cases, tmp_path, 1000, clock, part_seconds={"smoke": 50}) == 0
    assert clock.ran == [("a", 50), ("c", 120)]
    assert outcomes(tmp_path) == [("a", "ok"), ("b", "not run")]


def test_no_case_that_cannot_fit_is_started(tmp_path: Path) -> None:
    clock = Clock({"a": 1})
    assert dry_run([case("a", memory=5), case("b", memory=int(9e9))], tmp_path, 100, clock, free=int(8e9)) == 0
    assert [name for name, _ in clock.ran] == ["a"]
    assert read(tmp_path / "smoke.jsonl")[1]["error"] == "needs 9.0 GB of GPU memory, 8.0 GB are free"


def test_a_case_travels_as_json() -> None:
    one = case("a", arguments={"shapes": [[1, 2]]}, needs=("x",), of={"op": "step"})
    assert Case.from_json(one.to_json()) == one
    assert json.loads(one.to_json())["limit"] == 120


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_lack_of_memory_has_many_names(text: str, expected: bool) -> None:
    assert is_out_of_memory(text) == expected

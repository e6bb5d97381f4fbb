"""What `bench gpu` measures: the list of its cases, and the command."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.__main__ import main
from bench.gpu import (
    cases,
    runner,
    smoke,
)
from bench.gpu.case import PARTS
from bench.records import ROOT
from bench.step.ablations import ABLATIONS

WHERE = {"gpu": "a GPU", "driver": "1.2", "torch": "2.15", "triton": "3.9", "commit": "abc"}


def test_the_cases_come_in_the_order_of_their_value() -> None:
    found = cases.all_cases()
    assert len({case.name for case in found}) == len(found)
    parts = [case.part for case in found]
    assert list(dict.fromkeys(parts)) == list(PARTS)
    assert parts == sorted(parts, key=PARTS.index), "a part is not begun again"
    assert found[0].name == "smoke device"
    of_smoke = [case for case in found if case.part == "smoke"]
    assert sum(case.expected for case in of_smoke) <= cases.PART_SECONDS["smoke"] == 300
    assert sum(case.function.endswith("smoke:correctness") for case in of_smoke) == len(smoke.GROUPS)
    names = [case.name for case in found if case.part == "step"]
    assert names[:5] == [
        "step ours-compiled ViT-B/16 masked-object", "step ours-compiled ViT-B/16 masked-topk",
        "step authors-compiled ViT-B/16 masked-object", "step ours-compiled ViT-B/32 masked-object",
        "step ours-compiled ViT-L/14 masked-object",
    ]  # fmt: skip
    assert {name.split()[1] for name in names if name.startswith("ablation")} == {"ours-eager", *ABLATIONS}
    modes = {
        (case.arguments["batches"][0], case.arguments["compile"]) for case in found if case.arguments.get("op") == "step-small"
    }
    assert modes == {(batch, mode) for batch in (32, 64) for mode in ("default", "reduce-overhead")}
    shares = {case.arguments["share"] for case in found if case.part == "data" and case.arguments["loader"] == "dali"}
    assert {0.65, 0.75} < shares
    assert {case.arguments["loader"] for case in found if case.part == "data"} == {"dali", "torch"}


def test_every_case_is_a_function_that_takes_its_arguments() -> None:
    for case in cases.all_cases():
        module, _, name = case.function.partition(":")
        inspect.signature(getattr(import_module(module), name)).bind(**case.arguments)
        assert 0 < case.expected <= case.limit, case.name
        json.loads(case.to_json())


BARE = """
import sys
from importlib.machinery import PathFinder
HIDDEN = ("open_clip", "torchvision", "timm", "nvidia.dali", "pytest", "pytest_benchmark", "hypothesis", "matplotlib",
          "sklearn", "skimage", "safetensors", "tqdm")
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name in HIDDEN else find(name, *rest))
import importlib, json
from pathlib import Path
from bench.gpu.cases import all_cases
from bench.gpu import child
from dataclasses import replace
ended = {}
for case in all_cases():
    if case.needs:
        ended[case.name] = child.run(case, Path("/nowhere"))
    else:
        module, _, name = case.function.partition(":")
        getattr(importlib.import_module(module), name)
print(json.dumps(ended))
"""


@pytest.mark.slow
def test_a_bare_machine_skips_what_it_lacks_and_runs_the_rest() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    assert {outcome["result"] for outcome in ended.values()} == {"skipped"}
    assert {name.split()[0] for name in ended} == {"data", "tests"}
    assert ended["data decode dali hardware share 0.75"]["error"] == "needs nvidia.dali, torchvision"
    assert ended["tests tests/test_step_on_gpu.py"]["error"] == "needs pytest, hypothesis"


def test_the_command_runs_the_first_cases_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(chosen: list[Any], out: Path, **options: Any) -> int:
        seen.update(options, names=[case.name for case in chosen], out=out)
        return 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "probe", lambda: (5, WHERE))
    monkeypatch.setattr(runner, "run", run)
    out = tmp_path / "new" / "records"
    assert main(["gpu", "--out", str(out), "--first", "2", "--seconds", "60"]) == 1
    assert out.is_dir()
    assert seen["names"] == ["smoke device", "smoke correctness object"]
    assert (seen["seconds"], seen["free"], seen["environment"], seen["part_seconds"]["smoke"]) == (60, 5, WHERE, 300)
    main(["gpu", "--out", str(out), "--part", "tests"])
    assert seen["names"][0] == "tests tests/test_step_on_gpu.py"
    assert seen["names"][-1] == "tests memcheck"


def test_a_card_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROBE", "raise SystemExit('driver too old')")
    with pytest.raises(ValueError, match=r"^the CUDA device does not answer: driver too old$"):
        gpu.probe()
    monkeypatch.setattr(gpu, "PROBE", "print('hello'); print('[7, {\"gpu\": \"a\"}]')")
    assert gpu.probe() == (7, {"gpu": "a"})

"""`cammask doctor`: a line per part, and exit code 1 when one is broken."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

from cammask_fast.cli import main
from cammask_fast.commands import doctor


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    found = {one["name"]: one for one in report["findings"]}
    assert f"torch {torch.__version__.split('+')[0]}" in found["versions"]["text"]
    assert all(name in found["kernels"]["text"] for name in doctor.SELF_TESTS)
    assert ("device cuda" if torch.cuda.is_available() else "device cpu") in found["defaults"]["text"]


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_kernel_that_disagrees_is_broken(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda device: {"fill": wrong})
    monkeypatch.setattr(doctor, "interpreted_self_test", lambda: {"relevance": 0.0, "fill": wrong})
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert len(text.splitlines()) == len(doctor.CHECKS)
    assert "they disagree" in text


def test_a_self_test_that_dies_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> dict[str, float]:
        raise subprocess.CalledProcessError(1, "python", stderr="Traceback\nValueError: no kernel\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "interpreted_self_test", die)
    finding = doctor.kernels()
    assert (finding.state, "ValueError: no kernel" in finding.text) == ("broken", True)


def test_the_self_test_compares_triton_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def choose(backend: str) -> str:
        chosen.append(backend)
        return "auto"

    monkeypatch.setattr(doctor, "set_backend", choose)
    shifted = iter([0.0, 0.25])
    assert doctor._difference(lambda: (torch.tensor([next(shifted)]),)) == 0.25
    assert chosen == ["triton", "auto", "reference", "auto"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.compiler().state == "note"
    assert "needs one" in doctor.compiler().text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.dali().state == "note"
    assert "pip install 'cammask-fast[dali-cuda1" in doctor.dali().text


def test_dali_that_cannot_be_loaded_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)  # importing it raises
    finding = doctor.dali()
    assert finding.state == "broken"
    assert "cannot be loaded" in finding.text

"""Functions in processes of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.step.lanes import lanes


def sleeps(seconds: float) -> Callable[[], object]:
    return lambda: time.sleep(seconds)


def fails_at_call(number: int) -> Callable[[], object]:
    calls: list[int] = []

    def function() -> None:
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("out of luck")

    return function


def notes_itself(folder: Path) -> Callable[[], object]:
    def function() -> None:
        with (folder / str(os.getpid())).open("a") as file:
            file.write(f"{torch.get_num_threads()}\n")

    return function


def dies_soon() -> Callable[[], object]:
    """A tenth of a second after its first call, as if the kernel had ended it for its memory."""

    def function() -> None:
        threading.Timer(0.1, os._exit, (9,)).start()

    return function


def dies_in_its_second_call() -> Callable[[], object]:
    calls: list[int] = []

    def function() -> None:
        calls.append(1)
        if len(calls) == 2:
            os._exit(9)

    return function


def test_every_call_runs_once_in_the_lanes_own_process(tmp_path: Path) -> None:
    with lanes(dict.fromkeys(("a", "b"), (notes_itself, (tmp_path,)))) as opened:
        for lane in (opened["a"], opened["b"], opened["a"]):
            lane()
        assert opened["a"].first_seconds > 0
    files = list(tmp_path.iterdir())
    assert str(os.getpid()) not in [file.name for file in files]
    assert sorted(len(file.read_text().split()) for file in files) == [2, 3], "the first call is made at the start"
    assert {line for file in files for line in file.read_text().split()} == {str(torch.get_num_threads())}


def test_a_call_takes_as_long_as_its_function() -> None:
    with lanes({"slow": (sleeps, (0.3,))}) as opened:
        started = time.perf_counter()
        assert 0.3 <= opened["slow"]() <= time.perf_counter() - started
        assert opened["slow"].first_seconds >= 0.3


def test_an_error_has_the_name_of_its_lane_and_its_message() -> None:
    with (
        pytest.raises(ValueError, match=r"^second: RuntimeError: out of luck$"),
        lanes({"first": (sleeps, (0,)), "second": (fails_at_call, (1,))}),
    ):
        pass
    with lanes({"later": (fails_at_call, (2,))}) as opened, pytest.raises(ValueError, match=r"^later: RuntimeError: out"):
        opened["later"]()


def test_a_process_that_dies_between_two_calls_is_one_line() -> None:
    with lanes({"short-lived": (dies_soon, ())}) as opened:
        time.sleep(0.5)
        with pytest.raises(ValueError, match=r"^short-lived: its process is gone$"):
            opened["short-lived"]()


def test_a_process_that_dies_in_a_call_is_one_line() -> None:
    gone = pytest.raises(ValueError, match=r"^unlucky: its process is gone$")
    with lanes({"unlucky": (dies_in_its_second_call, ())}) as opened, gone:
        opened["unlucky"]()

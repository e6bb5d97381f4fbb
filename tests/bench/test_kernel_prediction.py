"""What the relevance should take on a card: the work of its launches, the terms of the time, and the bars of the design."""

from __future__ import annotations

import pytest

from bench.kernels.prediction import UNITS, Work, markdown, predict, variants, work_of
from bench.kernels.static import BATCH, plan

PROGRAMS, LENGTH, WIDTH = BATCH * 12, 197, 64
MATRIX = BATCH * 12 * LENGTH * WIDTH * 2
ROW = BATCH * 12 * LENGTH * 4


def test_the_work_of_a_layer_is_that_of_its_padded_tiles() -> None:
    (launch,) = plan("cls_relevance", "ViT-B/16 bf16 lse layer")
    work = work_of(launch)
    elements = PROGRAMS * 256 * 224
    assert work == Work(1, work.memory, work.moved, 2 * 2 * WIDTH * elements, elements, 5 * elements)
    assert work.memory == 4 * MATRIX + 3 * ROW + 2 * ROW // 12, "q, k, v, dO; logsumexp, heads above, heads of this; r twice"
    assert work.moved == 4 * MATRIX + 2 * ROW + 12 * (ROW + ROW // 12) + ROW // 12, "every program averages the heads above"


def test_tiles_of_some_keys_read_all_queries_again() -> None:
    statistics, layer = (work_of(launch) for launch in plan("cls_relevance", "ViT-B/16 bf16 tiles layer"))
    assert statistics.flops == PROGRAMS * 7 * 32 * 256 * 2 * WIDTH
    assert statistics.moved == 8 * MATRIX + 2 * ROW, "seven blocks of queries read all keys"
    assert layer.flops == PROGRAMS * 4 * 64 * 224 * 2 * 2 * WIDTH
    assert layer.moved > 2 * MATRIX + 4 * 2 * MATRIX, "four blocks of keys read q and dO"


@pytest.mark.parametrize("card", UNITS)
def test_a_time_lies_between_perfect_and_no_overlap(card: str) -> None:
    works = [Work(1, 10**12, 10**12, 10**15, 0, 0), Work(1, 0, 0, 0, 10**13, 10**13)]
    whole = predict(works, card)
    parts = [predict([work], card) for work in works]
    assert whole.overlapped == pytest.approx(sum(part.overlapped for part in parts))
    assert whole.added == pytest.approx(sum(part.added for part in parts))
    assert 0 < whole.overlapped < whole.expected < whole.added
    exponentials, vectors = 1e13 / UNITS[card].exponentials, 1e13 / UNITS[card].vectors
    assert parts[1].overlapped == pytest.approx(1e3 * max(exponentials, vectors))
    assert parts[1].added == pytest.approx(1e3 * (exponentials + vectors))


def test_the_design_keeps_its_bars() -> None:
    """Eleven layers at batch 512: at most 11 launches and 5 ms; version 0.1 has 33 and 7 to 9."""
    before, *_, now = variants().values()
    for card in ("h100", "h200"):
        assert predict(now * 11, card).expected <= 5 < 7 < predict(before * 11, card).expected
    assert [len(works) for works in variants().values()] == [3, 2, 1, 1, 1]
    table = markdown()
    assert "predicted ms" in table
    assert table.count("\n") == 1 + len(variants())

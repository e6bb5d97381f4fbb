"""Lines about what was skipped or guessed: said once, recorded, errors with --strict."""

from __future__ import annotations

import pytest

from cammask_fast.runtime.notices import collecting, notice, noticed, remark, warn


def test_lines_are_said_once_and_recorded_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    with collecting() as notices:
        notice("2 files\nignored")
        remark("used val/")
        notice("2 files ignored")
        warn("not kept")
        assert noticed() == notices.lines == ["2 files ignored", "used val/"]
        assert notices.warnings == ["2 files ignored"]
    assert capsys.readouterr().err.splitlines() == [
        "cammask: warning: 2 files ignored", "cammask: used val/", "cammask: warning: not kept",
    ]  # fmt: skip


def test_strict_turns_notices_into_errors_and_remarks_not(capsys: pytest.CaptureFixture[str]) -> None:
    with collecting(strict=True):
        remark("used val/")
        warn("disk full")
        with pytest.raises(ValueError, match=r"2 files ignored \(an error because of --strict\)"):
            notice("2 files ignored")
    assert capsys.readouterr().err.count("\n") == 2


def test_commands_do_not_share_their_record() -> None:
    with collecting() as outer:
        notice("a")
        with collecting():
            assert noticed() == []
            notice("a")
            assert noticed() == ["a"]
        assert outer.lines == ["a"]
    assert noticed() == []


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with collecting():
        notice("a")
        assert noticed() == ["a"]
    assert capsys.readouterr().err == ""

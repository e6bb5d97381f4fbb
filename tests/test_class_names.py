"""Names of classes: which name belongs to which folder, and what is said about names that mislead."""

from __future__ import annotations

from pathlib import Path

import pytest

from cammask_fast.data.class_names import read_class_names, read_classes_file, twins
from cammask_fast.data.datasets.image_folder import scan
from tests.test_folder import make_folder

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


def names(tmp_path: Path, text: str, folders: tuple[str, ...]) -> tuple[str, ...]:
    file = tmp_path / "names.txt"
    file.write_text(text, encoding="utf-8")
    return read_class_names(file, folders)


def test_names_of_numeric_folders_come_in_numeric_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = scan(make_folder(tmp_path / "data", {str(number): 1 for number in range(12)})).folders
    assert folders[:4] == ("0", "1", "10", "11")
    found = names(tmp_path, "\n".join(NUMBERS), folders)
    assert dict(zip(folders, found, strict=True)) == {str(number): name for number, name in enumerate(NUMBERS)}
    assert capsys.readouterr().err.count("in numeric order: 0, 1, 2, 3, 4 and 7 more") == 1
    assert names(tmp_path, "three\ntwelve\n", ("12", "3")) == ("twelve", "three")
    assert names(tmp_path, "zero\none\n", ("00", "01")) == ("zero", "one")
    with pytest.raises(ValueError, match=r"the same number: write lines folder<TAB>name"):
        names(tmp_path, "one\ntwo\n", ("01", "1"))


def test_an_order_that_somebody_chose_is_kept(tmp_path: Path) -> None:
    assert names(tmp_path, "ten\ntwo\n", ("9", "10")) == ("ten", "two")
    assert names(tmp_path, "x\ny\nz\n", ("c10", "c9", "a")) == ("x", "y", "z")


def test_folders_with_two_orders_need_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match=r"two orders, class1, class10, class2 and class1, class2, class10: write lines folder<TAB>"
    ):
        names(tmp_path, "one\ntwo\nten\n", ("class1", "class10", "class2"))
    assert names(tmp_path, "x\ny\n", ("a-b", "a1")) == ("x", "y"), "not numbers of one kind"
    assert capsys.readouterr().err == ""
    assert names(tmp_path, "x\ny\n", ("Zebra", "ant")) == ("x", "y")
    assert "with upper case first: Zebra, ant" in capsys.readouterr().err
    assert names(tmp_path, "class2\ttwo\nclass1\tone\nclass10\tten\n", ("class1", "class10", "class2")) == ("one", "ten", "two")


def test_names_that_are_the_folders_own_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(tmp_path, "Dog\nred fox\ncat\n", ("cat", "dog", "red_fox")) == ("cat", "Dog", "red fox")
    assert "matched by name" in capsys.readouterr().err
    assert names(tmp_path, "cat\nDog\n", ("cat", "dog")) == ("cat", "Dog")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("folders", [("polar bear", "polar_bear"), ("Cat", "cat"), ("café", "café"), ("dog", "dog ")], ids=repr)
def test_twins_are_named(folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    read_class_names(None, (*folders, "owl"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        f"names that stand for more than one class (case, underscores and spaces aside): {folders[0]!r} and {folders[1]!r}"
        in error
    )


def test_a_repeated_name_in_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(tmp_path, "bird\ncrane\ncrane\n", ("a", "b", "c")) == ("bird", "crane", "crane")
    assert "'b' and 'c'" in capsys.readouterr().err
    assert twins(["a", "b", "A", "c_d", "c d", "C  D"]) == [[0, 2], [3, 4, 5]]


def test_numbers_say_little_in_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    for folders in (("0", "1"), ("n99999998", "n99999999")):
        read_class_names(None, folders)
        assert "only numbers or ids" in capsys.readouterr().err
    read_class_names(None, ("0", "cat"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tone\nb two\n", "line 1 has a tab and line 2 has none"),
        ("a\tone\na\ttwo\nb\tx\n", "lines 1 and 2 give the folder 'a' two names"),
        ("a\tone\nb\t\n", "line 1 has a tab and line 2 has none"),
        ("A\tone\nb\ttwo\n", r"names no class for the folders a \(did you mean 'A' for 'a'\?\)"),
        ("one\ntwo\nthree\n", "3 class names for 2 class folders: write one line per folder, or write lines folder<TAB>name"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(tmp_path, text, ("a", "b"))


def test_pairs_may_repeat_and_hold_odd_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ("a,b", "t\tab", "x ")
    assert names(tmp_path, "t\tab\ttabby\na,b\tone, two \nx\tcross\nx\tcross\n", folders) == ("one, two", "tabby", "cross")
    assert capsys.readouterr().err == ""
    names(tmp_path, "a\tx\nz\ty\n", ("a",))
    assert "folders in it that are not in the data: 1, z" in capsys.readouterr().err


def test_blank_lines_in_a_list_whose_order_counts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names(tmp_path, "\none\n\n\ntwo\n\n", ("a", "b"))
    assert "blank lines between the names, which do not count as classes: 2" in capsys.readouterr().err
    names(tmp_path, "\none\ntwo\n\n", ("a", "b"))
    assert capsys.readouterr().err == ""


def test_lists_of_classes_beside_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "classes.txt"
    for text in ("1 dog\n0 red fox\n", "0: red fox\n1: dog\n", "0\tred fox\n1,dog\n"):
        file.write_text(text)
        assert read_classes_file(file) == ("red fox", "dog")
        assert "the number before each of the 2 names is taken for its label" in capsys.readouterr().err
    file.write_text("1 dog\n2 fox\n")
    assert read_classes_file(file) == ("1 dog", "2 fox"), "numbers that are no labels belong to the names"
    file.write_text("owl\ncrane\ndog\ncrane\n")
    with pytest.raises(ValueError, match="entries 2 and 4 are both 'crane'"):
        read_classes_file(file)

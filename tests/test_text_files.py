"""Text files that people write: encodings, lists of classes, prompt templates."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cammask_fast.data.class_names import class_list, did_you_mean, match_names, read_class_names, read_classes_file
from cammask_fast.data.datasets.webdataset import shard_paths
from cammask_fast.data.text_files import printable, read_lines, read_numbered_lines
from cammask_fast.model.templates import read_templates, template_fault
from cammask_fast.model.zero_shot import tiny_classifier


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    text = f"café{end}{end}red\u2028fox{end}salt, pepper {end}"
    mark = "\ufeff" if encoding.endswith("-bom") else ""
    file = tmp_path / "names.txt"
    file.write_bytes((mark + text).encode(encoding.removesuffix("-bom")))
    assert read_numbered_lines(file) == [(1, "café"), (3, "red\u2028fox"), (4, "salt, pepper ")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat\ncaf\xe9\n", "byte 0xe9 in line 2 is not UTF-8; save it as UTF-8"),
        ("cat\ndog\n".encode("utf-16-le"), "NUL bytes, as UTF-16 without a byte order mark"),
        ("cat\n".encode("utf-32"), "it is UTF-32"),
        (b"\xff\xfea", "is not UTF-16"),
        (b"", "is empty"),
        ("\ufeff \n".encode(), "is empty"),
    ],
    ids=str,
)
def test_other_encodings_are_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"names\.txt") as raised:
        read_lines(tmp_path / "names.txt")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"cannot read .*missing\.txt as text: No such file"):
        read_lines(tmp_path / "missing.txt")


def test_every_kind_of_file_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert class_list(str(file)) == ("cat", "dog")
    assert read_classes_file(file) == ("cat", "dog")
    assert read_class_names(file, ("a", "b")) == ("cat", "dog")
    file.write_text("a photo of a {}.\n", encoding="utf-16")
    assert read_templates(file) == ("a photo of a {}.",)
    (tmp_path / "0.tar").write_bytes(b"")
    file.write_text("0.tar\n", encoding="utf-8-sig")
    assert shard_paths(str(file)) == [tmp_path / "0.tar"]


def test_a_long_list_of_classes_is_a_list(tmp_path: Path) -> None:
    wnids = [f"n{number:08d}" for number in range(30)]
    assert class_list(",".join(wnids)) == tuple(wnids)
    assert class_list("") == ()
    assert class_list(' a b , "salt, pepper",c') == ("a b", "salt, pepper", "c")
    assert class_list("x\0y") == ("x\0y",)
    for missing in ("classes.txt", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="--classes: no file at"):
            class_list(missing)


def test_names_are_matched_but_for_spaces_at_their_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert match_names(["b", "a\t", "a,b"], ["a", "b ", "a,b"]) == (["b ", "a", "a,b"], [])
    assert "class names matched but for spaces at their ends: 2, " in capsys.readouterr().err
    assert match_names(["dog", "dog "], ["dog"]) == (["dog"], ["dog "]), "two classes never become one"
    assert match_names(["a"], ["a ", " a"]) == ([], ["a"]), "which of them is not known"
    assert did_you_mean(["Red Fox", "x"], ["red_fox"]) == " (did you mean 'red_fox' for 'Red Fox'?)"
    assert did_you_mean(["x"], ["red_fox"]) == ""


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a photo of a {}, a type of {}.", "2 placeholders {}"),
        ("a {domain} of a {}.", "the placeholder {domain} means nothing"),
        ("a photo of a {0}.", "the placeholder {0} means"),
        ("a photo of a {class}.", "the placeholder {class} means"),
        ("a photo of a {c!r:>3}.", "the placeholder {c!r:>3} means"),
        ("a photo of a {:>3}.", "the placeholder {:>3} means"),
        ("a photo of a {.", "a brace without its other half"),
        ("a photo of a }.", "a brace without its other half"),
        ("a photo.", "no {} for the class name"),
        ("{{}}", "no {} for the class name"),
    ],
)
def test_a_template_that_cannot_be_used_names_file_line_and_placeholder(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "templates.txt"
    file.write_text(f"a photo of a {{}}.\n\n{line}\n")
    with pytest.raises(ValueError, match=r"templates.txt, line 3: ") as raised:
        read_templates(file)
    assert fault in str(raised.value)
    assert template_fault(line)


def test_good_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\na {{thing}} of {}\n")
    assert [template.format("cat") for template in read_templates(file)] == ["a photo of a cat.", "a {thing} of cat"]
    assert capsys.readouterr().err == ""
    file.write_text("'a photo of a {}.',\n")
    read_templates(file)
    assert "templates in quotes, which become part of the prompts: 1, the first in line 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match=re.escape("prompt template 'a {0}.': the placeholder {0} means")):
        tiny_classifier(("zero",), ("a {0}.",))


def test_printable_names() -> None:
    assert printable("café") == "café"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert printable("a\nb\tc") == "a\\x0ab\tc"

"""What the README, CONTRIBUTING.md and docs/ say is true: links, paths, tables, and every number that a script writes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

import cammask_fast
from bench import pages
from cammask_fast.config import METHODS
from tests.test_architecture import STAGES

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests/golden/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
ROOMS = ("kernels/", "cammask_fast/", "tests/", "bench/", "docs/", ".github/", ".ci/")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {slugify(title.replace("`", ""), "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    broken = []
    for link in LINK.findall(prose(path.read_text())):
        name, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths in backticks, from the root of the checkout, that do not exist. `*` matches; names such as NAME.py are patterns."""
    named = [word for code in CODE.findall(prose(text)) for word in code.split() if word.startswith(ROOMS)]
    named = [word.split("::")[0] for word in named if not re.search(r"NAME|…|<", word)]
    return [word for word in named if not list(ROOT.glob(word.rstrip("/")))]


def table(text: str, header: str) -> list[list[str]]:
    """The rows of the table whose first line starts with `header`."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_named_paths_exist(path: Path) -> None:
    assert missing_paths(path.read_text()) == []


def test_broken_links_and_paths_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[1](page.md#a-b-c) [2](#a-b-c) [3](gone.md) [4](page.md#gone) [5](https://x.org/y)\n")
    assert broken_links(page) == ["gone.md", "page.md#gone"]
    text = "`kernels/backend.py`, `kernels/`, `kernels/gone.py`, `python -m pytest tests/gone.py::test`, `tests/test_NAME.py`"
    assert missing_paths(text) == ["kernels/gone.py", "tests/gone.py"]


def undefined_names(text: str) -> list[str]:
    """Names in backticks that the file before them in the same item of a list does not define."""
    undefined = []
    for item in re.split(r"\n(?=\s*(?:\d+\.|-|##) )|\n\n", text):
        source = ""
        for code in CODE.findall(item):
            if re.fullmatch(r"[\w./]+\.py", code) and "NAME" not in code:
                source = (ROOT / code).read_text()
            elif not code.isidentifier():
                source = source if code.endswith(")") else ""
            elif source and not re.search(rf"^\s*(?:(?:def|class) {code}\b|{code}\b.*=)", source, re.MULTILINE):
                undefined.append(code)
    return undefined


def test_contributing_names_what_the_files_define() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert undefined_names(text[text.index("## Add a kernel") : text.index("## Write a benchmark")]) == []


def test_undefined_names_are_found() -> None:
    text = (
        "1. `cammask_fast/config.py`: `METHODS`, `TrainConfig`, `open_source`.\n2. `elsewhere`, `kernels/backend.py` (`GONE`)"
    )
    assert undefined_names(text) == ["open_source", "GONE"]


def test_the_readme_fits_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_readmes_rooms_are_the_stages_and_the_tree() -> None:
    rows = table((ROOT / "README.md").read_text(), "| room in `cammask_fast/`")
    names = [name for row in rows for name in CODE.findall(row[0])]
    assert [name.removesuffix("/").removesuffix(".py") for name in names] == list(STAGES)
    assert all((ROOT / "cammask_fast" / name).exists() for name in names)
    found = {path.name for path in (ROOT / "cammask_fast").iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert {name.removesuffix("/") for name in names} == found


def test_every_op_leads_to_its_four_files() -> None:
    """The table of docs/kernels.md against the ops that the kernels register."""
    registered = {
        name for path in (ROOT / "kernels").glob("*.py") for name in re.findall(r'^ *"cammask::(\w+)"', path.read_text(), re.M)
    }
    rows = table((ROOT / "docs/kernels.md").read_text(), "| op | kernel and formula")
    assert {row[0].strip("`") for row in rows} == registered
    for op, *files in rows:
        kernel, reference, test, bench = ((ROOT / name.strip("`")).read_text() for name in files)
        word = re.compile(rf"\b{op.strip('`')}\b")
        assert f'"cammask::{op.strip("`")}"' in kernel
        assert all(word.search(text) for text in (reference, test, bench)), op


def test_the_api_page_names_what_exists() -> None:
    blocks = re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.+)\])?", (ROOT / "docs/api.md").read_text(), re.M)
    assert blocks
    for module, members in blocks:
        found = importlib.import_module(module)
        assert [name for name in filter(None, members.split(", ")) if not hasattr(found, name)] == [], module


@pytest.mark.parametrize("section", [one for one in pages.SECTIONS if one.name != "model"], ids=lambda one: one.name)
def test_committed_pages_are_what_the_records_say(section: pages.Section) -> None:
    """`python -m bench report` would change nothing. (The model counts operations: test_report.py compares it.)"""
    text = (ROOT / section.page).read_text()
    assert pages.fill(text, section.name, section.text(pages.RESULTS), page=section.page) == text


def test_the_options_table_has_every_method() -> None:
    (row,) = (row for row in table((ROOT / "docs/data.md").read_text(), "| option | values |") if row[0] == "`--method`")
    assert CODE.findall(row[1]) == list(METHODS)


@pytest.mark.parametrize("path", [one for one in PAGES if one.name != "CONTRIBUTING.md"], ids=page_id)
def test_named_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", path.read_text(), re.M)) <= targets


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {cammask_fast.__version__}\n" in citation
    assert "2303.03052" in citation

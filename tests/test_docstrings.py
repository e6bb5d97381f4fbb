"""Public functions say what they do, and those with many parameters say what each of them is.

Public is what another file can use: functions and classes at the top of a module of `cammask_fast/`, `kernels/` or `bench/`,
and the methods of such classes, unless a name begins with an underscore. Special methods are described by their class. Fixtures
and `test_*` functions of `bench/kernels/` are called by pytest alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("cammask_fast", "kernels", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.relative_to(ROOT).parts[:2] != ("cammask_fast", "kernels")  # a link
]
MANY = 3
"""From so many parameters on, each has a line of its own."""
SECTIONS = ("Args", "Returns", "Yields", "Raises")
LEGEND = "kernels/__init__.py"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes and methods of a module by their qualified names."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if not any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If):
            yield from public(node.body, prefix)


def parameters(function: Function, *, method: bool) -> list[str]:
    """Names in the order of the signature, with their stars, without self or cls."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args)]
    if method and "staticmethod" not in map(ast.unparse, function.decorator_list):
        names = names[1:]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [one.arg for one in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


def sections(text: str) -> dict[str, str]:
    """The sections of a docstring by title, with their indented lines."""
    found = re.findall(r"^(\w+):\n((?:    .*\n|\n(?=    ))+)", f"{text}\n", re.MULTILINE)
    return {title: lines for title, lines in found if title in SECTIONS}


def own_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in a function but what is in functions inside of it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield child
            yield from own_statements(child)


def faults_of(node: Function | ast.ClassDef, *, method: bool, brief: bool) -> Iterator[str]:
    text = ast.get_docstring(node)
    names = parameters(node, method=method) if isinstance(node, Function) else []
    if text is None:
        if not brief or len(names) >= MANY:
            yield "has no docstring"
        return
    known = sections(text)
    for title in SECTIONS:
        if re.search(rf"[^\n]\n{title}:$", text, re.MULTILINE):
            yield f"needs an empty line before {title}:"
    described = re.findall(r"^    (\*{0,2}\w+): \S", known.get("Args", ""), re.MULTILINE)
    if isinstance(node, Function) and (described or len(names) >= MANY) and described != names:
        yield f"Args: has {described}, the signature {names}"
    if isinstance(node, ast.ClassDef) or len(names) < MANY:
        return
    if (
        node.returns is not None
        and ast.unparse(node.returns) not in ("None", "NoReturn")
        and not {"Returns", "Yields"} & set(known)
    ):
        yield "needs Returns:"
    if any(isinstance(one, ast.Raise) and one.exc is not None for one in own_statements(node)) and "Raises" not in known:
        yield "needs Raises:"


def faults(source: str, *, brief: bool = False) -> list[str]:
    """What is missing in a module. brief: short functions need no docstring."""
    found = public(ast.parse(source).body)
    return [
        f"{name}: {fault}"
        for name, node in found
        if not node.name.startswith("test_")
        for fault in faults_of(node, method="." in name, brief=brief)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_are_described(path: Path) -> None:
    """In `bench/` those with fewer than three parameters may go without: a script is read as a whole."""
    assert faults(path.read_text(), brief=path.is_relative_to(ROOT / "bench")) == []


def test_every_file_with_kernels_or_operators_names_the_legend() -> None:
    named = [
        p for p in FILES if p.parent == ROOT / "kernels" and re.search(r"^@(triton\.jit|torch\.library)", p.read_text(), re.M)
    ]
    assert len(named) == 8
    for path in named:
        assert LEGEND in (ast.get_docstring(ast.parse(path.read_text())) or ""), path


COMPLETE = '''
def f(a: int, *, b: int, **c: int) -> int:
    """Add numbers.

    Args:
        a: the first.
        b: the second,
            which may be zero.
        **c: more.

    Returns:
        Their sum.

    Raises:
        ValueError: on a negative one.
    """
    if a < 0:
        raise ValueError("a: expected 0 or more")
    return a + b
'''


def test_a_complete_docstring_is_accepted() -> None:
    assert faults(COMPLETE) == []


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("        b: the second,\n            which may be zero.\n", ""),
        ("        a: the first.\n        b: the second,\n", "        b: the second,\n        a: the first.\n"),
        ("        b: the second", "        other: the second"),
        ("        **c: more.\n", "        **c: more.\n        d: still more.\n"),
        ("    Returns:\n        Their sum.\n\n", ""),
        ("\n    Raises:\n        ValueError: on a negative one.\n", ""),
        ("zero.\n        **c: more.\n\n", "zero.\n        **c: more.\n"),
        ("    Args:\n", "    Arguments:\n"),
    ],
)
def test_an_incomplete_docstring_is_reported(there: str, instead: str) -> None:
    assert there in COMPLETE
    assert len(faults(COMPLETE.replace(there, instead))) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): pass", ["f: has no docstring"]),
        ("class C:\n    def m(self): pass", ["C: has no docstring", "C.m: has no docstring"]),
        ("def _f(a, b, c): pass\nclass _C:\n    def m(self): pass", []),
        ("def f():\n    '''Do.'''\n    def inner(a, b, c): pass", []),
    ],
)
def test_what_counts_as_public(source: str, expected: list[str]) -> None:
    assert faults(source) == expected


def test_short_functions_of_scripts_may_go_without() -> None:
    assert faults("def f(a, b): pass", brief=True) == []
    assert faults("def f(a, b, c): pass", brief=True) == ["f: has no docstring"]

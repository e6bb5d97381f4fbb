"""The rules of the house: imports point to earlier stages only, and one place does each special thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = (
    "runtime", "config", "strategy", "recipes", "fitting", "assets", "precision", "progress", "profiling", "inductor_options",
    "distributed", "kernels", "data", "model", "cam", "masking", "losses", "optim", "state", "step", "checkpoint", "export",
    "evaluate", "audit", "wise_ft", "train", "viz", "api", "demo", "commands", "cli", "__main__",
)  # fmt: skip


def python_files(folder: str) -> list[Path]:
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if "kernels" not in p.relative_to(ROOT / folder).parts[:1]]


def imports(source: str, module: str) -> Iterator[str]:
    """Absolute names of everything that a module imports; `module` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def stage(module: str) -> str:
    return module.split(".")[1]


def violations(source: str, module: str) -> list[str]:
    """Imports of `module` that point to a later stage of cammask_fast."""
    ours = [name for name in imports(source, module) if name.startswith("cammask_fast.")]
    return [name for name in ours if STAGES.index(stage(name)) > STAGES.index(stage(module))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", python_files("cammask_fast"), ids=module_name)
def test_imports_point_to_earlier_stages(path: Path) -> None:
    module = module_name(path)
    if module != "cammask_fast":
        assert violations(path.read_text(), module) == []


def test_a_wrong_import_is_caught() -> None:
    assert violations("from cammask_fast.train import fine_tune", "cammask_fast.model.vit") == ["cammask_fast.train"]
    assert violations("from cammask_fast.model.vit import Taps", "cammask_fast.train") == []


def test_every_folder_of_modules_is_a_package() -> None:
    """The wheel holds packages only."""
    for path in (ROOT / "cammask_fast").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_kernels_import_only_torch_triton_and_themselves() -> None:
    allowed = {"__future__", "torch", "triton", "typing", "collections", "math", "importlib", "kernels"}
    for path in (ROOT / "kernels").rglob("*.py"):
        module = module_name(path) + (".__init__" if path.name == "__init__.py" else "")
        assert {name.split(".")[0] for name in imports(path.read_text(), module)} <= allowed, path


@pytest.mark.parametrize(
    ("needle", "owner"),
    [("torch.compile(", "step.py"), ("torch.distributed", "distributed"), ("os.environ", "runtime/env.py")],
)
def test_special_things_live_in_one_place(needle: str, owner: str) -> None:
    users = [p.relative_to(ROOT / "cammask_fast") for p in python_files("cammask_fast") if needle in p.read_text()]
    assert users
    assert all(user == Path(owner) or Path(owner) in user.parents for user in users)


def nesting(node: ast.AST) -> int:
    """How many functions are inside of each other below a node."""
    inner = (nesting(child) + isinstance(child, ast.FunctionDef) for child in ast.iter_child_nodes(node))
    return max(inner, default=0)


def test_closures_of_the_step_are_nested_two_deep_at_most() -> None:
    found = {node.name: nesting(node) for node in ast.parse((ROOT / "cammask_fast/step.py").read_text()).body
             if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert found["eager_forward"] == 0
    assert max(found.values()) == 2


def test_the_training_loop_reads_on_one_screen() -> None:
    tree = ast.parse((ROOT / "cammask_fast/train.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "fine_tune")
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(loop)) - 1 <= 50

"""The notebooks run from their first cell to their last, and show what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path: Path) -> Any:
    """The executed notebook."""
    nbformat = pytest.importorskip("nbformat", reason="a development dependency")
    nbclient = pytest.importorskip("nbclient", reason="a development dependency")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    cells = run(path).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    shown = {kind for output in outputs for kind in output.get("data", {})}
    printed = "".join(output.get("text", "") for output in outputs)
    expected = {"fine-tune-and-compare": "text/html", "maps-and-counterfactuals": "image/png", "your-own-loop": "text/plain"}
    assert expected[path.stem] in shown
    assert "%" in printed


def test_notebooks_are_kept_without_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    assert all('"outputs": []' in path.read_text() and '"image/png"' not in path.read_text() for path in NOTEBOOKS)

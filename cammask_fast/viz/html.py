"""Self-contained HTML pages: templates with every name escaped, pictures inside the file."""

from __future__ import annotations

import base64
import io
import warnings
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture of a page. data: its bytes as a data URI."""

    title: str
    data: str
    text: str = ""


def render(template: str, **values: Any) -> str:
    """A page from `viz/templates`; everything that is put in is escaped. Raises jinja2.UndefinedError for a missing value."""
    loader = PackageLoader("cammask_fast", "viz/templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def picture(title: str, figure: Figure, *, text: str = "") -> Picture:
    """A matplotlib figure as a PNG inside a page.

    Args:
        title: above the picture.
        figure: to draw.
        text: below the picture.

    Returns:
        The picture as a data URL.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of a class name's signs that the font lacks, each with a line of its own
        figure.savefig(buffer, dpi=110, format="png")
    return Picture(title, f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", text)

"""Prompt templates: sentences with one `{}` where the class name stands."""

from __future__ import annotations

from pathlib import Path
from string import Formatter

from cammask_fast.data.text_files import read_numbered_lines
from cammask_fast.runtime.notices import notice


def read_templates(file: Path) -> tuple[str, ...]:
    """The templates of a file, one per line. Raises ValueError, naming file, line and placeholder, on others."""
    lines = read_numbered_lines(file)
    for number, line in lines:
        fault = template_fault(line)
        if fault:
            raise ValueError(f"{file}, line {number}: {fault} in {line.strip()!r}")
    quoted = [number for number, line in lines if line.strip()[0] in "'\"" and line.strip()[-1] in "'\","]
    if quoted:
        notice(f"{file}: templates in quotes, which become part of the prompts: {len(quoted)}, the first in line {quoted[0]}")
    return tuple(line for _, line in lines)


def template_fault(template: str) -> str:
    """Why a template cannot be used; empty for one with a single `{}` and no other placeholder."""
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"a brace without its other half ({error}; write {{{{ and }}}} for braces)"
    for name, spec, conversion in fields:
        if name or spec or conversion:
            inside = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            return f"the placeholder {{{inside}}} means nothing here: expected one {{}} for the class name"
    if len(fields) > 1:
        return f"{len(fields)} placeholders {{}}: expected one, for the class name"
    return "" if fields else "no {} for the class name"

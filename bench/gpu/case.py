"""What a case is: a function with its arguments, which runs in a process of its own (`python -m bench.gpu.child`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PARTS = ("smoke", "step", "kernels", "data", "tests")
"""In the order of their value to a first session on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """name: unique, without spaces at its ends. function: `module:name`, called with `arguments`; it yields or returns records
    (dicts) of what it measured. expected: seconds that it is thought to take; with less time left it is not started. limit:
    seconds after which it is stopped. needs: modules without which it is skipped. memory: bytes of the GPU that it needs at
    least. of: fields of the record that it makes, which a failure is shown under in the tables."""

    name: str
    part: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    expected: float = 30.0
    limit: float = 120.0
    needs: tuple[str, ...] = ()
    memory: int = 0
    of: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(**{**values, "needs": tuple(values["needs"])})

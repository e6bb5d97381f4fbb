"""cammask-fast: robust fine-tuning of CLIP with counterfactual masked images (CVPR 2023, arXiv 2303.03052).

    import cammask_fast as cf

    model = cf.load("ViT-B/32")
    tuned = cf.fine_tune(model, "photos")
    cf.cam(tuned.model, ["cow.jpg"], "cow").figure()

The names below are imported with the first use of one of them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cammask_fast.api import (
        Counterfactuals,
        FineTuned,
        Maps,
        Model,
        Scores,
        audit,
        cam,
        cam_bench,
        counterfactual,
        evaluate,
        export,
        fine_tune,
        load,
        train_step,
    )

__version__ = "0.1.0"
__all__ = [
    "Counterfactuals", "FineTuned", "Maps", "Model", "Scores",
    "audit", "cam", "cam_bench", "counterfactual", "evaluate", "export", "fine_tune", "load", "train_step",
]  # fmt: skip


class _FrontDoor(ModuleType):
    """This package. A name of the front door is the function, also where a module of the same name (`cammask_fast.cam`) was
    imported, which the import system would otherwise leave here; `from cammask_fast.cam import …` finds the module as ever."""

    def __getattribute__(self, name: str) -> Any:
        if name in _FRONT_DOOR:
            return getattr(import_module("cammask_fast.api"), name)
        return super().__getattribute__(name)

    def __dir__(self) -> list[str]:
        return sorted([*__all__, "__version__"])


_FRONT_DOOR = frozenset(__all__)
sys.modules[__name__].__class__ = _FrontDoor

"""The Python front door: what `import cammask_fast as cf` offers. A few lines over the modules that do the work."""

from cammask_fast.api.auditing import Audit, audit
from cammask_fast.api.map_bench import MapScores, cam_bench
from cammask_fast.api.maps import Counterfactuals, Maps, cam, counterfactual
from cammask_fast.api.models import Model, load
from cammask_fast.api.training import FineTuned, Scores, evaluate, export, fine_tune, train_step

__all__ = [
    "Audit", "Counterfactuals", "FineTuned", "MapScores", "Maps", "Model", "Scores",
    "audit", "cam", "cam_bench", "counterfactual", "evaluate", "export", "fine_tune", "load", "train_step",
]  # fmt: skip

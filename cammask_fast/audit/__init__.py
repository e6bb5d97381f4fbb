"""What a classifier looks at: counterfactual tests with exchanged contexts, and the figures that follow from them.

Every audited image is shown in five ways: as it is (`clean`); with its object kept and its context taken from images of other
classes (`other_context`) or of the same class (`same_context`, the control: the same seams, the same kind of context); with its
object filled (`object_filled`); and with as many random patches filled (`random_filled`, the control of that). Contexts are
drawn several times per image. A donor gives its context only: its own object is covered with patches of its own context first.
"""

from cammask_fast.audit.answers import Answers, ask, object_masks
from cammask_fast.audit.figures import Comparison, Findings, compare, findings
from cammask_fast.audit.trials import TESTS, Trials, build_trials

__all__ = [
    "TESTS",
    "Answers",
    "Comparison",
    "Findings",
    "Trials",
    "ask",
    "build_trials",
    "compare",
    "findings",
    "object_masks",
]

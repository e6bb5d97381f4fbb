"""WiSE-FT: models on the straight line between two sets of weights."""

from __future__ import annotations

from collections.abc import Iterable

from cammask_fast.model.classifier import Classifier, interpolate


def interpolations(start: Classifier, end: Classifier, alphas: Iterable[float]) -> list[Classifier]:
    """Interpolated models: weights (1 - alpha) * start + alpha * end, the head included.

    Args:
        start: the zero-shot classifier.
        end: its fine-tuned version.
        alphas: in [0, 1].

    Returns:
        A model per alpha.

    Raises:
        ValueError: for an alpha outside [0, 1], or classifiers of different architectures or classes.
    """
    alphas = list(alphas)
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a share in [0, 1], got {alpha}")
    if start.visual.config != end.visual.config or start.head.weight.shape != end.head.weight.shape:
        raise ValueError("the two classifiers differ in architecture or number of classes: they cannot be interpolated")
    models = []
    for alpha in alphas:
        model = end.frozen_copy()
        model.load_state_dict(interpolate(start.state_dict(), end.state_dict(), alpha))
        models.append(model)
    return models

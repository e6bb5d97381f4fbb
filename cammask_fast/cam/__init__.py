"""Class activation maps of a CLIP classifier: MM-CAM, Grad-CAM, LeGrad, attention rollout, and how well they find an object."""

from cammask_fast.cam.maps import (
    CAMS,
    attention_rollout,
    class_score,
    cls_rollout,
    grad_cam,
    map_of,
    mm_cam,
    positive_gradients,
    relevance_of,
    score_weights,
    weighted_activation,
)
from cammask_fast.cam.own_scores import own_layer_gradients

__all__ = [
    "CAMS",
    "attention_rollout",
    "class_score",
    "cls_rollout",
    "grad_cam",
    "map_of",
    "mm_cam",
    "own_layer_gradients",
    "positive_gradients",
    "relevance_of",
    "score_weights",
    "weighted_activation",
]

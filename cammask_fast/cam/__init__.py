"""Class activation maps of a CLIP classifier: MM-CAM and Grad-CAM, and how well they find an object."""

from cammask_fast.cam.maps import class_score, cls_rollout, grad_cam, mm_cam, relevance_of, weighted_activation

__all__ = ["class_score", "cls_rollout", "grad_cam", "mm_cam", "relevance_of", "weighted_activation"]

"""Distillation losses between a student and a frozen teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def feature_distillation(student_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """FD: mean over batch and dimension of (f_s - f_t)^2, on features before normalisation."""
    return F.mse_loss(student_NE, teacher_NE)


def logit_distillation(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float) -> Tensor:
    """KD: T^2 * KL(softmax(t / T) || softmax(s / T)), mean over the batch.

    Args:
        student_NK: logits s, (N, K).
        teacher_NK: logits t, (N, K).
        temperature: T.

    Returns:
        Scalar, differentiable.
    """
    teacher = F.log_softmax(teacher_NK / temperature, dim=1)
    student = F.log_softmax(student_NK / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

"""The losses over groups. Knows nothing of models or data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ranking_loss(scores: Tensor, teacher: Tensor | None = None, *, self_distillation: bool = False) -> Tensor:
    """What the scores of groups cost, summed over the heads.

    Cross-entropy with the first passage as the right one; with a teacher, the KL divergence from its distribution as well, as in
    FlagEmbedding's `knowledge_distillation`. With self-distillation every head but the last is also held against the last one's
    distribution, as the published layerwise recipe does.

    Args:
        scores: Shape (groups, size, heads), the positive first.
        teacher: A distribution over each group's passages, shape (groups, size).
        self_distillation: Whether lower heads learn from the last one.
    """
    logs = scores.float().log_softmax(dim=1)
    loss = -logs[:, 0].mean(dim=0).sum()
    if teacher is not None:
        loss = loss + _divergence(teacher[:, :, None], logs)
    if self_distillation and scores.shape[-1] > 1:
        loss = loss + _divergence(logs[:, :, -1:].detach().exp(), logs[:, :, :-1])
    return loss


def _divergence(target: Tensor, logs: Tensor) -> Tensor:
    """KL divergence of `exp(logs)` from `target` over a group, the mean over groups, the sum over heads."""
    return (torch.xlogy(target, target) - target * logs).sum(dim=1).mean(dim=0).sum()


def teacher_distribution(scores: Tensor, temperature: float) -> Tensor:
    """Softmax of a teacher's scores over each group. Shape (groups, size); a score of -inf has no share."""
    return functional.softmax(scores.float() / temperature, dim=1)

"""Groups to padded batches of token ids. Knows nothing of models beyond how they make token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.sequences import TokenSequence
from .data import Group
from .losses import teacher_distribution
from .trainee import Encode


class Collator:
    """Makes a batch of groups.

    Args:
        encoder: What makes token ids, for each prompt.
        temperature: Of the teacher's distribution.
    """

    def __init__(self, encoder: Callable[[str | None], Encode], temperature: float = 1.0) -> None:
        self._encoder = encoder
        self._temperature = temperature

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The arguments of `Trainee.forward`, and "teacher" where the groups have a teacher's scores."""
        pairs = [sequence for group in groups for sequence in self._encoder(group.prompt)(group.query, group.passages)]
        batch: dict[str, Any] = padded(pairs)
        if all(group.scores is not None for group in groups):
            scores = torch.tensor([group.scores for group in groups])
            batch["teacher"] = teacher_distribution(scores, self._temperature)
        return batch


def padded(pairs: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Token ids with padding on the right, which is masked out."""
    longest = max(map(len, pairs))

    def tensor(rows: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row + [filling] * (longest - len(row)) for row in rows])

    positions = [sequence.position_ids or list(range(len(sequence))) for sequence in pairs]
    batch = {
        "input_ids": tensor([sequence.input_ids for sequence in pairs], 0),
        "attention_mask": tensor([[1] * len(sequence) for sequence in pairs], 0),
        "position_ids": tensor(positions, 0),
        "last_rows": torch.tensor([len(sequence) - 1 for sequence in pairs]),
    }
    if any(sequence.token_type_ids for sequence in pairs):
        types = [sequence.token_type_ids or [0] * len(sequence) for sequence in pairs]
        batch["token_type_ids"] = tensor(types, 0)
    return batch

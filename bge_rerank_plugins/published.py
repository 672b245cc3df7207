"""Scores that the model cards publish, in one table, and the check of a model against them.

Knows nothing of how scores are computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .ranking import sigmoid
from .scorer import Scorer

TOLERANCE = 0.05
"""The cards' scores were computed in float16, whose steps are 1/256 at these values, through 24 layers of rounding."""

PANDA = (
    "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda, "
    "is a bear species endemic to China."
)


@dataclass(frozen=True)
class PublishedScore:
    """One score of a model card.

    Attributes:
        query: The query.
        passage: The passage.
        score: The raw logit.
        normalized: Its sigmoid.
    """

    query: str
    passage: str
    score: float
    normalized: float


PUBLISHED: dict[str, tuple[PublishedScore, ...]] = {
    "BAAI/bge-reranker-v2-m3": (
        PublishedScore("query", "passage", -5.65234375, 0.003497010252573502),
        PublishedScore("what is panda?", "hi", -8.1875, 0.00027803096387751553),
        PublishedScore("what is panda?", PANDA, 5.26171875, 0.9948403768236574),
    ),
}
"""Model card to its scores. The cards of the other four models print none."""


@dataclass(frozen=True)
class Check:
    """A published score beside the one computed here."""

    published: PublishedScore
    score: float
    normalized: float

    @property
    def holds(self) -> bool:
        """Whether both forms agree; a sigmoid is nowhere steeper than a quarter, nor further off than that of its logit."""
        logits_agree = math.isclose(self.score, self.published.score, abs_tol=TOLERANCE)
        return logits_agree and math.isclose(self.normalized, self.published.normalized, abs_tol=TOLERANCE / 4)


def published_scores(model: str) -> tuple[PublishedScore, ...]:
    """The scores on a model's card.

    Raises:
        ValueError: Its card publishes none; the message names those that do.
    """
    if model not in PUBLISHED:
        raise ValueError(f"{model!r}: no published scores are known, only for {', '.join(PUBLISHED)}")
    return PUBLISHED[model]


def verify(scorer: Scorer, published: Sequence[PublishedScore]) -> list[Check]:
    """Scores the published pairs with a scorer that does not normalize, and sets both beside each other."""
    scores = scorer.score_pairs([(case.query, case.passage) for case in published])
    return [Check(case, score, sigmoid(score)) for case, score in zip(published, scores, strict=True)]

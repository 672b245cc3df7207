"""From scores to a ranking: order, threshold, cut. Knows nothing of where scores come from."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple


class RankedPassage(NamedTuple):
    """A passage's place in a ranking.

    Attributes:
        index: Position among the passages that were given.
        score: Its score.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses here
    score: float


def rank_scores(
    scores: Sequence[float], top_n: int | None = None, score_threshold: float | None = None
) -> list[RankedPassage]:
    """Positions of the scores, best first, equal ones in their order; the threshold applies before `top_n`."""
    kept = [
        RankedPassage(i, score) for i, score in enumerate(scores) if score_threshold is None or score >= score_threshold
    ]
    return sorted(kept, key=lambda passage: -passage.score)[:top_n]


def check_cut(top_n: int | None, score_threshold: float | None, name: str = "top_n") -> None:
    """Raises ValueError for a `top_n`, which may have another name, or a `score_threshold` that cannot be meant."""
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, Integral) or top_n < 0):
        raise ValueError(f"{name}={top_n!r}: expected a whole number from 0, or None for all")
    if score_threshold is not None and (
        isinstance(score_threshold, bool)
        or not isinstance(score_threshold, Real)
        or score_threshold != score_threshold  # not a number
    ):
        raise ValueError(f"score_threshold={score_threshold!r}: expected a number, or None for no threshold")


def sigmoid(score: float) -> float:
    """1 / (1 + exp(-score)), without overflow."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    return math.exp(score) / (1 + math.exp(score))

"""What follows when a subclass overrides a method: whoever overrides `score` means every way to score.

Knows nothing of models or frameworks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .call import ENCODE_AT_ONCE
from .core.sequences import PairError, counted_from
from .texts import checked_requests, naming_requests, requests_of_pairs, stream_of_requests
from .turns import in_thread


def overrides(kind: type, method: str, base: type) -> bool:
    """Whether a subclass of `base` finds a method of its own, or of a class that it inherits from before `base`."""
    return next(each for each in kind.__mro__ if method in vars(each)) is not base


def follow_score(kind: Any, base: type) -> None:
    """Has a subclass of a scorer that overrides `score` score by that alone, but for what else it overrides."""
    if overrides(kind, "score", base):
        for name, method in vars(_ByScore).items():
            if not name.startswith("_") and not overrides(kind, name, base):
                setattr(kind, name, method)


class _ByScore:
    """The methods of `Scorer` that score, by its `score`, one query after another."""

    score: Any

    async def ascore(self, query: str, passages: Sequence[str]) -> list[float]:
        """`score` in a thread."""
        return list(await in_thread(self.score, query, passages))

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Scores (query, passage) pairs, those that follow each other with the same query in one call."""
        return [score for scores in _each_scored(self.score, requests_of_pairs(pairs)) for score in scores]

    def score_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Scores several queries, each with its passages."""
        checked = checked_requests(requests)
        with naming_requests(checked):
            return [list(scores) for scores in _each_scored(self.score, checked)]

    async def ascore_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """`score_batch` in a thread."""
        return await in_thread(_ByScore.score_batch, self, requests)

    def score_stream(self, pairs: Iterable[tuple[str, str]]) -> Iterator[float]:
        """Scores any number of pairs, as they are drawn."""
        for scores in _each_scored(self.score, stream_of_requests(pairs, ENCODE_AT_ONCE)):
            yield from scores


def _each_scored(
    score: Callable[[str, Sequence[str]], Iterable[float]], requests: Iterable[tuple[str, Sequence[str]]]
) -> Iterator[Iterable[float]]:
    """The scores of each request; what is wrong with one pair counts from the first request."""
    before = 0
    for query, passages in requests:
        try:
            with counted_from(before):
                scores = score(query, passages)
        except PairError as error:
            if error.index < before + len(passages):
                raise
            raise ValueError(error.why) from error  # of pairs that it makes itself
        before += len(passages)
        yield scores

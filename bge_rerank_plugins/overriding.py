"""What follows when a subclass overrides a method: whoever overrides `score` means every way to score.

Knows nothing of models or frameworks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .call import ENCODE_AT_ONCE
from .texts import checked_requests, requests_of_pairs, stream_of_requests
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
        return [score for request in requests_of_pairs(pairs) for score in self.score(*request)]

    def score_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Scores several queries, each with its passages."""
        return [list(self.score(*request)) for request in checked_requests(requests)]

    async def ascore_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """`score_batch` in a thread."""
        return await in_thread(_ByScore.score_batch, self, requests)

    def score_stream(self, pairs: Iterable[tuple[str, str]]) -> Iterator[float]:
        """Scores any number of pairs, as they are drawn."""
        for request in stream_of_requests(pairs, ENCODE_AT_ONCE):
            yield from self.score(*request)

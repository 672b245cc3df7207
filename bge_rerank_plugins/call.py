"""One call's pairs on their way: encoded ahead of the device, submitted, awaited in order.

What the blocking and the async form of a call have in common. Knows nothing of settings, ranking or models.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from .core.sequences import PairError, counted_from
from .signals import asking
from .terminal import bar_is_hidden

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .core.engine import Engine
    from .core.families import Family
    from .core.sequences import TokenSequence
    from .turns import Turns

ENCODE_AT_ONCE = 32
"""Passages that are tokenised before the device gets them, so that it starts while the rest is tokenised."""

PAIRS_AHEAD = 2048
"""Pairs of one call that are tokenised and wait; more would take memory and gain nothing."""


class Call:
    """One call's pairs on their way.

    Args:
        engine: Where they are scored.
        family: What makes their token ids.
        pairs: How many the call has; infinity where nobody knows.
        split: Whether long passages are scored in windows.
        cutoff_layers: Layers to score after; empty for the one of the settings.

    Attributes:
        truncated: How many passages were cut to fit so far.

    Whatever touches the engine or a future of its is done within `asking`.
    """

    def __init__(
        self, engine: Engine, family: Family, pairs: float, *, split: bool, cutoff_layers: tuple[int, ...] = ()
    ) -> None:
        self._engine = engine
        self._family = family
        self._cutoff_layers = cutoff_layers
        with asking():
            self._job = engine.open_job(pairs)
        self._split = split
        self.truncated = 0
        self._encoded = self._done = 0  # passages
        self._windows: deque[list[int]] = deque()
        self._keys: deque[list[bytes]] = deque()
        self._streams = pairs == math.inf
        self._scores: dict[bytes, Any] | None = None if self._streams else {}
        self._pending: deque[Future[list[Any]]] = deque()
        self._pairs_pending = 0
        self._admitted = False

    def scored(self, requests: Iterable[tuple[str, Sequence[str]]]) -> Iterator[list[Any]]:
        """Raw scores chunk by chunk, in order. Tokenising runs ahead of the device, by a bounded number of pairs.

        Of a stream, what comes before a pair that is refused is yielded before the error is raised.
        """
        refused = None
        for query, chunk in _chunks_of(requests):
            try:
                sequences = self._encode(query, chunk)
            except PairError as error:
                if not self._streams:
                    raise
                refused = error
                sequences = self._encode(query, chunk[: error.index - self._encoded])
            self._submit(sequences)
            while self._is_far_ahead:
                yield self._oldest()
            if refused is not None:
                break
        while self._pending:
            yield self._oldest()
        if refused is not None:
            raise refused

    async def ascored(self, requests: Iterable[tuple[str, Sequence[str]]], turns: Turns) -> AsyncIterator[list[Any]]:
        """`scored` without blocking the event loop, whose `turns` tokenise."""
        for query, chunk in _chunks_of(requests):
            await self._asubmit(await turns.run(partial(self._encode, query, chunk)))
            while self._is_far_ahead:
                yield await self._aoldest()
        while self._pending:
            yield await self._aoldest()

    def _encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """Token ids of a chunk, long passages in windows if they are to be split."""
        parts = [self._family.windows(query, passage) if self._split else [passage] for passage in passages]
        counts = [len(windows) for windows in parts]
        with counted_from(self._encoded, counts):
            sequences = self._family.encode(query, [window for windows in parts for window in windows])
        self._encoded += len(passages)
        self._windows.append(counts)
        if self._scores is not None:
            self._keys.append([sequence.key for sequence in sequences])
        return sequences

    def _submit(self, sequences: list[TokenSequence]) -> None:
        """Queues a chunk, and waits until the queue has room for it."""
        with asking():
            self._submitted(sequences).result()

    async def _asubmit(self, sequences: list[TokenSequence]) -> None:
        """`_submit` without blocking the event loop."""
        with asking():
            entered = self._submitted(sequences)
            room = None if entered.done() else asyncio.wrap_future(entered)
        if room is not None:
            await room

    def _submitted(self, sequences: list[TokenSequence]) -> Future[None]:
        beyond = len(sequences) - len(self._windows[-1])
        request = self._engine.submit(sequences, self._job, self._cutoff_layers, admitted=self._admitted, beyond=beyond)
        self._admitted = True
        self.truncated += sum(sequence.truncated for sequence in sequences)
        self._pending.append(request.future)
        self._pairs_pending += len(sequences)
        return request.entered

    @property
    def _is_far_ahead(self) -> bool:
        """Whether to take scores before submitting more: some are there, or so much waits that more would only take memory."""
        with asking():
            return bool(self._pending) and (self._pending[0].done() or self._pairs_pending > PAIRS_AHEAD)

    def _oldest(self) -> list[Any]:
        """The next chunk's scores, one per passage: the best of its windows, at each layer if there are several."""
        with asking(), counted_from(self._done, self._windows[0]):
            scores = self._pending[0].result()
        return self._reduced(scores)

    async def _aoldest(self) -> list[Any]:
        """`_oldest` without blocking the event loop."""
        with asking():
            waiting = asyncio.wrap_future(self._pending[0])
        with counted_from(self._done, self._windows[0]):
            scores = await waiting
        return self._reduced(scores)

    def _reduced(self, scores: list[Any]) -> list[Any]:
        self._pending.popleft()
        self._pairs_pending -= len(scores)
        if self._scores is not None:
            # What is alike is to be a tie, and what shares its pack moves the last digit of a score.
            scores = list(map(self._scores.setdefault, self._keys.popleft(), scores))
        remaining = iter(scores)
        windows = [[next(remaining) for _ in range(count)] for count in self._windows.popleft()]
        self._done += len(windows)
        if self._cutoff_layers:
            return [[max(layer) for layer in zip(*rows, strict=True)] for rows in windows]
        return [max(values) for values in windows]

    def cancel(self) -> None:
        """Drops what is not scored yet."""
        with asking():
            for future in self._pending:
                future.cancel()


def _chunks_of(requests: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, Sequence[str]]]:
    """Requests in pieces of `ENCODE_AT_ONCE` passages, in order."""
    for query, passages in requests:
        for start in range(0, len(passages), ENCODE_AT_ONCE):
            yield query, passages[start : start + ENCODE_AT_ONCE]


@contextmanager
def progress_bar(total: int | None, shown: bool) -> Iterator[Callable[[list[float]], list[float]]]:
    """A progress bar on standard error, of a total if it is known; what is given counts a list of scores and returns it."""
    if bar_is_hidden(shown):
        yield lambda scores: scores
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="pair", desc="Reranking") as bar:

        def advance(scores: list[float]) -> list[float]:
            bar.update(len(scores))
            return scores

        yield advance

"""Which waiting pairs go into the next pack. Knows nothing of models, threads or devices.

A caller's job comes in one request or several. Every pack is filled from all waiting requests: an eighth of it is kept for
the job that has waited longest, so that a long one always moves; the rest goes to the jobs with the fewest pairs left, so
that a short one is not held up by a long one. A job of n packs that arrives during a longer one therefore waits for the pack
that is running, and on a GPU for the next one too, which has been sent there already; then it takes 8/7 of n packs at most while
it is the shortest: at most three packs' time more than alone, for any n up to 7 (14 on a CPU). Pairs that are scored after
different layers share no pack: then every eighth pack is of those that have waited longest for one.
"""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from .sequences import TokenSequence

OLDEST_SHARE = 1 / 8

_arrivals = itertools.count()


@dataclass(eq=False)
class Job:
    """What one caller waits for.

    Attributes:
        pairs_left: Pairs that have not been handed out, those included that have not been submitted yet.
        arrival: Position in the order of arrival.
    """

    pairs_left: float
    arrival: int = field(default_factory=lambda: next(_arrivals), init=False)


@dataclass(eq=False)
class Request:
    """Pairs of a job that were submitted together, and their scores as they come.

    Attributes:
        sequences: The pairs' token ids.
        job: The job that they belong to.
        cutoff_layers: Layers to score after; empty for the one of the settings. Equal for all pairs of a pack.
        future: Resolves to the scores, in the order of `sequences`: a number each, or one for each of `cutoff_layers`.
        entered: Resolves when the request waits in the queue, and is not waiting for room there any more.
        scores: Scores so far; None where a pair is not scored yet.
        taken: How many pairs have been handed out.
        unscored: How many scores are still missing.
        tokens_left: Tokens of the pairs that have not been handed out.
        arrival: Position in the order of arrival.
        finished: Whether nobody waits for this request any more: it has its scores, failed or was cancelled. Known without the
            future's lock, which whoever guards the queue must not wait for.
    """

    sequences: Sequence[TokenSequence]
    job: Job
    cutoff_layers: tuple[int, ...] = ()
    future: "Future[list[Any]]" = field(default_factory=Future)
    entered: "Future[None]" = field(default_factory=Future, init=False)
    scores: list[Any] = field(init=False)
    taken: int = field(default=0, init=False)
    unscored: int = field(init=False)
    tokens_left: int = field(init=False)
    arrival: int = field(default_factory=lambda: next(_arrivals), init=False)
    finished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.scores = [None] * len(self.sequences)
        self.unscored = len(self.sequences)
        self.tokens_left = sum(map(len, self.sequences))
        self.future.add_done_callback(partial(_finish, weakref.ref(self)))

    def has_entered(self) -> None:
        """Resolves `entered`, if it is not resolved: closing may be broken into by a signal's handler that closes, too."""
        if self.entered.done():
            return
        with suppress(RuntimeError, InvalidStateError):
            if self.entered.set_running_or_notify_cancel():
                self.entered.set_result(None)


def _finish(request: "weakref.ref[Request]", _: "Future[list[Any]]") -> None:
    if (found := request()) is not None:
        found.finished = True


class Pair(NamedTuple):
    """One pair of a request."""

    request: Request
    index: int  # type: ignore[assignment]  # hides tuple.index

    @property
    def sequence(self) -> TokenSequence:
        """The pair's token ids."""
        return self.request.sequences[self.index]

    @property
    def prefix_is_needed_again(self) -> bool:
        """Whether a pair that has not been handed out shares this one's prefix."""
        request = self.request
        waiting = request.sequences[request.taken] if request.taken < len(request.sequences) else None
        return waiting is not None and bool(waiting.prefix) and waiting.group == self.sequence.group


def _need(request: Request) -> tuple[float, int]:
    return request.job.pairs_left, request.arrival


class Schedule:
    """The waiting requests. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._waiting: list[Request] = []  # in the order of arrival
        self._returned: list[Pair] = []
        self._packs = 0
        self._last_pack: dict[tuple[int, ...], int] = {}
        """Number of the last pack of each kind of layers that waits."""

    def add(self, request: Request) -> None:
        """Queues a request."""
        self._waiting.append(request)

    def put_back(self, pairs: Sequence[Pair]) -> None:
        """Queues pairs that were taken but could not be scored; they go first."""
        self._returned = [*pairs, *self._returned]

    def __bool__(self) -> bool:
        self._forget_finished()
        return bool(self._waiting or self._returned)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        self._forget_finished()
        return sum(r.tokens_left for r in self._waiting) + sum(len(pair.sequence) for pair in self._returned)

    def take(self, budget: int, kept: Iterable[int] = ()) -> list[Pair]:
        """The pairs of the next pack: at most `budget` tokens, but never less than one pair if any waits.

        Args:
            budget: Tokens of a pack.
            kept: Groups whose prefixes need not be computed.
        """
        self._forget_finished()
        pack = _Filling(budget, kept)
        while self._returned and pack.add(self._returned[0]):
            self._returned.pop(0)
        if not self._returned and self._waiting:
            alike = self._alike()
            oldest = min(alike, key=lambda request: (request.job.arrival, request.arrival))
            self._fill(pack, oldest, int(budget * OLDEST_SHARE))
            for request in sorted(alike, key=_need):
                self._fill(pack, request, budget)
                if pack.full:
                    break
        self._waiting = [request for request in self._waiting if request.taken < len(request.sequences)]
        return pack.pairs

    def drain(self) -> list[Request]:
        """Empties the queue; the requests that were in it."""
        requests = {pair.request.arrival: pair.request for pair in self._returned}
        requests.update((request.arrival, request) for request in self._waiting)
        self._waiting, self._returned = [], []
        return list(requests.values())

    def _alike(self) -> list[Request]:
        """The waiting requests that may share the next pack, since they are scored after the same layers.

        Those of the shortest job; in every so many packs, those that have waited longest for one.
        """
        layers = min(self._waiting, key=_need).cutoff_layers
        waiting = {request.cutoff_layers for request in self._waiting}
        self._packs += 1
        if self._packs % round(1 / OLDEST_SHARE) == 0:
            layers = min(waiting, key=lambda each: (self._last_pack.get(each, 0), each))
        self._last_pack = {each: pack for each, pack in self._last_pack.items() if each in waiting}
        self._last_pack[layers] = self._packs
        return [request for request in self._waiting if request.cutoff_layers == layers]

    @staticmethod
    def _fill(pack: "_Filling", request: Request, limit: int) -> None:
        while request.taken < len(request.sequences) and (pack.tokens < limit or not pack.pairs):
            pair = Pair(request, request.taken)
            if not pack.add(pair):
                return
            request.taken += 1
            request.tokens_left -= len(pair.sequence)
            request.job.pairs_left -= 1

    def _forget_finished(self) -> None:
        self._waiting = [request for request in self._waiting if not request.finished]
        self._returned = [pair for pair in self._returned if not pair.request.finished]


class _Filling:
    """A pack in the making: pairs, and the tokens that they will take with every shared prefix counted once."""

    def __init__(self, budget: int, kept: Iterable[int]) -> None:
        self.budget = budget
        self.pairs: list[Pair] = []
        self.tokens = 0
        self.full = False
        self._groups = set(kept)

    def add(self, pair: Pair) -> bool:
        sequence = pair.sequence
        if self.pairs and pair.request.cutoff_layers != self.pairs[0].request.cutoff_layers:
            return False  # another request may still fit
        cost = sequence.tokens_beside(self._groups)
        if self.pairs and self.tokens + cost > self.budget:
            self.full = True
            return False
        self.pairs.append(pair)
        self.tokens += cost
        self._groups.add(sequence.group)
        return True

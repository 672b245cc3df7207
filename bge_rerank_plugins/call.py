"""One call's pairs on their way: encoded ahead of the device, submitted, awaited in order.

What the blocking and the async form of a call have in common. Knows nothing of settings, ranking or models.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from .core.engine import Engine
    from .core.families import Family
    from .core.room import Room
    from .core.sequences import TokenSequence

ENCODE_AT_ONCE = 32
"""Passages that are tokenised before the device gets them, so that it starts while the rest is tokenised."""

PAIRS_AHEAD = 2048
"""Pairs of one call that are tokenised and wait; more would take memory and gain nothing."""


class Call:
    """One call's pairs on their way: encoded, submitted, awaited in order. What both forms of a call have in common."""

    def __init__(
        self, engine: Engine, family: Family, pairs: float, *, split: bool, cutoff_layers: tuple[int, ...] = ()
    ) -> None:
        self._engine = engine
        self._family = family
        self._cutoff_layers = cutoff_layers
        self._job = engine.open_job(pairs)
        self._split = split
        self.truncated = 0
        self._windows: deque[list[int]] = deque()
        self.pending: deque[Future[list[Any]]] = deque()
        self._pairs_pending = 0
        self._admitted = False
        self._room: Room | None = None

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """Token ids of a chunk, a long passage in windows if the settings say so."""
        parts = [[passage] for passage in passages]
        if self._split:
            parts = [self._family.windows(query, passage) for passage in passages]
        self._windows.append([len(windows) for windows in parts])
        return self._family.encode(query, [window for windows in parts for window in windows])

    def room(self, sequences: list[TokenSequence]) -> Room | None:
        """None if the queue has room for a chunk, else what resolves when it has."""
        self._room = self._engine.room(sum(map(len, sequences)), admitted=self._admitted)
        return self._room

    def submit(self, sequences: list[TokenSequence]) -> None:
        """Queues a chunk."""
        self._admitted = True
        self.truncated += sum(sequence.truncated for sequence in sequences)
        room, self._room = self._room, None
        self.pending.append(self._engine.submit(sequences, self._job, self._cutoff_layers, room))
        self._pairs_pending += len(sequences)

    @property
    def is_far_ahead(self) -> bool:
        """Whether to take scores before submitting more: some are there, or so much waits that more would only take memory."""
        return bool(self.pending) and (self.pending[0].done() or self._pairs_pending > PAIRS_AHEAD)

    def oldest(self) -> Future[list[Any]]:
        """The chunk whose scores come next."""
        return self.pending[0]

    def reduced(self, scores: list[Any]) -> list[Any]:
        """The next chunk's scores, one per passage: the best of its windows, at each layer if there are several."""
        self.pending.popleft()
        self._pairs_pending -= len(scores)
        remaining = iter(scores)
        windows = [[next(remaining) for _ in range(count)] for count in self._windows.popleft()]
        if self._cutoff_layers:
            return [[max(layer) for layer in zip(*rows, strict=True)] for rows in windows]
        return [max(values) for values in windows]

    def cancel(self) -> None:
        """Drops what is not scored yet."""
        for future in self.pending:
            future.cancel()
        if self._room is not None:
            self._engine.give_back(self._room)


_Waiting = list[tuple[Callable[[], Any], "asyncio.Future[Any]"]]
_Done = list[tuple["asyncio.Future[Any]", Any, "BaseException | None"]]


class Turns:
    """Work that callers on one event loop give to a thread: all of one turn of the loop goes there as one job.

    A thousand calls that begin at once would hold up the loop for as long as a thousand jobs take to queue and to come back.

    Args:
        thread: Who does the work. Everything else happens on the loop.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread = thread
        self._waiting: _Waiting = []

    def run(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """What resolves to the result of `work`; cancelling it spares the work if it has not begun."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((work, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._send, loop)
        return future

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            job = self.thread.submit(_do, loop, waiting)
        except RuntimeError as error:  # the thread has been shut down
            _deliver([(future, None, error) for _, future in waiting])
            return

        def fail_if_dropped(job: Future[None]) -> None:
            if job.cancelled():
                error = RuntimeError("the scorer was closed before this request was tokenised")
                _give_back(loop, [(future, None, error) for _, future in waiting])

        job.add_done_callback(fail_if_dropped)


def _do(loop: asyncio.AbstractEventLoop, waiting: _Waiting) -> None:
    for start in range(0, len(waiting), RETURNED_AT_ONCE):
        done: _Done = []
        for work, future in waiting[start : start + RETURNED_AT_ONCE]:
            if future.cancelled():
                continue
            try:
                done.append((future, work(), None))
            except BaseException as error:
                done.append((future, None, error))
        _give_back(loop, done)


def _give_back(loop: asyncio.AbstractEventLoop, done: _Done) -> None:
    with suppress(RuntimeError):  # the loop has been closed, and nobody waits there
        loop.call_soon_threadsafe(_deliver, done)


RETURNED_AT_ONCE = 16
"""Results that go back to the loop together; more would keep the device waiting for the first."""


def _deliver(done: _Done) -> None:
    for future, result, error in done:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def chunks_of(requests: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, Sequence[str]]]:
    """Requests in pieces of `ENCODE_AT_ONCE` passages, in order."""
    for query, passages in requests:
        for start in range(0, len(passages), ENCODE_AT_ONCE):
            yield query, passages[start : start + ENCODE_AT_ONCE]


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[list[float]], list[float]]]:
    """A progress bar on standard error; what is given passes a list of scores through and counts it."""
    if not shown:
        yield lambda scores: scores
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="pair", desc="Reranking") as bar:

        def advance(scores: list[float]) -> list[float]:
            bar.update(len(scores))
            return scores

        yield advance

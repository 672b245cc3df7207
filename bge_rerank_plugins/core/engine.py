"""The engine: one worker thread per device owns the model; requests become packs, packs become scores, scores resolve futures.

Callers tokenise in their own threads and submit token ids; the worker takes what waits (see `schedule` for how it chooses,
and why a long job does not starve a short one), scores it and goes on. It never waits for company: an idle engine starts at
once. Batch sizes, devices, precision and memory are decided here and nowhere else. Knows nothing of text formats, frameworks
or kinds of reranker.

Faults stay where they belong. Out of memory halves the budget of that device and tries the pack again; a pair that does not
fit alone fails its own request. Any other exception fails the requests in that pack, with the cause chained, and the engine
goes on. If the worker itself dies, everyone who waits is told at once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import weakref
from collections import deque
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .checkpoint import SharedCheckpoint
from .device import asked_devices, is_out_of_memory, release_cached_memory
from .outcome import caused_by, give, give_error_to_all, recorded
from .prefixes import Prefixes
from .room import Room
from .schedule import Job, Pair, Request, Schedule
from .sequences import computed_tokens
from .stats import EngineStats
from .worker import Pending, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..settings import RerankSettings
    from .families import Family
    from .sequences import TokenSequence

logger = logging.getLogger("bge_rerank_plugins")

LANDING_CHECKS = 0.0002
"""Seconds between looks whether a pack is done, while another may yet be sent behind it; a GPU takes milliseconds for one."""

STOP_TIMEOUT = 30.0
"""Seconds that `close` waits for the pack that a worker is at."""

# What distinguishes one loaded model from another. The rest is applied to scores afterwards.
_NOT_LOADED = {"normalize", "show_progress", "long_passages"}


def key_of(settings: RerankSettings) -> str:
    """Equal for settings that one engine can serve."""
    return settings.model_dump_json(exclude=_NOT_LOADED) + repr(settings.token)


FORKED = (
    "this process was forked after a model was loaded, and a forked copy of torch's threads cannot compute: "
    "start the child with the 'spawn' method, or load the model in the children only"
)


# A worker that runs keeps its engine alive, and so here, also when the engine was given back.
live: weakref.WeakSet[Engine] = weakref.WeakSet()


class EngineClosedError(RuntimeError):
    """The engine was closed while, or before, it was asked for scores."""


class QueueFullError(RuntimeError):
    """Too many tokens wait already."""


class Engine:
    """A loaded model, on one device or several, and the queue before it.

    Attributes:
        loaded: Resolves to the family of the first device when all devices have loaded; its `encode` is safe to share.
        loads: Whether that is still to come; read without a lock.
        tokenizer_thread: A thread that tokenises for callers who must not block.
    """

    def __init__(self, settings: RerankSettings) -> None:
        names = asked_devices(settings.device)
        self._settings = settings
        self._checkpoint = SharedCheckpoint(settings)
        self._changed = threading.Condition()
        self._empty_queue()
        self._stats = EngineStats()
        self._closed = False
        self._exiting = False
        self._failure: BaseException | None = None
        self._pid = os.getpid()
        self.loaded: Future[Family] = Future()
        self.loads = True
        self._families: list[Family | None] = [None] * len(names)
        self.tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="bge-rerank-tokenizer")
        self._workers = [
            threading.Thread(target=self._work, args=(index, name), name=f"bge-rerank-{name or 'device'}", daemon=True)
            for index, name in enumerate(names)
        ]
        live.add(self)
        for worker in self._workers:
            worker.start()

    @property
    def usable(self) -> bool:
        """Whether this engine still takes requests, or can say better than a new one why it does not."""
        return not self._closed and self._failure is None

    def serves(self, settings: RerankSettings) -> bool:
        """Whether this is the engine for these settings."""
        return self.usable and key_of(settings) == key_of(self._settings)

    def open_job(self, pairs: float) -> Job:
        """Announces a caller's job: how many pairs it will submit, in one request or several."""
        with self._changed:
            self._stats.requests += 1
        return Job(pairs)

    def stats(self) -> EngineStats:
        """What the engine has done since it was started, and what waits."""
        with self._changed:
            return replace(self._stats, queued_tokens=self._schedule.tokens)

    def submit(
        self,
        sequences: Sequence[TokenSequence],
        job: Job,
        cutoff_layers: tuple[int, ...] = (),
        *,
        admitted: bool = False,
        beyond: int = 0,
    ) -> Request:
        """Queues pairs, or has them wait for room in the queue.

        Args:
            sequences: The pairs' token ids.
            job: The job that they belong to, from `open_job`.
            cutoff_layers: Layers to score after. If there are any, each score is a list with one number for each.
            admitted: Whether the caller has queued some of its job already; these wait for room in any case.
            beyond: How many more these are than the pairs that `open_job` was told of: windows of long passages.

        Returns:
            What was asked for. Its `future` resolves to the raw scores, in order, and cancelling it drops those not yet scored;
            its `entered` tells when to submit more.

        Raises:
            QueueFullError: There is no room, and the settings say not to wait for it.
            EngineClosedError: The engine was closed.
            RuntimeError: The worker died, or this process was forked off the one that loaded the model.
        """
        request = Request(sequences, job, cutoff_layers)
        if not sequences:
            request.has_entered()
            request.future.set_result([])
            return request
        with self._changed:
            # While the interpreter exits, a daemon thread waits in silence, and ends with it.
            if not self._exiting or not threading.current_thread().daemon:
                self._raise_if_unusable()
            job.pairs_left += beyond
            if not self._room.enter(request, may_wait=admitted or self._settings.when_full == "wait"):
                raise QueueFullError(self._room.refusal(request))
            self._stats.truncated += sum(sequence.truncated for sequence in sequences)
            self._changed.notify_all()
        self._room.announce()
        return request

    def close(self, *, wait: bool = True) -> None:
        """Stops the workers after the packs they are at, fails what still waits, frees the devices' memory."""
        if self._pid != os.getpid():
            return  # a forked copy: none of its threads is here
        with self._changed:
            self._closed = True
            waiting = self._drain()
            self._changed.notify_all()
        self._room.announce()
        if not self._exiting:
            self._refuse(waiting)
        self.tokenizer_thread.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            if wait and worker is not threading.current_thread():
                worker.join(timeout=STOP_TIMEOUT)

    def close_at_exit(self) -> None:
        """Stops the workers and tells nobody: whoever still waits is a daemon thread, which ends with the interpreter."""
        with self._changed:
            self._exiting = True
            self._schedule.drain()
        self.close()

    def forget_fork(self) -> None:
        """In a forked copy of the process: drops the lock, which a thread that is not there may hold, and all that it guards."""
        self._changed = threading.Condition()
        self._empty_queue()
        self._closed = True
        self._exiting = False

    def _empty_queue(self) -> None:
        self._schedule = Schedule()
        self._room = Room(self._settings.max_queued_tokens, self._schedule)

    def _drain(self) -> list[Request]:
        return self._schedule.drain() + self._room.drain()

    def _raise_if_unusable(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(FORKED)
        if self._failure is not None:
            raise RuntimeError(f"the scoring thread has died: {self._failure!r}") from self._failure
        if self._closed:
            raise EngineClosedError("the scorer is closed")

    def _work(self, index: int, device_name: str | None) -> None:
        """Life of a worker thread: load, then score packs until closed."""
        try:
            self._load_and_run(index, device_name)
        except BaseException as error:  # whatever it is, nobody may wait for a thread that is gone
            traceback.clear_frames(error.__traceback__)  # which hold the model
            self._die(error)
        finally:
            self._forget(index)

    def _load_and_run(self, index: int, device_name: str | None) -> None:
        # Gone with this frame, before the device's memory is given back.
        worker = Worker(self._settings, device_name, self._checkpoint)
        self._report_loaded(index, worker.family)
        self._run(worker)

    def _report_loaded(self, index: int, family: Family) -> None:
        with self._changed:
            self._families[index] = family
            first = self._families[0]
            if first is None or not all(self._families):
                return
            self.loads = False
        with suppress(InvalidStateError):  # another device's thread has died, or was closed
            self.loaded.set_result(first)

    def _forget(self, index: int) -> None:
        """Drops the references to a worker's model, so that its memory is free."""
        with self._changed:
            self.loads = False
            self._families[index] = None
        self._lose_family(EngineClosedError("the scorer is closed") if self._failure is None else self._failure)
        release_cached_memory()

    def _lose_family(self, error: BaseException) -> None:
        """Tells those who wait for one, also while other devices load yet, and forgets the one that there was."""
        none: Future[Family] = Future()
        none.set_exception(error)
        loaded, self.loaded = self.loaded, none
        with suppress(InvalidStateError):
            loaded.set_exception(error)

    def _run(self, worker: Worker) -> None:
        """Scores packs until the engine is closed.

        Where the device computes aside, the next pack is laid and sent while it does, so that it need not wait for Python.
        """
        flights: deque[_Flight] = deque()
        pairs: list[Pair] = []
        try:
            while (pairs := self._next_pack(worker, flights[0] if flights else None)) or flights:
                flight = self._start(worker, pairs, alone=not flights) if pairs else None
                if flight is not None:
                    flights.append(flight)
                if flights and (flight is None or len(flights) > worker.packs_ahead):
                    self._finish(worker, flights[0])
                    flights.popleft()
        except BaseException as error:
            self._die(error)  # first: who is told may ask again at once
            # Nobody else knows of them any more.
            give_error_to_all([*pairs, *(pair for flight in flights for pair in flight.pairs)], error)
            raise

    def _next_pack(self, worker: Worker, flight: _Flight | None) -> list[Pair]:
        """The next pack, waited for. Empty when the engine is closed, or when nothing has come until `flight` has landed."""
        while True:
            with self._changed:
                if not self.usable:
                    return []
                # Requests are cancelled without the lock: what there is to do is known from having taken it only.
                pairs = self._schedule.take(worker.budget, worker.kept)
                is_due = bool(pairs) or (flight is not None and flight.pending.landed)
                if self._room.let_in():
                    self._changed.notify_all()  # other workers may have found nothing
                elif not is_due and flight is None:
                    worker.kept = Prefixes()  # of requests that were cancelled
                    self._changed.wait()
                elif not is_due:
                    self._changed.wait(LANDING_CHECKS)
            self._room.announce()
            if is_due:
                return pairs

    def _start(self, worker: Worker, pairs: list[Pair], *, alone: bool) -> _Flight | None:
        """Has the worker's device compute a pack, `alone` on it or beside another one.

        None if that failed; the pairs wait again, or those who asked for them have been told.
        """
        start = time.perf_counter()
        sequences = [pair.sequence for pair in pairs]
        tokens = computed_tokens(sequences, worker.kept)
        try:
            pending = worker.start(
                sequences,
                pairs[0].request.cutoff_layers,
                keep={pair.sequence.group for pair in pairs if pair.prefix_is_needed_again},
            )
        except Exception as error:
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # which hold what did fit of the pack
                self._try_again(worker, pairs, tokens, error, alone=alone)
            else:
                give_error_to_all(pairs, error)
            return None
        return _Flight(pairs, pending, start, tokens)

    def _try_again(self, worker: Worker, pairs: list[Pair], tokens: int, error: Exception, *, alone: bool) -> None:
        """Queues the pairs of a pack that did not fit, for packs of less; a pair that does not fit alone fails its request."""
        with self._changed:
            self._stats.out_of_memory += 1
        logger.warning("out of memory on %s with %d tokens at once; going on with less", worker.device, tokens)
        if len(pairs) > 1:
            worker.shrink(tokens)
        elif alone:
            message = f"one pair of {len(pairs[0].sequence)} tokens does not fit; lower max_length"
            give(pairs[0].request, caused_by(error, f"out of memory on {worker.device}: {message}"))
            return
        with self._changed:
            if self.usable:
                self._schedule.put_back(pairs)
                return
        self._refuse(pair.request for pair in pairs)

    def _finish(self, worker: Worker, flight: _Flight) -> None:
        """Waits for a pack and gives its scores to those who asked for them."""
        try:
            scores = worker.finish(flight.pending)
        except Exception as error:
            give_error_to_all(flight.pairs, error)
            return
        now = time.perf_counter()
        with self._changed:
            self._stats.count_pack(
                [len(pair.sequence) for pair in flight.pairs],
                fill=flight.tokens / worker.budget,
                seconds=now - max(flight.start, worker.last_finish),
            )
            dtype = worker.precision.dtype
            outcomes = [recorded(pair, score, dtype) for pair, score in zip(flight.pairs, scores, strict=True)]
        for pair, outcome in zip(flight.pairs, outcomes, strict=True):
            give(pair.request, outcome)
        worker.last_finish = now

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            waiting = self._drain()
            self._changed.notify_all()
        self._room.announce()
        self._refuse(waiting)

    def _refuse(self, requests: Iterable[Request]) -> None:
        """Tells those who wait that nobody will score their pairs any more, and why."""
        error = self._failure
        for request in requests:
            if error is None:
                give(request, EngineClosedError("the scorer was closed before this request was scored"))
            else:
                give(request, caused_by(error, f"the scoring thread has died: {error!r}"))


@dataclass(frozen=True)
class _Flight:
    """A pack that a device is at.

    Attributes:
        pairs: What it scores.
        pending: The scores to come.
        start: When it was begun, by `time.perf_counter`.
        tokens: How many are computed.
    """

    pairs: list[Pair]
    pending: Pending
    start: float
    tokens: int

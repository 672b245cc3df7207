"""Work that callers on an event loop give to a thread, all of one turn of the loop at once.

A thousand calls that begin at once would hold up the loop for as long as a thousand jobs take to queue and to come back. Knows
nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from .signals import asking

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_T = TypeVar("_T")

CLOSED = "the scorer was closed before this request was tokenised"

RETURNED_AT_ONCE = 16
"""Results that go back to the loop together; more would keep the device waiting for the first."""


async def in_thread(function: Callable[..., _T], *arguments: Any) -> _T:
    """What a function returns, run in a thread of the event loop's pool, or by the loop where Python has stopped all pools.

    Raises:
        RuntimeError: It raised StopIteration, which no future can hold: who awaits `asyncio.to_thread` would wait for ever.
    """

    def called() -> _T:
        try:
            return function(*arguments)
        except StopIteration as error:
            raise RuntimeError(f"{function!r:.80} raised StopIteration") from error

    context = copy_context()
    try:
        running = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(called))
    except RuntimeError as error:
        if "shutdown" not in str(error):  # no thread is to be had, and one that there is may do the work yet
            raise
        return called()  # the main thread has ended
    return await running


class _Waiting(list[tuple[Callable[[], Any], "asyncio.Future[Any]"]]):
    """Work of one turn, and what waits for it. The loop alone holds it: a loop that is closed and dropped takes it along."""


_Done = list[tuple["asyncio.Future[Any]", Any, "BaseException | None"]]


class Turns:
    """Sends the work of each turn of one event loop to a thread as one job.

    Args:
        thread: Who does the work. Everything else happens on the loop.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread = thread
        self._waiting: Callable[[], _Waiting | None] = _none

    def run(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """What resolves to the result of `work`; cancelling it spares the work if it has not begun."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        waiting = self._waiting()
        if waiting is None:
            waiting = _Waiting()
            self._waiting = weakref.ref(waiting)
            loop.call_soon(self._send, loop, waiting)
        waiting.append((work, future))
        return future

    def _send(self, loop: asyncio.AbstractEventLoop, waiting: _Waiting) -> None:
        self._waiting = _none
        try:
            with asking():
                job = self.thread.submit(_do, loop, waiting)
        except (
            RuntimeError
        ):  # the thread has been shut down: with the scorer, or by Python, whose main thread has ended
            _do(loop, waiting)
            return

        def fail_if_dropped(job: Future[None]) -> None:
            if job.cancelled():
                _give_back(loop, [(future, None, RuntimeError(CLOSED)) for _, future in waiting])

        job.add_done_callback(fail_if_dropped)


def _none() -> None:
    return None


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


def _deliver(done: _Done) -> None:
    for future, result, error in done:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

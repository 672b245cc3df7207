"""Room in a bounded queue, given in the order of asking, so that small requests do not pass a large one for ever.

A request that finds none waits here, and enters by itself when there is some: whoever made it may be busy, or gone. Those who
wait are told by `announce`, which is not for the owner of the lock: each has a lock of its own.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Request, Schedule


class Room:
    """Room for so many tokens, and the requests that wait for some. Not thread-safe: its owner holds a lock.

    Args:
        bound: Most tokens that wait in the queue; None for no bound.
        queue: The queue.
    """

    def __init__(self, bound: int | None, queue: Schedule) -> None:
        self._bound = bound
        self._queue = queue
        self._outside: deque[Request] = deque()
        self._untold: deque[Request] = deque()
        self._passed_by, self._tokens_passed = -1, 0  # the first who waits, by its arrival

    def enter(self, request: Request, *, may_wait: bool) -> bool:
        """Puts a request into the queue, or has it wait for room behind those that came before it.

        Args:
            request: The request.
            may_wait: Whether it may wait; else it passes those that do, until as many tokens have passed the first of them as it
                has itself, and from then on is left out.

        Returns:
            Whether it is in the queue, or will be.
        """
        if may_wait:
            self._outside.append(request)
            self.let_in()
            return True
        if not self._has_room_for(request) or not self._may_pass(request):
            return False
        self._add(request)
        return True

    def refusal(self, request: Request) -> str:
        """Why a request was left out, and what to do."""
        taken = self._queue.tokens + sum(each.tokens_left for each in self._outside)
        why = f"{taken} tokens wait already, and max_queued_tokens={self._bound} leaves no room for {request.tokens_left} more"
        if self._bound is None or request.tokens_left <= self._bound:
            return f"{why}: try again later"
        return f"{why}, which get in only while nothing else waits: give fewer passages at once, or raise max_queued_tokens"

    def let_in(self) -> bool:
        """Lets those in for whom there is room now, up to the first for whom there is none; whether there were any."""
        entered = False
        while self._outside and (self._outside[0].finished or self._has_room_for(self._outside[0])):
            self._add(self._outside.popleft())
            entered = True
        return entered

    def drain(self) -> list[Request]:
        """Sends away who waits; the requests that did."""
        outside, self._outside = list(self._outside), deque()
        self._untold.extend(outside)  # there is nothing more to wait for
        return outside

    def announce(self) -> None:
        """Tells those who have entered, or were sent away. To be called without the lock, by any thread."""
        while self._untold:
            with suppress(IndexError):  # another thread tells the last one
                self._untold.popleft().has_entered()

    def _may_pass(self, request: Request) -> bool:
        """Whether those who wait are passed by it; the first of them waits for twice its own tokens at most, and one request."""
        first = next((each for each in self._outside if not each.finished), None)
        if first is None:
            return True
        if self._passed_by != first.arrival:
            self._passed_by, self._tokens_passed = first.arrival, 0
        if self._tokens_passed >= first.tokens_left:
            return False
        self._tokens_passed += request.tokens_left
        return True

    def _has_room_for(self, request: Request) -> bool:
        """Where nothing waits there is room for any request."""
        if self._bound is None:
            return True
        taken = self._queue.tokens
        return taken == 0 or taken + request.tokens_left <= self._bound

    def _add(self, request: Request) -> None:
        self._queue.add(request)
        self._untold.append(request)

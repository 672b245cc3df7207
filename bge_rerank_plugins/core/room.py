"""Room in a bounded queue, granted in the order of asking, so that small requests do not pass a large one for ever.

Knows how many tokens there may be and how many there are; nothing of what they belong to.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class Room(Future[None]):
    """Room for some tokens, to come or granted."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens


class Rooms:
    """Who waits for room, and who has been granted some. Not thread-safe: its owner holds a lock.

    Args:
        bound: Most tokens that wait; None for no bound.
        queued: How many wait now.
    """

    def __init__(self, bound: int | None, queued: Callable[[], int]) -> None:
        self._bound = bound
        self._queued = queued
        self._waiters: deque[Room] = deque()
        self._granted: weakref.WeakSet[Room] = weakref.WeakSet()  # who drops his room gives it back

    def has(self, tokens: int) -> bool:
        """Whether there is room for so many; where nothing waits there is room for any number."""
        taken = self._queued() + sum(room.tokens for room in self._granted)
        return self._bound is None or taken == 0 or taken + tokens <= self._bound

    @property
    def awaited(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiters)

    def wait_for(self, tokens: int) -> Room:
        """What resolves when there is room. It keeps that room until it is given back."""
        room = Room(tokens)
        self._waiters.append(room)
        self.grant()
        return room

    def give_back(self, room: Room) -> None:
        """Leaves room to others that was used, or is not waited for any more."""
        room.cancel()
        self._granted.discard(room)
        self.grant()

    def grant(self, *, to_all: bool = False) -> None:
        """Grants what room there is to the first who wait, or lets all go where there is no queue any more."""
        while self._waiters:
            first = self._waiters[0]
            if not (to_all or first.cancelled() or self.has(first.tokens)):
                return
            self._waiters.popleft()
            if first.set_running_or_notify_cancel():
                self._granted.add(first)
                first.set_result(None)

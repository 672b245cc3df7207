"""Which threads are in the midst of asking an engine, for a signal's handler that closes it there. Knows nothing of engines."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_askers: list[int] = []


@contextmanager
def asking() -> Iterator[None]:
    """For what this thread does with an engine, its threads and its futures, whose locks it takes then, and the workers, too."""
    thread = threading.get_ident()
    _askers.append(thread)
    try:
        yield
    finally:
        _askers.remove(thread)


def is_asking() -> bool:
    """Whether this thread is within `asking`: it may hold a lock that a worker waits for, and must not wait for a worker."""
    return threading.get_ident() in _askers

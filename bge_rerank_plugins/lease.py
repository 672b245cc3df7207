"""One scorer's hold on the shared engine of its settings: taken at first use, given back once.

Knows nothing of texts or scores, and imports torch only when the engine is asked for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from .signals import asking, is_asking
from .turns import Turns, in_thread

if TYPE_CHECKING:
    from .core.engine import Engine
    from .core.families import Family
    from .settings import RerankSettings


FORKED = (
    "this process was forked while a thread was loading the model, and has half of what it imported: "
    "start the child with the 'spawn' method"
)

_leases: WeakSet[Lease] = WeakSet()
_forked_while_loading = False


class Lease:
    """A hold on an engine, which is given back when it is closed or garbage-collected.

    Args:
        settings: Which engine.

    Attributes:
        engine: The engine that is held now, or None.
    """

    def __init__(self, settings: RerankSettings) -> None:
        self.engine: Engine | None = None
        self._settings = settings
        self._lock = threading.RLock()  # re-entrant: a signal's handler may close what its thread is about to acquire
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()
        self._finalizer: Any = None
        self._starts = False
        self._closed = False
        _leases.add(self)

    def acquired(self) -> Engine:
        """The engine, started at first use, and anew where the one before cannot be used any more.

        Raises:
            RuntimeError: The lease is closed.
        """
        with self._lock:
            self._check_open()
            engine = self.engine
            if engine is None or not engine.usable:
                self._starts = True
                try:
                    engine = self._start()
                finally:
                    self._starts = False
            return engine

    def _start(self) -> Engine:
        from .core.registry import acquire, release_when_collected

        if self._finalizer is not None:
            self._finalizer()
        self.engine = engine = acquire(self._settings)
        self._finalizer = release_when_collected(self, engine)
        try:
            self._check_open()
        except RuntimeError:
            self.close()  # again: there was no engine yet
            raise
        return engine

    def loaded(self) -> tuple[Engine, Family]:
        """The engine and its family, once the model is there. A load that failed is tried again next time."""
        engine = self.acquired()
        try:
            with asking():
                return engine, engine.loaded.result()
        except Exception:
            self._give_up(engine)
            raise

    async def aloaded(self) -> tuple[Engine, Family]:
        """`loaded` without blocking: the first call imports torch, which takes seconds."""
        engine = await in_thread(self.acquired) if self.engine is None else self.acquired()
        with asking():
            loaded = engine.loaded
            if loaded.done() and loaded.exception() is None:  # the usual case, and a thousand may come at once
                return engine, loaded.result()
            waiting = asyncio.wrap_future(loaded)
        # Who has stopped waiting does not ask it: else asyncio would report an error that nobody heard of, for each of them.
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([waiting])  # whoever stops waiting must not cancel the load for everybody else
        try:
            return engine, waiting.result()
        except Exception:
            await in_thread(self._give_up, engine)
            raise

    def turns(self, engine: Engine) -> Turns:
        """What tokenises for the calls of the running loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            turns = self._turns.get(loop)
            if turns is None or turns.thread is not engine.tokenizer_thread:
                turns = self._turns[loop] = Turns(engine.tokenizer_thread)
            return turns

    def close(self) -> None:
        """Gives the engine back, for good. Safe to call twice."""
        with self._lock:
            self._closed = True
            engine, self.engine = self.engine, None
            if self._finalizer is not None:
                self._finalizer.detach()
        if is_asking():  # in a signal's handler: the engine's locks are to be had when this thread goes on
            threading.Thread(target=_release, args=(engine,), name="bge-rerank-closing", daemon=True).start()
        else:
            _release(engine)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this Scorer is closed")
        if _forked_while_loading:
            raise RuntimeError(FORKED)

    def forget_fork(self) -> bool:
        """In a forked copy of the process: drops the lock if a thread that is not there holds it.

        Returns:
            Whether such a thread was loading a model, and has left modules half imported.
        """
        loads = self.engine is not None and self.engine.loads
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return loads
        self._lock = threading.RLock()
        return loads or self._starts

    def _give_up(self, engine: Engine) -> None:
        with self._lock:
            if self.engine is not engine:
                return
            self.engine = None
            self._finalizer.detach()
        _release(engine)


def _release(engine: Engine | None) -> None:
    if engine is not None:
        from .core.registry import release

        release(engine)


def _after_fork() -> None:
    global _forked_while_loading
    for lease in list(_leases):
        _forked_while_loading = lease.forget_fork() or _forked_while_loading


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)

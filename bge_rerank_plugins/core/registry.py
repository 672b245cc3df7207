"""The engines of this process: equal settings share one, and the last to give it back closes it.

Also what happens to them when the process forks or ends.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import TYPE_CHECKING

import torch

from . import weights
from .engine import FORKED, Engine, key_of, live

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..settings import RerankSettings

_lock = threading.RLock()  # re-entrant: a garbage collection may release an engine while this thread holds it
_engines: dict[str, tuple[Engine, int]] = {}
_forked_after_load = False


def acquire(settings: RerankSettings) -> Engine:
    """The engine for these settings, started if there is none. To be given back with `release`.

    Raises:
        RuntimeError: This process was forked off one that had loaded a model.
    """
    if _forked_after_load and torch.get_num_threads() > 1:  # torch's threads would wait for each other for ever
        raise RuntimeError(FORKED)
    key = key_of(settings)
    with _lock:
        engine, holders = _engines.get(key, (None, 0))
        if engine is None or not engine.usable:
            engine, holders = Engine(settings), 0
        _engines[key] = (engine, holders + 1)
        return engine


def release(engine: Engine, *, wait: bool = True) -> None:
    """Gives an engine back; the last one to do so closes it, and waits until it has stopped unless told not to."""
    with _lock:
        for key, (known, holders) in list(_engines.items()):
            if known is engine:
                if holders > 1:
                    _engines[key] = (engine, holders - 1)
                    return
                del _engines[key]
    engine.close(wait=wait)


def release_when_collected(owner: object, engine: Engine) -> Callable[[], object]:
    """Releases the engine when `owner` is garbage-collected, or when what is returned is called, once."""
    return weakref.finalize(owner, release, engine, wait=False)


@atexit.register
def _close_all() -> None:
    """Waits for every worker: one that freed its tensors while the interpreter goes down would abort the process."""
    with _lock:
        _engines.clear()
    for engine in list(live):
        engine.close_at_exit()


def _after_fork() -> None:
    global _lock, _forked_after_load
    _lock = threading.RLock()
    _forked_after_load = _forked_after_load or bool(_engines)
    _engines.clear()
    for engine in list(live):
        engine.forget_fork()
    live.clear()
    weights.forget_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)

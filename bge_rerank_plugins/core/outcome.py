"""How what became of a pack reaches those who asked for its pairs: their scores, or an error that says what caused it.

Knows requests and pairs, not the queue that they come from or the device that they were scored on.
"""

from __future__ import annotations

import math
from concurrent.futures import InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .sequences import PairError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from .schedule import Pair, Request


_RESOLVED_MEANWHILE = (RuntimeError, InvalidStateError)
"""What a future raises that another device's thread, or whoever closes, has resolved at this moment."""


def recorded(pair: Pair, score: float | list[float], dtype: torch.dtype) -> list[Any] | PairError | None:
    """Records a pair's score.

    Returns:
        What to `give` to its request now: all its scores with the last of them, an error with one that is not finite in `dtype`.
    """
    request = pair.request
    if request.finished:
        return None
    if not all(map(math.isfinite, score if isinstance(score, list) else [score])):
        name = str(dtype).removeprefix("torch.")
        better = "'bfloat16' or 'float32'" if name == "float16" else "'float32'"
        cure = "its weights or its input overflow" if name == "float32" else f"use dtype={better}"
        return PairError(pair.index, f"the model's score is {score} in {name}: {cure}")
    request.scores[pair.index] = score
    request.unscored -= 1
    return None if request.unscored else request.scores


def give(request: Request, outcome: list[Any] | BaseException | None) -> None:
    """Gives a request its scores or an error, if there are any and it is not finished. Takes its future's lock."""
    if outcome is None or request.finished:
        return
    with suppress(*_RESOLVED_MEANWHILE):
        if request.future.set_running_or_notify_cancel():
            request.finished = True  # before its caller hears of it, who may ask at once what still waits
            if isinstance(outcome, BaseException):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)


def give_error_to_all(pairs: Iterable[Pair], cause: BaseException) -> None:
    """Fails the requests that pairs belong to, each with an error of its own."""
    for request in {pair.request.arrival: pair.request for pair in pairs}.values():
        give(request, caused_by(cause, f"scoring failed: {cause}"))


def caused_by(cause: BaseException, message: str) -> RuntimeError:
    """An error that is raised later, as if by `raise RuntimeError(message) from cause`."""
    error = RuntimeError(message)
    error.__cause__ = cause
    return error

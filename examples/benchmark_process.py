"""A contender of `benchmark.py` in a process of its own, as a user would run it.

In one process they would slow one another down: GNU's OpenMP lets its threads sleep at every barrier once there are more of
them than processors, which was seen to cost this package's thread 3 to 25 %.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

import torch
from benchmark_peers import CONTENDERS, Score


class Contender:
    """A contender that is ready to score.

    Args:
        family: Kind of reranker.
        name: One of `CONTENDERS[family]`.
        directory: The checkpoint.
        dtype: Name of a precision.
        device: Name of a device.

    Raises:
        PeerMissing: It cannot run here.
    """

    def __init__(self, family: str, name: str, directory: Path, dtype: str, device: str) -> None:
        self._which = family, name, directory, dtype, device
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self._process.submit(_prepare, self._which).result()
        except BaseException:
            self._process.shutdown()
            raise

    def __enter__(self) -> "Contender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.shutdown()

    def score(self, query: str, passages: Sequence[str]) -> tuple[list[float], float]:
        """The scores, and the seconds that they took, without the way between the processes."""
        return self._process.submit(_timed, self._which, query, list(passages)).result()


_Which = tuple[str, str, Path, str, str]


@cache
def _made(which: _Which) -> Score:
    family, name, directory, dtype, device = which
    return CONTENDERS[family][name](directory, getattr(torch, dtype), device)


def _prepare(which: _Which) -> None:
    _made(which)


def _timed(which: _Which, query: str, passages: list[str]) -> tuple[list[float], float]:
    score = _made(which)
    start = time.perf_counter()
    scores = [float(s) for s in score(query, passages)]
    return scores, time.perf_counter() - start

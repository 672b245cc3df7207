"""Is it text? The checks on what is given to be scored, layers among it. Knows nothing of tokens or models."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import accumulate
from numbers import Integral
from typing import Any, TypeVar

from .core.sequences import PairError

_T = TypeVar("_T")


def checked_texts(query: str, passages: Iterable[str]) -> list[str]:
    """The passages as a list, once they and the query are known to be text.

    Raises:
        ValueError: Something is not a string, or no valid Unicode; the message names it by its place.
    """
    check_text(query, "query")
    if not in_order(passages):
        raise ValueError(f"passages={_shown(passages)}: expected a list of strings")
    texts = list(passages)
    for index, text in enumerate(texts):
        check_text(text, f"passages[{index}]")
    return texts


def in_order(texts: object) -> bool:
    """Whether these are several, in an order: a dictionary and a table have keys, a set no order, and a string is one."""
    one_by_one = isinstance(texts, Iterable) and getattr(texts, "ndim", 1) == 1 and not _is_table(texts)
    return one_by_one and (isinstance(texts, KeysView) or not isinstance(texts, (str, bytes, Mapping, Set)))


def checked_layers(cutoff_layers: Iterable[int]) -> list[int]:
    """The layers as Python's own numbers.

    Raises:
        ValueError: There is no list, or something in it is no whole number.
    """
    if isinstance(cutoff_layers, (str, bytes)) or not isinstance(cutoff_layers, Iterable):
        raise ValueError(f"cutoff_layers={cutoff_layers!r}: expected a list of layers")
    layers = list(cutoff_layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            raise ValueError(f"cutoff_layers={layers!r}: expected whole numbers, got {layer!r}")
    return [int(layer) for layer in layers]


def checked_requests(requests: Iterable[tuple[str, Sequence[str]]]) -> list[tuple[str, list[str]]]:
    """Queries with their passages, once all are known to be text.

    Raises:
        ValueError: As `checked_texts`; the message names the request by its place.
    """
    return by_place(requests, "(query, passages)", lambda query, passages: (query, checked_texts(query, passages)))


def by_place(requests: Iterable[Any], form: str, checked: Callable[[Any, Any], _T]) -> list[_T]:
    """What `checked` makes of the two parts of each request.

    Raises:
        ValueError: There is no list, something is not two parts, or `checked` raised it; the message names what.
    """
    if not isinstance(requests, Iterable):
        raise ValueError(f"requests={_shown(requests)}: expected a list of {form}")
    results = []
    for index, request in enumerate(requests):
        if isinstance(request, str) or not isinstance(request, Sequence) or len(request) != 2:
            raise ValueError(f"requests[{index}]: expected {form}, got {_shown(request)}")
        try:
            results.append(checked(*request))
        except ValueError as error:
            raise ValueError(f"requests[{index}]: {error}") from error
    return results


@contextmanager
def naming_requests(requests: Sequence[tuple[str, Sequence[str]]]) -> Iterator[None]:
    """Has an error of one of the requests' pairs name it by the places of its request and of its passage there."""
    try:
        yield
    except PairError as error:
        ends = list(accumulate(len(passages) for _, passages in requests))
        place = bisect_right(ends, error.index)
        passage = error.index - (ends[place - 1] if place else 0)
        raise ValueError(f"requests[{place}]: passages[{passage}]: {error.why}") from None


def scores_by_request(requests: Sequence[tuple[str, Sequence[str]]], scores: Sequence[_T]) -> list[list[_T]]:
    """The scores of all pairs of the requests, in order, as a list for each request."""
    remaining = iter(scores)
    return [[next(remaining) for _ in passages] for _, passages in requests]


def requests_of_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Pairs as requests: those that follow each other with the same query become one, in the order of the pairs.

    Raises:
        ValueError: Something is not a pair of strings; the message names it by its place.
    """
    return list(stream_of_requests(pairs))


def stream_of_requests(pairs: Iterable[tuple[str, str]], longest: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """`requests_of_pairs` for any number of pairs: requests of at most `longest` passages, as they come.

    The request before a pair that is refused, or that fails to come, is yielded before the error is raised.
    """
    check_pairs(pairs)
    query, passages = "", list[str]()
    try:
        for index, pair in enumerate(pairs):
            _check_pair(pair, index)
            if passages and (pair[0] != query or len(passages) == longest):
                yield query, passages
                passages = []
            query = pair[0]
            passages.append(pair[1])
    except Exception:
        if passages:
            yield query, passages
        raise
    if passages:
        yield query, passages


def check_pairs(pairs: object) -> None:
    """Raises ValueError for what holds no pairs, one after the other."""
    if not isinstance(pairs, Iterable) or getattr(pairs, "ndim", 1) == 0 or _is_table(pairs):
        raise ValueError(f"pairs={_shown(pairs)}: expected a list of (query, passage)")


def _is_table(value: object) -> bool:
    """Whether its elements would be its columns, or their names."""
    return not callable(getattr(value, "columns", len))  # of a database's result it is a method


def _check_pair(pair: object, index: int) -> None:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"pairs[{index}]={_shown(pair)}: expected (query, passage)")
    check_text(pair[0], f"pairs[{index}][0]")
    check_text(pair[1], f"pairs[{index}][1]")


def check_text(value: object, name: str) -> None:
    """Raises ValueError for what is not a string, or cannot be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={_shown(value)}: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={_shown(value)}: not valid Unicode, {error.reason} at {error.start}") from error


def _shown(value: object) -> str:
    text = ascii(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:77]}..."

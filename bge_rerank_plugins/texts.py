"""Is it text? The checks on what is given to be scored. Knows nothing of tokens or models."""

from collections.abc import Iterable, Sequence


def checked_texts(query: str, passages: Iterable[str]) -> list[str]:
    """The passages as a list, once they and the query are known to be text.

    Raises:
        ValueError: Something is not a string, or no valid Unicode; the message names it by its place.
    """
    check_text(query, "query")
    if isinstance(passages, (str, bytes)) or not isinstance(passages, Iterable):
        raise ValueError(f"passages={_shown(passages)}: expected a list of strings")
    texts = list(passages)
    for index, text in enumerate(texts):
        check_text(text, f"passages[{index}]")
    return texts


def requests_of_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Pairs as requests: those that follow each other with the same query become one, in the order of the pairs.

    Raises:
        ValueError: Something is not a pair of strings; the message names it by its place.
    """
    requests: list[tuple[str, list[str]]] = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"pairs[{index}]={_shown(pair)}: expected (query, passage)")
        query, passage = pair
        check_text(query, f"pairs[{index}][0]")
        check_text(passage, f"pairs[{index}][1]")
        if requests and requests[-1][0] == query:
            requests[-1][1].append(passage)
        else:
            requests.append((query, [passage]))
    return requests


def check_text(value: object, name: str) -> None:
    """Raises ValueError for what is not a string, or cannot be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={_shown(value)}: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={_shown(value)}: not valid Unicode, {error.reason} at {error.start}") from error


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

"""JSON lines from users: one object a line, every malformed one named by its file and number.

Knows nothing of what the objects mean.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple


class InputError(ValueError):
    """What was given cannot be used; the message is one line for the user."""


class InputErrors(InputError):
    """Several things that cannot be used.

    Attributes:
        messages: A line for each.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)


class Line(NamedTuple):
    """One line of input.

    Attributes:
        place: The file and the line's number, for messages.
        record: The JSON object, all its keys.
    """

    place: str
    record: dict[str, Any]


def read_lines(source: Iterable[bytes], name: str, check: Callable[[dict[str, Any]], None]) -> Iterator[Line]:
    """Reads lines one by one; blank ones are skipped.

    Args:
        source: The lines, UTF-8.
        name: Name of the file, for messages.
        check: Raises ValueError for an object that is not what is expected.

    Raises:
        InputError: A malformed line; the message tells the file, the line's number and why.
    """
    for line in _checked_lines(source, name, check):
        if isinstance(line, InputError):
            raise line
        yield line


def read_all_lines(source: Iterable[bytes], name: str, check: Callable[[dict[str, Any]], None]) -> list[Line]:
    """Reads all lines before anything is done with them; blank ones are skipped.

    Args:
        source: The lines, UTF-8.
        name: Name of the file, for messages.
        check: Raises ValueError for an object that is not what is expected.

    Raises:
        InputErrors: Every malformed line, each with the file, the line's number and why; or there is no line at all.
    """
    lines: list[Line] = []
    errors: list[str] = []
    for line in _checked_lines(source, name, check):
        if isinstance(line, InputError):
            errors.append(str(line))
        else:
            lines.append(line)
    if not lines and not errors:
        errors.append(f"{name}: no lines")
    if errors:
        raise InputErrors(errors)
    return lines


def _checked_lines(
    source: Iterable[bytes], name: str, check: Callable[[dict[str, Any]], None]
) -> Iterator[Line | InputError]:
    for number, raw in enumerate(source, start=1):
        text = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).rstrip()
        if not text:
            continue
        place = f"{name}:{number}"
        try:
            record = _record(text)
            check(record)
        except ValueError as error:
            wrong = InputError(f"{place}: {error}")
            wrong.__cause__ = error
            yield wrong
        else:
            yield Line(place, record)


def check_text(record: dict[str, Any], key: str) -> None:
    """Raises ValueError unless the object has a string there."""
    _check_key(record, key)
    if not isinstance(record[key], str):
        raise ValueError(f'"{key}" is {json_kind(record[key])}, expected a string')


def check_texts(record: dict[str, Any], key: str) -> None:
    """Raises ValueError unless the object has an array of strings there."""
    _check_array(record, key, "string")


def check_numbers(record: dict[str, Any], key: str) -> None:
    """Raises ValueError unless the object has an array of numbers there."""
    _check_array(record, key, "number")


def _check_array(record: dict[str, Any], key: str, kind: str) -> None:
    _check_key(record, key)
    if not isinstance(record[key], list):
        raise ValueError(f'"{key}" is {json_kind(record[key])}, expected an array of {kind}s')
    for index, value in enumerate(record[key]):
        if json_kind(value) != f"a {kind}":
            raise ValueError(f'"{key}"[{index}] is {json_kind(value)}, expected a {kind}')


def _check_key(record: dict[str, Any], key: str) -> None:
    if key not in record:
        raise ValueError(f'no "{key}"')


def _record(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite, parse_int=_readable)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {json_kind(record)}")
    try:
        json_line(record)
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode text: half of a surrogate pair, {error.object[error.start]!a}") from error
    except RecursionError as error:  # writing takes a level more than reading
        raise ValueError("nested too deeply") from error
    return record


def json_line(record: dict[str, Any]) -> bytes:
    """The line of an object, UTF-8."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def json_kind(value: object) -> str:
    """What JSON calls a value."""
    kinds = {bool: "a boolean", str: "a string", list: "an array", dict: "an object", NoneType: "null"}
    return kinds.get(type(value), "a number")


def _no_constant(text: str) -> float:
    raise ValueError(f"not JSON: {text}")


def _readable(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"an integer of {len(text):,} digits is too long") from error


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond a 64-bit float")
    return number

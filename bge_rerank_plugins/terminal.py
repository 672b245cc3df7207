"""What people read on a terminal: facts and tables in plain text, errors in one line, whether there is a progress bar."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from .jsonl import InputErrors


def print_facts(facts: dict[str, str]) -> None:
    """Prints names and what they are, long texts over several lines."""
    width = max(map(len, facts)) + 2
    columns = max(shutil.get_terminal_size().columns, width + 30)
    for name, value in facts.items():
        lines = textwrap.wrap(
            value, columns, initial_indent=name.ljust(width), subsequent_indent=" " * width, break_long_words=False
        )
        sys.stdout.write("\n".join(lines) + "\n")


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns; the first is left-aligned, and so is what is no number."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = [
            cell.ljust(width) if cell[:1].isalpha() else cell.rjust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def bar_is_hidden(shown: bool | None) -> bool | None:
    """What tqdm calls `disable`. None is for it to decide: a bar where standard error is a terminal; none where it is closed."""
    if sys.stderr is None:
        return True
    return None if shown is None else not shown


def error_lines(error: Exception) -> list[str]:
    """The messages of an error, a line each."""
    return list(error.messages) if isinstance(error, InputErrors) else [one_line(error)]


def one_line(error: Exception) -> str:
    """The message of an error, without line breaks; of pydantic's, what the user gave and what is wrong with it."""
    if isinstance(error, ValidationError):
        return "; ".join(map(_option_message, error.errors()))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _option_message(error: Any) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    name = ".".join(map(str, error["loc"]))
    return message if not name or message.startswith(f"{name}=") else f"{name}={error['input']!r}: {message}"

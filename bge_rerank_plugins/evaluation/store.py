"""Scores that outlive a killed process: one JSON line per query and system, appended as soon as it is there.

Knows nothing of what was scored: a key says what was asked, and the same key is never scored twice.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..jsonl import InputError, check_text, json_kind, json_line, read_lines


class ScoreStore:
    """An append-only file of scores, or nothing but memory.

    Args:
        path: The file, made at the first `put`; None keeps everything in memory.

    Raises:
        InputError: A line in the middle is malformed. A torn last line, which a killed process leaves, is dropped instead.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._records: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            for line in read_lines(whole.splitlines(), str(path), _check):
                self._records[line.record["key"]] = line.record
            if len(whole) < len(content):
                os.truncate(path, len(whole))

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, or None."""
        return self._records.get(key)

    def put(self, key: str, **values: Any) -> dict[str, Any]:
        """Keeps a record and returns it. It is in the file when this returns."""
        record = {"key": key, **values}
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(json_line(record))
        self._records[key] = record
        return record


def _check(record: dict[str, Any]) -> None:
    check_text(record, "key")
    for key, kind in (("scores", list), ("seconds", (int, float))):
        if key not in record:
            raise ValueError(f'no "{key}"')
        if not isinstance(record[key], kind):
            raise ValueError(f'"{key}" is {json_kind(record[key])}')


def check_same_data(path: Path, digest: str) -> None:
    """Raises InputError where the results at `path` are those of other data, which would be lost."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_bytes())["data"]["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the results of an evaluation; choose another folder") from error
    if found != digest:
        raise InputError(f"{path}: the results of other data, which would be lost; choose another folder")

"""Files that are read and written for a user, without losing what they held. Knows nothing of what stands in them."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from .jsonl import InputError


@contextmanager
def opened(file: str, output: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """An input and an output, as bytes: both are UTF-8 whatever the terminal's encoding. The output keeps what it held.

    Args:
        file: What to read; "-" for standard input.
        output: What to write to; "-" for standard output.

    Raises:
        InputError: The output is the input or has no name, or a standard stream is closed.
        OSError: One of them cannot be opened.
    """
    if not output:
        raise InputError("--output '': name a file, or - for standard output")
    if file == "-" and sys.stdin is None:
        raise InputError("standard input is closed")
    source = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115
    try:
        sink = sys.stdout.buffer if output == "-" else open(Path(output), "wb", opener=_as_it_is)  # noqa: SIM115
        try:
            if is_regular(source) and is_regular(sink) and os.path.sameopenfile(source.fileno(), sink.fileno()):
                raise InputError(f"--output {output}: that is the input, which would be lost")
            yield source, sink
        finally:
            if output != "-":
                sink.close()
    finally:
        if file != "-":
            source.close()


def _as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def empty(sink: BinaryIO) -> None:
    """Takes out of an output of `opened` what it held; leaves standard output, and what is no file on a disk."""
    if sink is not sys.stdout.buffer and is_regular(sink):
        sink.truncate(0)


def is_regular(stream: BinaryIO) -> bool:
    """Whether it is a file on a disk: reading never waits for somebody to write, and what was written can be taken back."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # not a file of the operating system
        return False


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is written in one move: whoever looks sees the old content or the new, never half of it.

    What is no file on a disk, such as a pipe, stays what it is and gets the content as it comes; what a link leads to is written.
    Who may read the old content may read the new, and nobody else.
    """
    if _is_written_directly(path):
        with path.open("wb") as sink:
            yield sink
        return
    path = path.resolve()
    # With the whole name in it, its name could be longer than a name may be; and another process may write to the same path.
    stem = f".{path.name[:32]}.{sha256(os.fsencode(path.name)).hexdigest()[:16]}"
    part = path.with_name(f"{stem}.{token_hex(8)}.part")
    _remove_what_was_left(path.parent, stem)
    try:
        with part.open("xb") as sink:
            if path.exists():
                shutil.copymode(path, part)  # before there is anything to read
            yield sink
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _remove_what_was_left(folder: Path, stem: str) -> None:
    """Removes parts that processes left which were killed: nobody has written to them for a day."""
    for part in folder.glob(f"{escape(stem)}.*.part"):
        with suppress(OSError):  # another process removes it
            if part.stat().st_mtime < time.time() - 24 * 3600:
                part.unlink()


def _is_written_directly(path: Path) -> bool:
    """Whether there is something that is no file on a disk; a link such as /dev/stdout leads to a pipe, which has no path."""
    return path.exists() and not path.resolve().is_file()


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one move."""
    with whole(path) as sink:
        sink.write(text.encode())


def check_writable(flag: str, path: str) -> None:
    """Raises InputError for a file that could not be written, before anything that takes time."""
    parent = Path(path).resolve().parent
    if Path(path).is_dir():
        raise InputError(f"{flag} {path or '.'}: cannot be written, that is a directory")
    if _is_written_directly(Path(path)):
        if not os.access(path, os.W_OK):
            raise InputError(f"{flag} {path}: cannot be written, it is read-only")
        return
    if not parent.is_dir():
        raise InputError(f"{flag} {path}: cannot be written, there is no such directory as {parent}")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{flag} {path}: cannot be written, {parent} is read-only")

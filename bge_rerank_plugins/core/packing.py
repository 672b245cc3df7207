"""Packs: token sequences laid end to end, with never a padding token between them.

A sequence may begin with a prefix that other sequences of the same request share (the query of a causal language model).
The prefix then stands once in the pack, as a sequence of its own, and the keys and values that belong to it are read by
every sequence that shares it; or it stood in an earlier pack, and they were kept. Knows nothing of models, text or devices
beyond "put these index tensors there".
"""

from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .prefixes import Carried, Prefixes
from .sequences import TokenSequence


class Segment(NamedTuple):
    """A run of tokens in a pack that attends to its own keys, after those of a prefix if it has one.

    `start:stop` are the rows of its queries and own keys; `prefix_start:prefix_stop` those of the shared keys before them, which
    are beyond the pack's own rows if they were kept from an earlier one.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def queries(self) -> int:
        """Number of its rows."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """Number of the keys that they see, those of the prefix included."""
        return self.queries + self.prefix_stop - self.prefix_start


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences laid end to end.

    Attributes:
        input_ids: Shape (tokens,), int64.
        position_ids: Zero-based position of each token in its own sequence. Shape (tokens,), int64.
        token_type_ids: Shape (tokens,), int64, or None.
        segments: What attends to what, in the order of the rows.
        first_rows: Row of the first token of each sequence that is in the pack. Shape (sequences,), int64.
        last_rows: Row of the last token of each sequence. Shape (sequences,), int64.
        cu_seqlens_q: Where segments begin among the rows. Shape (segments + 1,), int32.
        cu_seqlens_k: Where the keys of segments begin. Equal to `cu_seqlens_q` where no prefix is shared.
        key_rows: Row of each key, to gather them; None where no prefix is shared and the keys are the rows themselves.
        longest_q: Most rows of a segment.
        longest_k: Most keys of a segment.
        carried: What it shares with the packs before and after it.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    segments: tuple[Segment, ...]
    first_rows: Tensor
    last_rows: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_rows: Tensor | None
    longest_q: int
    longest_k: int
    carried: Carried = field(default_factory=Carried)

    def __len__(self) -> int:
        """Number of tokens that are computed."""
        return len(self.input_ids)


def pack_sequences(
    sequences: Sequence[TokenSequence],
    device: torch.device | str = "cpu",
    rows_for: Callable[[int], int] = lambda rows: rows,
    kept: Prefixes | None = None,
    keep: Collection[int] = (),
) -> Pack:
    """Lays sequences end to end; sequences of one group share one copy of their prefix.

    Args:
        sequences: What to lay.
        device: Where the tensors go.
        rows_for: The number of tokens that a pack of so many is filled up to, for devices that want few sizes. What fills it
            stands behind all others as a sequence of its own, which nobody asked for.
        kept: Prefixes from earlier packs, which are not laid again.
        keep: Groups whose prefixes later packs go on with; those among them that this pack has are left in `carried.after`.
    """
    kept = Prefixes() if kept is None else kept
    laid = _Laid(kept)
    for sequence in sequences:
        laid.add(sequence)
    if missing := rows_for(len(laid.ids)) - len(laid.ids):
        laid.add(TokenSequence([0] * missing, position_ids=[0] * missing))
    segments = laid.segments()

    key_rows = None
    if any(s.prefix_stop for s in segments):
        key_rows = [row for s in segments for row in (*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop))]

    columns: dict[str, list[int]] = {
        "input_ids": laid.ids,
        "position_ids": laid.positions,
        "token_type_ids": laid.types if any(s.token_type_ids for s in sequences) else [],
        "first_rows": laid.first_rows,
        "last_rows": laid.last_rows,
        "cu_seqlens_q": [0, *(s.stop for s in segments)],
        "cu_seqlens_k": list(accumulate((s.keys for s in segments), initial=0)),
        "key_rows": key_rows or [],
    }
    on_device = _in_one_copy(columns, torch.device(device))
    own = tuple((group, slice(rows.start, rows.stop)) for group, rows in laid.prefixes.items() if group in keep)
    return Pack(
        input_ids=on_device["input_ids"],
        position_ids=on_device["position_ids"],
        token_type_ids=on_device["token_type_ids"] if columns["token_type_ids"] else None,
        segments=segments,
        first_rows=on_device["first_rows"],
        last_rows=on_device["last_rows"],
        cu_seqlens_q=on_device["cu_seqlens_q"].to(torch.int32),
        cu_seqlens_k=on_device["cu_seqlens_k"].to(torch.int32),
        key_rows=on_device["key_rows"] if key_rows is not None else None,
        longest_q=max((s.queries for s in segments), default=0),
        longest_k=max((s.keys for s in segments), default=0),
        carried=Carried(kept, tuple(laid.read), kept.of(keep), own),
    )


class _Laid:
    """Sequences as they are laid."""

    def __init__(self, kept: Prefixes) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.types: list[int] = []
        self.first_rows: list[int] = []
        self.last_rows: list[int] = []
        self.prefixes: dict[int, Segment] = {}
        """Of the groups whose prefixes stand in the pack."""
        self.read: dict[int, int] = {}
        """Lengths of the kept prefixes that are read, by group."""
        self._kept = kept
        self._parts: list[tuple[int, int, int | None]] = []  # start, stop, group if there is a prefix

    def add(self, sequence: TokenSequence) -> None:
        """Lays a sequence, and its prefix first if it is neither laid nor kept."""
        first = None
        if sequence.prefix and sequence.group in self._kept:
            self.read[sequence.group] = sequence.prefix
        elif sequence.prefix:
            if sequence.group not in self.prefixes:
                start, stop = self._lay(sequence, 0, sequence.prefix)
                self.prefixes[sequence.group] = Segment(start, stop)
                self._parts.append((start, stop, None))
            first = self.prefixes[sequence.group].start
        start, stop = self._lay(sequence, sequence.prefix, len(sequence))
        self._parts.append((start, stop, sequence.group if sequence.prefix else None))
        self.first_rows.append(start if first is None else first)
        self.last_rows.append(stop - 1)

    def segments(self) -> tuple[Segment, ...]:
        """What was laid, the kept prefixes standing behind all of it."""
        prefixes = dict(self.prefixes)
        end = len(self.ids)
        for group, length in self.read.items():
            prefixes[group] = Segment(end, end + length)
            end += length
        none = Segment(0, 0)
        found = [(start, stop, none if group is None else prefixes[group]) for start, stop, group in self._parts]
        return tuple(Segment(start, stop, prefix.start, prefix.stop) for start, stop, prefix in found)

    def _lay(self, sequence: TokenSequence, begin: int, end: int) -> tuple[int, int]:
        start = len(self.ids)
        self.ids.extend(sequence.input_ids[begin:end])
        self.positions.extend((sequence.position_ids or range(len(sequence)))[begin:end])
        self.types.extend((sequence.token_type_ids or [0] * len(sequence))[begin:end])
        return start, len(self.ids)


def _in_one_copy(columns: dict[str, list[int]], device: torch.device) -> dict[str, Tensor]:
    """Lists as int64 tensors on a device, sent together; on CUDA from pinned memory, so that nobody waits for the copy."""
    # Arrays, since torch reads a list one number at a time, which takes it several times as long.
    joined = torch.frombuffer(bytearray().join(array("q", column) for column in columns.values()), dtype=torch.int64)
    pinned = device.type == "cuda"
    if pinned:
        joined = joined.pin_memory()
    # Other memory may be gone before a copy that nobody waits for has read it (MPS).
    parts = torch.split(joined.to(device, non_blocking=pinned), [len(column) for column in columns.values()])
    return dict(zip(columns, parts, strict=True))

"""Packs: token sequences laid end to end, with never a padding token between them.

A sequence may begin with a prefix that other sequences of the same request share (the query of a causal language model).
The prefix then stands once in the pack, as a sequence of its own, and the keys and values that belong to it are read by
every sequence that shares it. Knows nothing of models, text or devices beyond "put these index tensors there".
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import TokenSequence


class Segment(NamedTuple):
    """A run of tokens in a pack that attends to its own keys, after those of a prefix if it has one.

    `start:stop` are the rows of its queries and own keys; `prefix_start:prefix_stop` those of the shared keys before them.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences laid end to end.

    Attributes:
        input_ids: Shape (tokens,), int64.
        position_ids: Zero-based position of each token in its own sequence. Shape (tokens,), int64.
        token_type_ids: Shape (tokens,), int64, or None.
        segments: What attends to what, in the order of the rows.
        first_rows: Row of the first token of each sequence. Shape (sequences,), int64.
        last_rows: Row of the last token of each sequence. Shape (sequences,), int64.
        cu_seqlens_q: Where segments begin among the rows. Shape (segments + 1,), int32.
        cu_seqlens_k: Where the keys of segments begin. Equal to `cu_seqlens_q` where no prefix is shared.
        key_rows: Row of each key, to gather them; None where no prefix is shared and the keys are the rows themselves.
        longest_q: Most rows of a segment.
        longest_k: Most keys of a segment.
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

    def __len__(self) -> int:
        """Number of tokens that are computed."""
        return len(self.input_ids)


def pack_sequences(
    sequences: Sequence[TokenSequence],
    device: torch.device | str = "cpu",
    rows_for: Callable[[int], int] = lambda rows: rows,
) -> Pack:
    """Lays sequences end to end; sequences of one group share one copy of their prefix.

    Args:
        sequences: What to lay.
        device: Where the tensors go.
        rows_for: The number of tokens that a pack of so many is filled up to, for devices that want few sizes. What fills it
            stands behind all others as a sequence of its own, which nobody asked for.
    """
    ids: list[int] = []
    positions: list[int] = []
    types: list[int] = []
    segments: list[Segment] = []
    first_rows: list[int] = []
    last_rows: list[int] = []
    prefix_of_group: dict[int, Segment] = {}

    def lay(sequence: TokenSequence, begin: int, end: int) -> tuple[int, int]:
        start = len(ids)
        ids.extend(sequence.input_ids[begin:end])
        positions.extend((sequence.position_ids or range(len(sequence)))[begin:end])
        types.extend((sequence.token_type_ids or [0] * len(sequence))[begin:end])
        return start, len(ids)

    def add(sequence: TokenSequence) -> None:
        prefix = Segment(0, 0)
        if sequence.prefix:
            if sequence.group not in prefix_of_group:
                prefix_of_group[sequence.group] = Segment(*lay(sequence, 0, sequence.prefix))
                segments.append(prefix_of_group[sequence.group])
            prefix = prefix_of_group[sequence.group]
        start, stop = lay(sequence, sequence.prefix, len(sequence))
        segments.append(Segment(start, stop, prefix.start, prefix.stop))
        first_rows.append(prefix.start if sequence.prefix else start)
        last_rows.append(stop - 1)

    for sequence in sequences:
        add(sequence)
    if missing := rows_for(len(ids)) - len(ids):
        add(TokenSequence([0] * missing, position_ids=[0] * missing))

    key_counts = [s.stop - s.start + s.prefix_stop - s.prefix_start for s in segments]
    key_rows = None
    if prefix_of_group:
        key_rows = [row for s in segments for row in (*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop))]

    columns: dict[str, list[int]] = {
        "input_ids": ids,
        "position_ids": positions,
        "token_type_ids": types if any(s.token_type_ids for s in sequences) else [],
        "first_rows": first_rows,
        "last_rows": last_rows,
        "cu_seqlens_q": [0, *(s.stop for s in segments)],
        "cu_seqlens_k": _running_sum(key_counts),
        "key_rows": key_rows or [],
    }
    on_device = _in_one_copy(columns, torch.device(device))
    return Pack(
        input_ids=on_device["input_ids"],
        position_ids=on_device["position_ids"],
        token_type_ids=on_device["token_type_ids"] if columns["token_type_ids"] else None,
        segments=tuple(segments),
        first_rows=on_device["first_rows"],
        last_rows=on_device["last_rows"],
        cu_seqlens_q=on_device["cu_seqlens_q"].to(torch.int32),
        cu_seqlens_k=on_device["cu_seqlens_k"].to(torch.int32),
        key_rows=on_device["key_rows"] if key_rows is not None else None,
        longest_q=max((s.stop - s.start for s in segments), default=0),
        longest_k=max(key_counts, default=0),
    )


def _in_one_copy(columns: dict[str, list[int]], device: torch.device) -> dict[str, Tensor]:
    """Lists as int64 tensors on a device, sent together; on CUDA from pinned memory, so that nobody waits for the copy."""
    joined = torch.tensor([value for column in columns.values() for value in column], dtype=torch.int64)
    if device.type == "cuda":
        joined = joined.pin_memory()
    parts = torch.split(joined.to(device, non_blocking=True), [len(column) for column in columns.values()])
    return dict(zip(columns, parts, strict=True))


def _running_sum(counts: Iterable[int]) -> list[int]:
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums

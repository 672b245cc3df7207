"""Token ids of one query-passage pair: what families make of text, and packs are made of; and what is wrong with one.

Knows nothing of torch.
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One query-passage pair as token ids.

    Attributes:
        input_ids: All ids of the pair, those of the shared prefix included.
        token_type_ids: Segment of every id, or None where the model has no segments.
        position_ids: Zero-based position of every id, or None for 0, 1, 2, ...
        prefix: Number of leading ids that this sequence shares with the sequences of the same `group`.
        group: Sequences with equal groups have equal prefixes. Meaningless while `prefix` is 0.
        truncated: Whether the passage was cut to fit.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None = None
    position_ids: list[int] | None = None
    prefix: int = 0
    group: int = 0
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def key(self) -> bytes:
        """Equal for sequences that are alike to a model, and therefore to have one score. 16 bytes."""
        digest = blake2b(digest_size=16)
        for column in (self.input_ids, self.token_type_ids or (), self.position_ids or ()):
            digest.update(len(column).to_bytes(8, "little"))
            digest.update(array("q", column).tobytes())
        return digest.digest()

    def tokens_beside(self, groups: Collection[int]) -> int:
        """Tokens that remain to be computed where the prefixes of these groups are there already."""
        return len(self) - (self.prefix if self.group in groups else 0)


class PairError(ValueError):
    """Why one pair of several cannot be scored.

    Args:
        index: The pair's place among them, from 0.
        why: What is wrong with it.
    """

    def __init__(self, index: int, why: str) -> None:
        super().__init__(index, why)  # what it is made of again in another process
        self.index, self.why = index, why

    def __str__(self) -> str:
        return f"pair {self.index}: {self.why}"


@contextmanager
def counted_from(before: int, windows: Sequence[int] | None = None) -> Iterator[None]:
    """Has the pair of a `PairError` counted among all pairs of a call, not among those that were handed over together.

    Args:
        before: Pairs of the call before these.
        windows: In how many parts each of these was handed over; None for one each.
    """
    try:
        yield
    except PairError as error:
        index = error.index if windows is None else bisect_right(list(accumulate(windows)), error.index)
        raise PairError(before + index, error.why) from None


def computed_tokens(sequences: Iterable[TokenSequence], kept: Iterable[int] = ()) -> int:
    """Tokens that a pack of these sequences computes: every shared prefix once, and those of the groups in `kept` not at all."""
    known, tokens = set(kept), 0
    for sequence in sequences:
        tokens += sequence.tokens_beside(known)
        known.add(sequence.group)
    return tokens


def cut(ids: list[int], room: int, side: str) -> list[int]:
    """At most `room` of these ids; what is too much is left out at `side`, "right" or "left", as transformers' tokenizers do."""
    return ids[:room] if side == "right" else ids[max(0, len(ids) - room) :]


PUBLISHED_LENGTH = 1024
"""Tokens of a pair in the published evaluation."""


def longest_pair(asked: int | None, positions: int, model: str, prompt: int = 0) -> int:
    """Longest pair in tokens.

    Args:
        asked: The user's `max_length`, or None for the default: `PUBLISHED_LENGTH`, or less where less fits.
        positions: Number of positions that the checkpoint leaves for a pair.
        model: The checkpoint's name, for the message.
        prompt: How many more positions there are, and taken, for the message.

    Raises:
        ValueError: More is asked for than there is, or there is nothing.
    """
    if positions < 1:
        raise ValueError(f"model={model!r}: its config.json leaves {positions} positions for a pair")
    if asked is None:
        return min(PUBLISHED_LENGTH, positions)
    if asked > positions:
        beside = f" beside the {prompt} tokens of separator and prompt" if prompt else ""
        raise ValueError(f"max_length={asked}: the positions of {model!r} allow at most {positions}{beside}")
    return asked


def longest_query(asked: int | None, max_length: int, room: int) -> int:
    """Longest query in tokens.

    Args:
        asked: The user's `query_max_length`, or None for the default: 3/4 of the pair.
        max_length: Longest pair in tokens, which the checkpoint may have given.
        room: Tokens that special tokens, and what a passage needs at least, leave of it.

    Raises:
        ValueError: More is asked for than the whole pair has.
    """
    if asked is not None and asked > max_length:
        raise ValueError(f"query_max_length={asked}: longer than the whole pair, max_length={max_length}")
    return min(asked or max_length * 3 // 4, room)

"""A long passage in parts that each fit, for scoring it by its best part (MaxP, Dai & Callan 2019, arXiv:1905.09217).

Parts are cut out of the text, between tokens, so that every family encodes a part as it encodes any passage.
"""

from collections.abc import Iterator

from tokenizers import Tokenizer

OVERLAP = 1 / 4
"""Share of a part that the next one repeats, so that nothing stands only at a cut."""


def split_text(tokenizer: Tokenizer, text: str, room: int, instruction: str = "") -> list[str]:
    """Parts of `text` of at most `room` tokens each.

    Args:
        tokenizer: The tokenizer that counts.
        text: The passage.
        room: Tokens that fit, those of the instruction included.
        instruction: What the family will put before every part.

    Returns:
        The text itself if it fits, else parts in their order; together they hold all of it.
    """
    return [text[start:stop] for start, stop in _spans(tokenizer, text, room, instruction)]


def _spans(tokenizer: Tokenizer, text: str, room: int, instruction: str) -> Iterator[tuple[int, int]]:
    def tokens(part: str) -> int:
        return len(tokenizer.encode(instruction + part, add_special_tokens=False).ids)

    size = room - tokens("")
    if tokens(text) <= room or size < 1:  # it fits, or no part of it ever does
        yield 0, len(text)
        return
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    ends = _ends(offsets, text)
    start = stop = 0
    while stop < len(offsets):
        stop = min(start + size, len(offsets))
        # What is cut inside a word may take a token more than it did within it.
        while stop > start + 1 and tokens(text[offsets[start][0] : ends[stop - 1]]) > room:
            stop -= 1
        yield offsets[start][0], ends[stop - 1]
        start = max(start + 1, stop - int(size * OVERLAP))


def _ends(offsets: list[tuple[int, int]], text: str) -> list[int]:
    """Where the text of each token ends: where that of the next one begins, but for the white space before it.

    A tokenizer that composes letters says where the first character of a composed one ends; its accent follows.
    """
    starts = [start for start, _ in offsets[1:]] + [len(text)]
    return [
        max(stop, begin + len(text[begin:following].rstrip()))
        for (begin, stop), following in zip(offsets, starts, strict=True)
    ]

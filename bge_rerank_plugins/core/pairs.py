"""Token ids of a query-passage pair as cross-encoders take it: the tokenizer's own template around both, cut to fit.

Knows nothing of torch, so that a graph runtime can use it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from .sequences import TokenSequence, cut, longest_query
from .windows import split_text
from .words import Words

if TYPE_CHECKING:
    from ..settings import RerankSettings


@dataclass(frozen=True)
class PairLayout:
    """How an architecture lays out a pair.

    Attributes:
        skips_padding: Whether positions are counted from the one after the padding index, as RoBERTa does (from zero they
            are silently wrong), and a padding token that stands in the text (as "<pad>") does not count as a position.
        token_types: Whether the model tells query from passage by segment.
    """

    skips_padding: bool
    token_types: bool

    def first_position(self, padding: int | None, model: str) -> int:
        """Position id of a sequence's first token.

        Args:
            padding: Id of the padding token, as config.json has it.
            model: The checkpoint's name, for the message.

        Raises:
            ValueError: It names none, and positions are counted from it.
        """
        if not self.skips_padding:
            return 0
        if padding is None:
            raise ValueError(
                f"model={model!r}: its config.json names no pad_token_id, from which positions are counted"
            )
        return int(padding) + 1


ROBERTA = PairLayout(skips_padding=True, token_types=False)
BERT = PairLayout(skips_padding=False, token_types=True)

LAYOUTS = {"xlm-roberta": ROBERTA, "roberta": ROBERTA, "bert": BERT}
"""By `model_type` of config.json."""


def layout_of(model_type: str | None, model: str, segments: int | None = None) -> PairLayout:
    """The layout of an architecture's pairs.

    Args:
        model_type: What config.json says.
        model: The checkpoint's name, for the message.
        segments: How many segments the model knows, `type_vocab_size` of config.json; None for as many as usual.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if model_type not in LAYOUTS:
        raise ValueError(f"model={model!r}: model_type={model_type!r} is not supported, only {', '.join(LAYOUTS)}")
    layout = LAYOUTS[model_type]
    return layout if segments is None else replace(layout, token_types=segments > 1)


def layout_as_said(layout: PairLayout, tokenizer_config: Mapping[str, Any]) -> PairLayout:
    """The layout without segments where tokenizer_config.json lists the model's inputs, and none among them."""
    inputs = tokenizer_config.get("model_input_names")
    return replace(layout, token_types=layout.token_types and (inputs is None or "token_type_ids" in inputs))


@dataclass(frozen=True)
class PairTemplate:
    """Special tokens around a query and a passage, and the segments, as the tokenizer's own template has them."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    type_ids: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> PairTemplate:
        """Read off the tokenizer's post-processor, by sending one pair through it.

        Raises:
            ValueError: It does not put a special token, the query and the passage one after the other, both whole.
        """
        query, passage = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b"))
        pair = tokenizer.encode("a", "b")
        sides = pair.sequence_ids  # 0: query, 1: passage, None: special token
        q, p = sides.index(0), sides.index(1)
        q_end, p_end = q + len(query.ids), p + len(passage.ids)
        if not q < q_end <= p < p_end or pair.ids[q:q_end] != query.ids or pair.ids[p:p_end] != passage.ids:
            raise ValueError("the tokenizer's template does not put the query before the passage, whole")
        if q == 0:
            raise ValueError("the tokenizer's template puts no special token first, where cross-encoders are read")
        types = pair.type_ids

        def type_of(start: int, stop: int) -> int:
            return types[start] if start < stop else 0

        return cls(
            before=tuple(pair.ids[:q]),
            between=tuple(pair.ids[q_end:p]),
            after=tuple(pair.ids[p_end:]),
            type_ids=(type_of(0, q), types[q], type_of(q_end, p), types[p], type_of(p_end, len(types))),
        )

    def __len__(self) -> int:
        """Number of special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, query: list[int], passage: list[int]) -> list[int]:
        """Token ids of the pair."""
        return [*self.before, *query, *self.between, *passage, *self.after]

    def join_types(self, query: list[int], passage: list[int]) -> list[int]:
        """Segment ids of the pair."""
        lengths = (len(self.before), len(query), len(self.between), len(passage), len(self.after))
        return [kind for kind, length in zip(self.type_ids, lengths, strict=True) for _ in range(length)]


class PairEncoder:
    """Pairs as token ids; safe to call from many threads at once.

    Args:
        words: What makes token ids of texts.
        layout: How the architecture lays out a pair.
        padding: Id of the padding token.
        settings: Instructions and the longest query.
        max_length: Longest pair in tokens.
        truncation_side: Where a text that is too long loses tokens, "right" or "left".

    Raises:
        ValueError: There is no room for text beside the special tokens; a query longer than the pair; a template that does not
            hold query and passage, or has tokens that the weights do not know.
    """

    def __init__(
        self,
        words: Words,
        layout: PairLayout,
        padding: int,
        settings: RerankSettings,
        max_length: int,
        truncation_side: str = "right",
    ) -> None:
        self._words = words
        self._side = truncation_side
        self._skipped = padding if layout.skips_padding else None
        self._token_types = layout.token_types
        self._template = PairTemplate.of(words.tokenizer)
        words.known(self._template.join([], []))
        self._query_instruction = settings.query_instruction or ""
        self._passage_instruction = settings.passage_instruction or ""
        self._room = max_length - len(self._template)
        if self._room < 1:
            raise ValueError(
                f"max_length={max_length}: no room for text beside the {len(self._template)} special tokens of a pair"
            )
        self._query_room = longest_query(settings.query_max_length, max_length, self._room)

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """The query cut to its longest and the template's special tokens, then the passage cut to what is left."""
        query_ids = self._query_ids(query)
        room = self._room - len(query_ids)
        passage_ids = self._words.ids([self._passage_instruction + passage for passage in passages])
        return [self._sequence(query_ids, ids, room, index) for index, ids in enumerate(passage_ids)]

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next; the passage itself if it fits."""
        room = self._room - len(self._query_ids(query))
        return split_text(self._words.tokenizer, passage, room, self._passage_instruction)

    def _sequence(self, query_ids: list[int], passage_ids: list[int], room: int, index: int) -> TokenSequence:
        truncated = len(passage_ids) > room
        passage_ids = cut(passage_ids, room, self._side)
        input_ids = self._words.known(self._template.join(query_ids, passage_ids), index)
        return TokenSequence(
            input_ids=input_ids,
            token_type_ids=self._template.join_types(query_ids, passage_ids) if self._token_types else None,
            position_ids=_positions_without(self._skipped, input_ids) if self._skipped in input_ids else None,
            truncated=truncated,
        )

    def _query_ids(self, query: str) -> list[int]:
        return cut(self._words.ids([self._query_instruction + query])[0], self._query_room, self._side)


def _positions_without(skipped: int | None, input_ids: list[int]) -> list[int]:
    """Zero-based positions where `skipped` ids do not count and stand themselves one before the first."""
    counted = accumulate(token != skipped for token in input_ids)
    return [-1 if token == skipped else count - 1 for token, count in zip(input_ids, counted, strict=True)]

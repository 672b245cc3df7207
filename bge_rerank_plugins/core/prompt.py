"""The prompt of the LLM rerankers: token ids of "A: query", "B: passage" and the question, shared by families 2 and 3.

The ids are those of `get_inputs` in the model cards of bge-reranker-v2-gemma and bge-reranker-v2-minicpm-layerwise: parts are
tokenised apart and joined as ids, never as text. Knows nothing of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .sequences import PairError, TokenSequence, cut, longest_pair, longest_query
from .tokenizer import first_tokens, load_tokenizer
from .windows import split_text
from .words import Words

if TYPE_CHECKING:
    from ..settings import RerankSettings
    from .checkpoint import Checkpoint

PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query "
    "by providing a prediction of either 'Yes' or 'No'."
)
SEPARATOR = "\n"
QUERY_INSTRUCTION = "A: "
PASSAGE_INSTRUCTION = "B: "
ANSWER = "Yes"

_groups = itertools.count(1)


class Prompt:
    """Builds the token ids of requests.

    Args:
        checkpoint: Where the tokenizer is.
        settings: With the user's prompt, instructions and lengths; what is None is as in the model card.
        positions: Number of positions that the checkpoint has, for query, passage, separator and prompt.
        tokenizer: The checkpoint's, if it is there already.

    Attributes:
        max_length: Longest query and passage in tokens, first token and the separator between them included.
        extra_tokens: Number of tokens that come on top: separator and prompt.
        answer_id: Id of the first token of "Yes".

    Raises:
        ValueError: A `max_length` beyond the positions, or one that leaves no room; a query longer than the pair; tokens that the
            weights do not know.
    """

    def __init__(self, checkpoint: Checkpoint, settings: RerankSettings, positions: int, tokenizer: Any = None) -> None:
        tokenizer = load_tokenizer(checkpoint) if tokenizer is None else tokenizer
        self._words = Words(tokenizer.backend_tokenizer, checkpoint.config.get("vocab_size"), checkpoint.model)
        self._side: str = tokenizer.truncation_side
        self._separator, prompt, answer = self._words.ids([SEPARATOR, _or_default(settings.prompt, PROMPT), ANSWER])
        self._tail = [*self._separator, *prompt]
        self.answer_id = answer[0]
        self.extra_tokens = len(self._tail)
        room = positions - self.extra_tokens
        self.max_length = max_length = longest_pair(settings.max_length, room, checkpoint.model, self.extra_tokens)
        if max_length < 5:
            raise ValueError(f"max_length={max_length}: no room for a query and a passage, take at least 5")
        self._query_instruction = _or_default(settings.query_instruction, QUERY_INSTRUCTION)
        self._passage_instruction = _or_default(settings.passage_instruction, PASSAGE_INSTRUCTION)
        # Never the whole length: the first token and one of the passage stay.
        self._query_room = longest_query(settings.query_max_length, max_length, max_length - 2)
        self._bos = first_tokens(checkpoint, tokenizer)
        self._words.known([*self._bos, *self._tail, self.answer_id])

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """Ids of the query with each passage. The query and what stands before it are a prefix that all share."""
        query_ids, *passage_ids = self._words.ids(
            [self._query_instruction + query, *(self._passage_instruction + passage for passage in passages)]
        )
        head = [*self._bos, *self._cut_query(query_ids)]
        room = self.max_length - len(head)
        # The separator is cut with the passage: on the left it goes first, for long passages.
        prefix = len(head) + (min(room, len(self._separator)) if self._side == "right" else 0)
        pairs = [
            self._words.known([*head, *cut([*self._separator, *ids], room, self._side), *self._tail], index)
            for index, ids in enumerate(passage_ids)
        ]
        if [] in pairs:
            raise PairError(
                pairs.index([]), "query, passage and prompt have no token, and nothing to read a score from"
            )
        prefix = min([prefix, *(len(ids) - 1 for ids in pairs)])  # the last token is each pair's own
        group = next(_groups)
        return [
            TokenSequence(pair, prefix=prefix, group=group, truncated=len(self._separator) + len(ids) > room)
            for pair, ids in zip(pairs, passage_ids, strict=True)
        ]

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next; the passage itself if it fits."""
        head = len(self._bos) + len(self._cut_query(self._words.ids([self._query_instruction + query])[0]))
        room = self.max_length - head - len(self._separator)
        return split_text(self._words.tokenizer, passage, room, self._passage_instruction)

    def _cut_query(self, ids: list[int]) -> list[int]:
        return cut(ids, self._query_room, self._side)


def _or_default(text: str | None, default: str) -> str:
    return default if text is None else text

"""Texts as token ids. Knows nothing of prompts, templates or torch."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from .sequences import PairError


class Words:
    """A checkpoint's tokenizer, and which of its tokens the weights know.

    A token may have been added to a tokenizer alone. A pair that holds it cannot be scored; to look it up fails the whole pack
    on a CPU, and ends the process's use of a CUDA device, so it is looked for before others' pairs are beside it.

    Args:
        tokenizer: The tokenizer, its truncation and padding switched off.
        size: Number of tokens that the weights know, `vocab_size` of config.json; None where it says nothing.
        model: The checkpoint's name, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, size: int | None, model: str) -> None:
        self.tokenizer = tokenizer
        self._size = size
        self._model = model

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def known(self, ids: list[int], pair: int | None = None) -> list[int]:
        """These ids, once it is seen that the weights know them all.

        Args:
            ids: The ids.
            pair: The place among several of the pair whose ids they are; None if they are of every pair.

        Raises:
            ValueError: They do not; as `PairError` where it is one pair's.
        """
        highest = max(ids, default=0)
        if self._size is not None and highest >= self._size:
            why = (
                f"{self.tokenizer.id_to_token(highest)!r} cannot be scored: it is token {highest} of the tokenizer of "
                f"{self._model!r}, whose weights have {self._size} (vocab_size in config.json)"
            )
            raise ValueError(why) if pair is None else PairError(pair, why)
        return ids

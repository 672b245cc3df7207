"""Texts as token ids. Knows nothing of pairs, prompts, templates or torch."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer


class Words:
    """A checkpoint's tokenizer, and which of its tokens the weights know.

    A token may have been added to a tokenizer alone. A text that holds it cannot be scored; to look it up fails the whole pack
    on a CPU, and ends the process's use of a CUDA device, so it is found here, before others' texts are beside it.

    Args:
        tokenizer: The tokenizer, its truncation and padding switched off.
        size: Number of tokens that the weights know, `vocab_size` of config.json; None where it says nothing.
        model: The checkpoint's name, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, size: int | None, model: str) -> None:
        self.tokenizer = tokenizer
        self._size = size
        self._model = model
        highest = max([tokenizer.get_vocab_size(with_added_tokens=True) - 1, *tokenizer.get_added_tokens_decoder()])
        self._may_be_unknown = size is not None and highest >= size

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        Raises:
            ValueError: A token that the weights do not know.
        """
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if self._may_be_unknown:
            for each in ids:
                self.check(each)
        return ids

    def check(self, ids: Iterable[int]) -> None:
        """Raises ValueError for a token that the weights do not know."""
        for token in ids:
            if self._size is not None and token >= self._size:
                raise ValueError(
                    f"{self.tokenizer.id_to_token(token)!r} cannot be scored: it is token {token} of the tokenizer of "
                    f"{self._model!r}, whose weights have {self._size} (vocab_size in config.json)"
                )

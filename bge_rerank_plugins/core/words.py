"""Texts as token ids. Knows nothing of prompts, templates or torch."""

from collections.abc import Mapping, Sequence
from typing import Any

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


def check_agreement(model: str, said: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer_config.json that contradicts tokenizer.json: each is believed by somebody.

    Args:
        model: The checkpoint's name, for the message.
        said: What tokenizer_config.json says.
        tokenizer: What tokenizer.json makes.
    """
    for option, part, name in (
        ("do_lower_case", tokenizer.normalizer, "lowercase"),
        ("strip_accents", tokenizer.normalizer, "strip_accents"),
        ("tokenize_chinese_chars", tokenizer.normalizer, "handle_chinese_chars"),
        ("add_prefix_space", tokenizer.pre_tokenizer, "add_prefix_space"),
    ):
        if option not in said or not hasattr(part, name):
            continue
        means, does = said[option], getattr(part, name)
        if name == "strip_accents":  # they go with upper case where nothing is said
            means, does = (part.lowercase if value is None else value for value in (means, does))
        if means != does:
            raise ValueError(
                f"model={model!r}: {option}={said[option]} in tokenizer_config.json, and {getattr(part, name)} in tokenizer.json"
            )

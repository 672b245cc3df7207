"""The model cards' procedures in plain code: one pair at a time, unpadded, float32, nothing shared with the package."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast


class EncoderReference:
    """A cross-encoder as its model card runs it: the tokenizer cuts and joins the pair, the model gives one logit."""

    def __init__(self, directory: str, max_length: int) -> None:
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory)
        self.model = AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager").eval()
        self.max_length = max_length

    def ids(self, query: str, passage: str) -> tuple[list[int], list[int]]:
        """Token ids and segments of a pair. The query is cut first, to 3/4 of the length, then the passage."""
        template = self.tokenizer.num_special_tokens_to_add(pair=True)
        query_room = min(self.max_length * 3 // 4, self.max_length - template)
        query_ids = self.tokenizer(query, add_special_tokens=False)["input_ids"][:query_room]
        passage_ids = self.tokenizer(passage, add_special_tokens=False)["input_ids"]
        passage_ids = passage_ids[: self.max_length - template - len(query_ids)]
        two_segments = type(self.model).__name__.startswith("Bert")
        if two_segments:
            ids = [0, *query_ids, 2, *passage_ids, 2]
            return ids, [0] * (len(query_ids) + 2) + [1] * (len(passage_ids) + 1)
        return [0, *query_ids, 2, 2, *passage_ids, 2], [0] * (len(query_ids) + len(passage_ids) + 4)

    def score(self, query: str, passage: str) -> float:
        ids, types = self.ids(query, passage)
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        return float(logits)

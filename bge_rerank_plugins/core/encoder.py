"""Family 1: cross-encoders, sequence classifiers with one label (bge-reranker-base, -large, -v2-m3 and their kind).

The pair goes through the tokenizer's own template; the score is the single logit of the classification head at the first token.
Architectures differ in the layout of a pair, which `pairs` knows, and in BERT's pooler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from .attention import attend_from_first_rows
from .inplace import work_in_place
from .int8 import round_linear_layers
from .linear import in_few_sizes, pack_linear_layers
from .packing import Pack
from .pairs import PairEncoder, PairLayout, layout_as_said, layout_of
from .sequences import TokenSequence, longest_pair
from .tokenizer import load_tokenizer
from .weights import load_model
from .words import Words

if TYPE_CHECKING:
    from ..settings import RerankSettings
    from .checkpoint import Checkpoint


class Encoder:
    """A cross-encoder. See `families.Family` for what its methods mean."""

    name: ClassVar[str] = "encoder"
    architectures: ClassVar[tuple[str, ...]] = (
        "XLMRobertaForSequenceClassification",
        "RobertaForSequenceClassification",
        "BertForSequenceClassification",
    )
    float16_is_safe: ClassVar[bool] = True
    layers: ClassVar[range | None] = None

    def __init__(self, model: PreTrainedModel, pairs: PairEncoder, max_length: int, first_position: int) -> None:
        self.max_length = max_length
        self._pairs = pairs
        backbone: Any = model.base_model
        layers = backbone.encoder.layer
        self._last_layer = layers[-1]  # computes few rows, and its weights as they are
        backbone.encoder.layer = layers[:-1]
        pack_linear_layers(backbone.encoder)
        work_in_place(backbone.encoder)
        self._backbone = backbone
        self._head = _head_of(model).float()  # scores are float32 from the head on
        self._first_position = first_position

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, settings: RerankSettings, device: torch.device, dtype: torch.dtype
    ) -> Encoder:
        """The cross-encoder with its weights on `device`.

        Raises:
            ValueError: An option that cross-encoders do not have, a `max_length` beyond the positions, more than one label,
                a head that is not in the files.
        """
        config, layout, max_length = checked_config(checkpoint, settings)
        pairs = _pairs_of(checkpoint, settings, config, layout, max_length)
        model: Any = load_model(checkpoint, AutoModelForSequenceClassification, config, dtype, device)
        if dtype == torch.int8:
            round_linear_layers(model.base_model.encoder.layer[:-1])
        return cls(model, pairs, max_length, layout.first_position(config.pad_token_id, checkpoint.model))

    @classmethod
    def describe(cls, checkpoint: Checkpoint, settings: RerankSettings) -> dict[str, str]:
        """Facts from the config, by name, without loading any weights.

        Raises:
            ValueError: As `load`, but for what only the weights can tell.
        """
        config, _, max_length = checked_config(checkpoint, settings)
        return {
            "layers": str(config.num_hidden_layers),
            "hidden size": str(config.hidden_size),
            "vocabulary": f"{config.vocab_size} tokens",
            "max_length": f"{max_length} tokens a pair",
        }

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """The query cut to `query_max_length` and the template's special tokens, then the passage cut to what is left."""
        return self._pairs.encode(query, passages)

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next; the passage itself if it fits."""
        return self._pairs.windows(query, passage)

    def forward(self, pack: Pack, cutoff_layers: Sequence[int] = ()) -> Tensor:
        """Logits of the pack's sequences. Shape (sequences,), float32."""
        types = torch.zeros_like(pack.input_ids) if pack.token_type_ids is None else pack.token_type_ids
        hidden: Tensor = self._backbone(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None] + self._first_position,
            token_type_ids=types[None],
            pack=pack,
        ).last_hidden_state
        rows = _first_rows_after(self._last_layer, hidden[0], pack)
        logits: Tensor = self._head(rows[:, None].float())
        return logits.view(-1)


CLASSIFIER_OF = {
    name.replace("ForSequenceClassification", ending): name
    for name in Encoder.architectures
    for ending in ("Model", "ForMaskedLM")
}
"""Architectures without a scoring head, and those that they become with one."""


def _head_of(model: Any) -> nn.Sequential:
    """Takes the modules that make logits of the first tokens' states, shape (sequences, 1, hidden), out of a model.

    BERT's pooler is one of them, and part of the backbone, which would run it on the first token of the pack alone.
    """
    pooler, model.base_model.pooler = model.base_model.pooler, None
    return nn.Sequential(*([] if pooler is None else [pooler]), model.classifier)


def _first_rows_after(layer: Any, hidden: Tensor, pack: Pack) -> Tensor:
    """The last layer, for the first token of each sequence only: nothing else is read after it.

    Args:
        layer: The layer, of BERT's build.
        hidden: States before it, shape (tokens, hidden).
        pack: The pack that the tokens came from.

    Returns:
        Shape (sequences, hidden).
    """
    rows = hidden[in_few_sizes(pack.first_rows, hidden)]
    context_of = _context_by_sequence if by_sequence(hidden) else _context_at_once
    context = context_of(layer.attention.self, hidden, rows, pack)
    attended = layer.attention.output(context, rows)
    states: Tensor = layer.feed_forward_chunk(attended)
    return states[: len(pack.first_rows)]


def by_sequence(hidden: Tensor) -> bool:
    """Whether a small product for each sequence costs little more than its arithmetic: on a CPU."""
    return hidden.device.type == "cpu"


def _context_at_once(attention: Any, hidden: Tensor, rows: Tensor, pack: Pack) -> Tensor:
    """Attention of `rows`, over the keys and values of all `hidden`. Shape of `rows`."""

    def heads(states: Tensor) -> Tensor:
        return states.view(len(states), attention.num_attention_heads, attention.attention_head_size)

    query, key, value = heads(attention.query(rows)), heads(attention.key(hidden)), heads(attention.value(hidden))
    return attend_from_first_rows(query, key, value, pack, attention.scaling).flatten(1)


def _context_by_sequence(attention: Any, hidden: Tensor, rows: Tensor, pack: Pack) -> Tensor:
    """The same without keys and values: their weights go to the few rows that ask instead of to all that are asked.

    A query's product with a key, q (W x + b), is (q W) x and a number that is the same for all keys of the query, which
    softmax does not see. The mean of the values, weighted to a sum of 1, is the value of the mean. In float32, of any states.
    """
    heads, width = attention.num_attention_heads, attention.attention_head_size
    key_weight, value_weight = (
        layer.weight.float().view(heads, width, -1) for layer in (attention.key, attention.value)
    )
    query = (attention.query(rows).float() * attention.scaling).view(-1, heads, width)
    asking = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)  # (sequences, heads, hidden)
    means = torch.zeros_like(asking)
    for segment, ask, mean in zip(pack.segments, asking, means, strict=False):  # rows may be more, to be of few sizes
        asked = hidden[segment.start : segment.stop].float()
        torch.mm(softmax(ask @ asked.T, dim=-1), asked, out=mean)
    values = torch.bmm(means.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1)
    context: Tensor = values.flatten(1) + attention.value.bias.float()
    return context.to(rows.dtype)


def checked_config(checkpoint: Checkpoint, settings: RerankSettings) -> tuple[PreTrainedConfig, PairLayout, int]:
    """The config, the layout of its pairs and the longest of them, of a checkpoint that these settings fit.

    Raises:
        ValueError: They do not, or the checkpoint is no cross-encoder that can be run here.
    """
    for option in ("prompt", "cutoff_layer"):
        if getattr(settings, option) is not None:
            raise ValueError(
                f"{option}={getattr(settings, option)!r}: {checkpoint.model!r} is a cross-encoder, which has none"
            )
    config = checkpoint.transformers_config()
    if checkpoint.adapter_config is not None and "id2label" not in checkpoint.config:
        config.num_labels = 1  # a head that comes with the adapter; a bare encoder's config has no say in it
    if config.num_labels != 1:
        raise ValueError(
            f"model={checkpoint.model!r}: it classifies into {config.num_labels} labels, a reranker has one"
        )
    if getattr(config, "is_decoder", False):
        raise ValueError(
            f"model={checkpoint.model!r}: is_decoder=True is not supported: a cross-encoder reads both ways"
        )
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(
            f"model={checkpoint.model!r}: position_embedding_type={kind!r} is not supported, only 'absolute'"
        )
    layout = layout_of(config.model_type, checkpoint.model, config.type_vocab_size)
    positions = config.max_position_embeddings - layout.first_position(config.pad_token_id, checkpoint.model)
    return config, layout, longest_pair(settings.max_length, positions, checkpoint.model)


def pair_encoder(checkpoint: Checkpoint, settings: RerankSettings) -> PairEncoder:
    """What makes token ids of a checkpoint's pairs, without its weights.

    Raises:
        ValueError: As `checked_config`, or a `max_length` that leaves no room for text.
    """
    return _pairs_of(checkpoint, settings, *checked_config(checkpoint, settings))


def _pairs_of(
    checkpoint: Checkpoint, settings: RerankSettings, config: PreTrainedConfig, layout: PairLayout, max_length: int
) -> PairEncoder:
    tokenizer = load_tokenizer(checkpoint)
    layout = layout_as_said(layout, checkpoint.tokenizer_config)
    padding = int(config.pad_token_id or 0)
    words = Words(tokenizer.backend_tokenizer, config.vocab_size, checkpoint.model)
    return PairEncoder(words, layout, padding, settings, max_length, tokenizer.truncation_side)

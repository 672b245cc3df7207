"""Family 1: cross-encoders, sequence classifiers with one label (bge-reranker-base, -large, -v2-m3 and their kind).

The pair goes through the tokenizer's own template; the score is the single logit of the classification head at the first
token. Differences between architectures are a row each in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.activations import GELUActivation

from .attention import attend_from_first_rows
from .linear import pack_linear_layers
from .packing import Pack, TokenSequence
from .windows import split_text

if TYPE_CHECKING:
    from ..settings import RerankSettings
    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Architecture:
    """What is particular to one architecture.

    Attributes:
        first_position: Position id of a sequence's first token.
        skips_padding: Whether a padding token that stands in the text (as "<pad>") does not count as a position.
        token_types: Whether the model tells query from passage by segment.
        head: Takes the modules that make logits of the first tokens' hidden states, shape (sequences, 1, hidden), out of a
            model, in the order in which they are applied.
    """

    first_position: Callable[[PreTrainedConfig], int]
    skips_padding: bool
    token_types: bool
    head: Callable[[Any], nn.Sequential]


def _after_padding_index(config: PreTrainedConfig) -> int:
    """RoBERTa counts positions from the one after its padding index; from zero they are silently wrong."""
    return int(config.pad_token_id) + 1


def _pooler_and_classifier(model: Any) -> nn.Sequential:
    """BERT's pooler is part of its backbone, which would run it on the first token of the pack alone."""
    pooler, model.bert.pooler = model.bert.pooler, None
    return nn.Sequential(pooler, model.classifier)


_ROBERTA = Architecture(_after_padding_index, True, False, lambda model: nn.Sequential(model.classifier))
_BERT = Architecture(lambda config: 0, False, True, _pooler_and_classifier)

ARCHITECTURES = {
    "XLMRobertaForSequenceClassification": _ROBERTA,
    "RobertaForSequenceClassification": _ROBERTA,
    "BertForSequenceClassification": _BERT,
}


@dataclass(frozen=True)
class PairTemplate:
    """Special tokens around a query and a passage, and the segments, as the tokenizer's own template has them."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    type_ids: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> PairTemplate:
        """Read off the tokenizer's post-processor, by sending one pair through it."""
        query, passage = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b"))
        pair = tokenizer.encode("a", "b")
        sides = pair.sequence_ids  # 0: query, 1: passage, None: special token
        q, p = sides.index(0), sides.index(1)
        q_end, p_end = q + len(query.ids), p + len(passage.ids)
        if not q < q_end <= p < p_end or pair.ids[q:q_end] != query.ids or pair.ids[p:p_end] != passage.ids:
            raise ValueError("the tokenizer's template does not put the query before the passage, whole")
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


class PairIds:
    """Builds the token ids of requests, as `prompt.Prompt` does for the LLM rerankers.

    Args:
        tokenizer: The checkpoint's.
        settings: With the user's instructions and lengths.
        max_length: Longest pair in tokens.
        skipped: Id of a token that does not count as a position, or None.
        token_types: Whether the model tells query from passage by segment.

    Raises:
        ValueError: A `max_length` that leaves no room.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: RerankSettings, max_length: int, skipped: int | None, token_types: bool
    ) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._token_types = token_types
        self._template = PairTemplate.of(tokenizer)
        self._query_instruction = settings.query_instruction or ""
        self._passage_instruction = settings.passage_instruction or ""
        self._room = max_length - len(self._template)
        if self._room < 1:
            raise ValueError(
                f"max_length={max_length}: no room for text beside the {len(self._template)} special tokens of a pair"
            )
        self._query_room = min(settings.query_max_length or max_length * 3 // 4, self._room)

    @classmethod
    def of(cls, checkpoint: Checkpoint, settings: RerankSettings) -> PairIds:
        """The ids of a checkpoint's pairs.

        Raises:
            ValueError: An option that cross-encoders do not have, a `max_length` beyond the positions or without room, more
                than one label.
        """
        config, architecture, max_length = _checked(checkpoint, settings)
        skipped = config.pad_token_id if architecture.skips_padding else None
        return cls(checkpoint.tokenizer().backend_tokenizer, settings, max_length, skipped, architecture.token_types)

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """The query cut to `query_max_length` and the template's special tokens, then the passage cut to what is left."""
        query_ids = self._ids([self._query_instruction + query])[0][: self._query_room]
        room = self._room - len(query_ids)
        passage_ids = self._ids([self._passage_instruction + passage for passage in passages])
        return [self._sequence(query_ids, ids, room) for ids in passage_ids]

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next; the passage itself if it fits."""
        room = self._room - len(self._ids([self._query_instruction + query])[0][: self._query_room])
        return split_text(self._tokenizer, passage, room, self._passage_instruction)

    def _sequence(self, query_ids: list[int], passage_ids: list[int], room: int) -> TokenSequence:
        truncated = len(passage_ids) > room
        passage_ids = passage_ids[:room]
        input_ids = self._template.join(query_ids, passage_ids)
        return TokenSequence(
            input_ids=input_ids,
            token_type_ids=self._template.join_types(query_ids, passage_ids) if self._token_types else None,
            position_ids=_positions_without(self._skipped, input_ids) if self._skipped in input_ids else None,
            truncated=truncated,
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


class Encoder:
    """A cross-encoder. See `families.Family` for what its methods mean."""

    name: ClassVar[str] = "encoder"
    architectures: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)
    float16_is_safe: ClassVar[bool] = True
    layers: ClassVar[range | None] = None

    def __init__(self, model: PreTrainedModel, pairs: PairIds, architecture: Architecture) -> None:
        self.max_length = pairs.max_length
        self._pairs = pairs
        backbone: Any = model.base_model
        pack_linear_layers(backbone.encoder)
        layers = backbone.encoder.layer
        for layer in layers:
            if isinstance(layer.intermediate.intermediate_act_fn, GELUActivation):
                layer.intermediate.intermediate_act_fn = _GELUInPlace()
        self._last_layer = layers[-1]
        backbone.encoder.layer = layers[:-1]
        self._backbone = backbone
        self._head = architecture.head(model).float()  # scores are float32 from the head on
        self._first_position = architecture.first_position(model.config)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, settings: RerankSettings, device: torch.device, dtype: torch.dtype
    ) -> Encoder:
        """The cross-encoder with its weights on `device`.

        Raises:
            ValueError: An option that cross-encoders do not have, a `max_length` beyond the positions, more than one label,
                a head that is not in the files.
        """
        config, architecture, _ = _checked(checkpoint, settings)
        pairs = PairIds.of(checkpoint, settings)
        return cls(checkpoint.load(AutoModelForSequenceClassification, config, dtype, device), pairs, architecture)

    @classmethod
    def describe(cls, checkpoint: Checkpoint, settings: RerankSettings) -> dict[str, str]:
        """Facts from the config, by name, without loading any weights.

        Raises:
            ValueError: As `load`, but for what only the weights can tell.
        """
        config, _, max_length = _checked(checkpoint, settings)
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


class _GELUInPlace(nn.Module):
    """GELU over its input: a new tensor of that width would cost as much to allocate as the function to compute."""

    def forward(self, states: Tensor) -> Tensor:
        activated: Tensor = torch.ops.aten.gelu_(states)
        return activated


def _first_rows_after(layer: Any, hidden: Tensor, pack: Pack) -> Tensor:
    """The last layer, for the first token of each sequence only: nothing else is read after it.

    Args:
        layer: The layer, of BERT's build.
        hidden: States before it, shape (tokens, hidden).
        pack: The pack that the tokens came from.

    Returns:
        Shape (sequences, hidden).
    """
    attention = layer.attention.self
    rows = hidden[pack.first_rows]

    def heads(states: Tensor) -> Tensor:
        return states.view(len(states), attention.num_attention_heads, attention.attention_head_size)

    context = attend_from_first_rows(
        heads(attention.query(rows)),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        pack,
        attention.scaling,
    )
    attended = layer.attention.output(context.flatten(1), rows)
    states: Tensor = layer.output(layer.intermediate(attended), attended)
    return states


def _checked(checkpoint: Checkpoint, settings: RerankSettings) -> tuple[PreTrainedConfig, Architecture, int]:
    """The config, its row of `ARCHITECTURES` and the longest pair, of a checkpoint that these settings fit."""
    for option in ("prompt", "cutoff_layer"):
        if getattr(settings, option) is not None:
            raise ValueError(
                f"{option}={getattr(settings, option)!r}: {checkpoint.model!r} is a cross-encoder, which has none"
            )
    config = AutoConfig.for_model(**checkpoint.config)
    if checkpoint.adapter_config is not None and "id2label" not in checkpoint.config:
        config.num_labels = 1  # a head that comes with the adapter; a bare encoder's config has no say in it
    if config.num_labels != 1:
        raise ValueError(
            f"model={checkpoint.model!r}: it classifies into {config.num_labels} labels, a reranker has one"
        )
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(
            f"model={checkpoint.model!r}: position_embedding_type={kind!r} is not supported, only 'absolute'"
        )
    architecture = _architecture_of(config, checkpoint)
    first_position = architecture.first_position(config)
    max_length = checkpoint.max_length(settings.max_length, config.max_position_embeddings - first_position)
    return config, architecture, max_length


def _architecture_of(config: PreTrainedConfig, checkpoint: Checkpoint) -> Architecture:
    classes: Any = AutoModelForSequenceClassification._model_mapping
    model_class: str = classes[type(config)].__name__
    if model_class not in ARCHITECTURES:
        raise ValueError(f"model={checkpoint.model!r}: {model_class} is not supported, only {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_class]


def _positions_without(skipped: int | None, input_ids: list[int]) -> list[int]:
    """Zero-based positions where `skipped` ids do not count and stand themselves one before the first."""
    counted = accumulate(token != skipped for token in input_ids)
    return [-1 if token == skipped else count - 1 for token, count in zip(input_ids, counted, strict=True)]

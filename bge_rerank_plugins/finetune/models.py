"""The three families in training: how each is loaded, scores padded pairs, and differs in what is saved.

Knows nothing of groups, losses or Trainer; what they share is in `trainee`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ..core.decoder import Decoder, softcap_of
from ..core.encoder import Encoder, pair_encoder
from ..core.families import family_of
from ..core.layerwise import Layerwise, LayerwiseModel, check_layers, granite_config, hidden_scale, layers_of
from ..core.pairs import layout_of
from ..core.prompt import Prompt
from ..core.weights import load_model
from .checkpoints import checkpoint_of, rerank_settings
from .settings import FinetuneSettings
from .trainee import Encode, Padded, Trainee

ATTENTION = "sdpa"


class EncoderTrainee(Trainee):
    """A cross-encoder in training."""

    lora_by_default = False
    lora_targets = ("query", "key", "value", "dense")
    lora_task = "SEQ_CLS"  # which trains and saves the classifier whole
    has_prompt = False

    def _load(self, dtype: torch.dtype) -> Any:
        if self.settings.prompt is not None:
            raise ValueError(
                f"prompt={self.settings.prompt!r}: {self.settings.model!r} is a cross-encoder, which has none"
            )
        config = self.checkpoint.transformers_config()
        layout = layout_of(config.model_type, self.checkpoint.model)
        if self.checkpoint.is_base_model:
            self.trained_whole = ("pooler",)  # BERT's; where it is new, it is in no file but the adapter's
        self._first_position = layout.first_position(config.pad_token_id, self.checkpoint.model)
        return load_model(
            self.checkpoint,
            AutoModelForSequenceClassification,
            config,
            dtype,
            torch.device("cpu"),
            attention=ATTENTION,
            may_lack=("classifier.", "bert.pooler.") if self.checkpoint.is_base_model else (),
        )

    def encoder(self) -> Callable[[str | None], Encode]:
        """What makes token ids of a query and its passages; a cross-encoder has no prompt."""
        encode = pair_encoder(self.checkpoint, rerank_settings(self.settings)).encode
        return lambda prompt: encode

    def _scores(self, pairs: Padded) -> Tensor:
        """The logit of each pair. Shape (pairs, 1)."""
        logits: Tensor = self.inner(
            input_ids=pairs.input_ids,
            attention_mask=pairs.attention_mask,
            position_ids=pairs.position_ids + self._first_position,
            token_type_ids=torch.zeros_like(pairs.input_ids) if pairs.token_type_ids is None else pairs.token_type_ids,
        ).logits
        return logits.float()


class DecoderTrainee(Trainee):
    """A causal language model in training: one row of its head, at the last position."""

    def _load(self, dtype: torch.dtype) -> Any:
        config = self.checkpoint.transformers_config()
        prompt = Prompt(self.checkpoint, rerank_settings(self.settings), config.max_position_embeddings)
        self._answer = prompt.answer_id
        self._softcap = softcap_of(config)
        # transformers has no SDPA with the soft caps of Gemma 2's attention.
        attention = "eager" if config.model_type == "gemma2" else ATTENTION
        return load_model(
            self.checkpoint, AutoModelForCausalLM, config, dtype, torch.device("cpu"), attention=attention
        )

    def _scores(self, pairs: Padded) -> Tensor:
        """The logit of "Yes" of each pair. Shape (pairs, 1)."""
        hidden = self.inner.base_model(
            input_ids=pairs.input_ids,
            attention_mask=pairs.attention_mask,
            position_ids=pairs.position_ids,
            use_cache=False,
        ).last_hidden_state
        scores = _times_row(_rows(hidden, pairs.last_rows), self.inner.get_output_embeddings().weight[self._answer])
        return scores if self._softcap is None else self._softcap * torch.tanh(scores / self._softcap)


class LayerwiseTrainee(Trainee):
    """A layerwise reranker in training: every head from `start_layer` at once."""

    lora_task = None
    trained_whole: tuple[str, ...] = ("linear_head",)

    def _heads(self) -> tuple[str, ...]:
        layers = layers_of(self.checkpoint)
        first = layers[0] if self.settings.start_layer is None else self.settings.start_layer
        check_layers([first], layers, "start_layer")
        self.layers = range(first, layers.stop)
        return tuple(f"layer {layer}" for layer in self.layers)

    def _load(self, dtype: torch.dtype) -> Any:
        published = self.checkpoint.config
        self._answer = Prompt(self.checkpoint, rerank_settings(self.settings), self._positions()).answer_id
        self._hidden_scale = hidden_scale(published)
        if published["head_type"] != "simple":
            self.trained_whole = ()
        return load_model(
            self.checkpoint,
            LayerwiseModel,
            granite_config(published, published["num_hidden_layers"]),
            dtype,
            torch.device("cpu"),
            attention=ATTENTION,
            may_lack=("lm_head.",) if self.checkpoint.is_base_model else (),
        )

    def _scores(self, pairs: Padded) -> Tensor:
        """The score of each pair after each layer. Shape (pairs, layers)."""
        backbone = self.inner.model
        output = backbone(
            input_ids=pairs.input_ids,
            attention_mask=pairs.attention_mask,
            position_ids=pairs.position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        scores = []
        for layer in self.layers:
            last = layer == self.layers[-1]  # the last of transformers' hidden states is normed already
            rows = _rows(output.last_hidden_state if last else output.hidden_states[layer], pairs.last_rows)
            normed = rows if last else backbone.norm(rows)
            scores.append(_times_row(normed, self.inner.head_row(layer, self._answer) * self._hidden_scale))
        return torch.cat(scores, dim=1)

    @property
    def must_merge(self) -> bool:
        """An adapter alone would need a base model that has heads."""
        return super().must_merge or self.checkpoint.is_base_model

    def _freeze_unused(self) -> None:
        first_head = layers_of(self.checkpoint)[0]
        heads = self.inner.lm_head if self.checkpoint.config["head_multi"] else ()
        for layer, head in enumerate(heads, first_head):
            if layer < self.layers[0]:
                head.requires_grad_(False)

    def _save_model(self, folder: Path) -> None:
        super()._save_model(folder)
        published = {
            name: value for name, value in self.checkpoint.config.items() if name not in ("dtype", "torch_dtype")
        }
        config = published | {"torch_dtype": str(self.inner.dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for home in {str(path).partition(".")[0] for path in published.get("auto_map", {}).values()}:
            self._copy(f"{home}.py", folder)


TRAINEES: dict[str, type[Trainee]] = {
    Encoder.name: EncoderTrainee,
    Decoder.name: DecoderTrainee,
    Layerwise.name: LayerwiseTrainee,
}


def trainee_of(settings: FinetuneSettings) -> Trainee:
    """The network that the settings name, ready to be trained.

    Raises:
        ValueError: Not a model that can be trained, options that do not fit it, weights that are missing.
    """
    checkpoint = checkpoint_of(settings)
    return TRAINEES[family_of(checkpoint).name](checkpoint, settings)


def _rows(hidden: Tensor, last_rows: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), last_rows]


def _times_row(hidden: Tensor, row: Tensor) -> Tensor:
    """Hidden states times one row of a head, float32 whatever the precision around it. Shape (pairs, 1)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.float() @ row.float())[:, None]

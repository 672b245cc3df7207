"""The networks that are trained, one class for each family: batches of token ids to scores, and files to load and to save.

The token ids are those that `Scorer` uses, and so are the model classes; batches are padded, and the attention is transformers'
own. Knows nothing of groups, losses or Trainer.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ..core.checkpoint import alone_and_quiet
from ..core.decoder import Decoder
from ..core.encoder import Encoder, pair_encoder
from ..core.families import family_of
from ..core.layerwise import Layerwise, LayerwiseModel, check_layers, granite_config, hidden_scale, layers_of
from ..core.pairs import layout_of
from ..core.prompt import Prompt
from ..core.sequences import TokenSequence
from .checkpoints import TrainingCheckpoint, checkpoint_of, rerank_settings
from .settings import FinetuneSettings

ATTENTION = "sdpa"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

Encode = Callable[[str, Sequence[str]], list[TokenSequence]]


class _Padded(NamedTuple):
    """The arguments of `Trainee.forward`."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    last_rows: Tensor
    token_type_ids: Tensor | None


class Trainee(nn.Module, ABC):
    """A network in training.

    Args:
        checkpoint: Where it comes from.
        settings: How it is trained.

    Attributes:
        network: The transformers model, or the PEFT model around it.
        uses_lora: Whether only an adapter is trained, and the head if it is new or a layerwise model's.
        heads: What each score of a pair is called, the last one the model's own.
        has_prompt: Whether the family puts a question behind the passage.

    Raises:
        ValueError: A checkpoint that cannot be trained, or options that do not fit it.
    """

    lora_by_default: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_task: ClassVar[str | None] = "CAUSAL_LM"
    trained_whole: tuple[str, ...] = ()
    has_prompt: ClassVar[bool] = True

    def __init__(self, checkpoint: TrainingCheckpoint, settings: FinetuneSettings) -> None:
        super().__init__()
        checkpoint.refuse_longrope()
        self.checkpoint = checkpoint
        self.settings = settings
        self.heads = self._heads()
        self.uses_lora = self.lora_by_default if settings.lora is None else settings.lora
        if not self.uses_lora:
            _check_no_lora_options(settings)
        # What is frozen needs no more; what an adapter is merged into and saved does.
        half = settings.bf16 and self.uses_lora and not self.must_merge
        self.network: Any = self._load(torch.bfloat16 if half else torch.float32).requires_grad_(True)
        if settings.dropout is not None:
            _set_dropout(self.network, settings.dropout)
        if settings.gradient_checkpointing:
            recompute = "activation" if hasattr(self.network, "activation_checkpointing_enable") else "gradient"
            getattr(self.network, f"{recompute}_checkpointing_enable")({"use_reentrant": False})
        if self.uses_lora:
            self.network = self._with_adapter()
            for parameter in self.network.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # small steps would be lost in bfloat16
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Has what no score is made of stay as it is: several processes wait for the gradients of all the rest."""

    def _heads(self) -> tuple[str, ...]:
        for name in ("self_distillation", "start_layer"):
            if getattr(self.settings, name):
                raise ValueError(
                    f"{name}={getattr(self.settings, name)!r}: {self.settings.model!r} is no layerwise checkpoint"
                )
        return ("score",)

    @abstractmethod
    def _load(self, dtype: torch.dtype) -> Any:
        """The transformers model."""

    def encoder(self) -> Callable[[str | None], Encode]:
        """What makes token ids of a query and its passages, for each prompt."""

        @cache
        def encode_for(prompt: str | None) -> Encode:
            return Prompt(self.checkpoint, rerank_settings(self.settings, prompt), self._positions()).encode

        return lambda prompt: encode_for(prompt or self.settings.prompt)

    def _positions(self) -> int:
        return int(self.checkpoint.config["max_position_embeddings"])

    def _with_adapter(self) -> Any:
        from peft import LoraConfig, get_peft_model

        settings = self.settings
        targets = settings.target_modules or list(self.lora_targets)
        names = [name for name, _ in self.network.named_modules()]
        for target in [targets] if isinstance(targets, str) else targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ValueError(f"target_modules={targets!r}: {settings.model!r} has no layer {target!r}")
        config = LoraConfig(
            task_type=self.lora_task,
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=[targets] if isinstance(targets, str) else targets,
            modules_to_save=list(self.trained_whole) or None,
        )
        with alone_and_quiet(show_progress=False):
            return get_peft_model(self.network, config)

    @property
    def inner(self) -> Any:
        """The transformers model, whatever is around it."""
        return self.network.get_base_model() if self.uses_lora else self.network

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        last_rows: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Scores of padded pairs, float32.

        Args:
            input_ids: Shape (pairs, tokens).
            attention_mask: 0 where there is padding. Shape (pairs, tokens).
            position_ids: Zero-based positions. Shape (pairs, tokens).
            last_rows: Place of the last token of each pair. Shape (pairs,).
            token_type_ids: Segments, or None. Shape (pairs, tokens).

        Returns:
            Shape (pairs, heads).
        """
        return self._scores(_Padded(input_ids, attention_mask, position_ids, last_rows, token_type_ids))

    @abstractmethod
    def _scores(self, pairs: _Padded) -> Tensor:
        """The score of each pair at each head. Shape (pairs, heads)."""

    def save(self, folder: Path) -> None:
        """Writes the adapter, or the model in the family's published layout, with its tokenizer."""
        with alone_and_quiet(show_progress=False):
            if self.uses_lora:
                self.network.save_pretrained(folder)
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
            else:
                self._save_model(folder)

    def _save_model(self, folder: Path) -> None:
        self.inner.save_pretrained(folder)
        if self.checkpoint.file("tokenizer.json") is None:
            self.checkpoint.tokenizer().save_pretrained(folder)
        for name in _TOKENIZER_FILES:
            self._copy(name, folder)

    def _copy(self, name: str, folder: Path) -> None:
        found = self.checkpoint.file(name)
        if found is not None:
            shutil.copyfile(found, folder / name)

    def export(self, folder: Path) -> None:
        """Writes what the user gets when the training is over: as `save`, or the model with its adapter merged."""
        if self.uses_lora and self.must_merge:
            self.network = self.network.merge_and_unload()
            self.uses_lora = False
        self.save(folder)

    @property
    def must_merge(self) -> bool:
        """Whether the adapter is of no use without the merged model, or the user wants that.

        One that was trained on top of another (`peft_path`, or the embedded model's) would be loaded without that.
        """
        return self.settings.merge or self.checkpoint.peft_path is not None

    def restore(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        if self.uses_lora:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.network, load_peft_weights(str(folder), device="cpu"))
            return
        weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        missing, unexpected = self.inner.load_state_dict(weights, strict=False)
        tied = set(getattr(self.inner, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ValueError(f"{folder}: its weights are not those of {self.settings.model!r}")


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
        self._first_position = layout.first_position(config.pad_token_id)
        return self.checkpoint.load(
            AutoModelForSequenceClassification,
            config,
            dtype,
            torch.device("cpu"),
            attention=ATTENTION,
            may_lack=("classifier.", "bert.pooler.") if self.checkpoint.is_base_model else (),
        )

    @property
    def must_merge(self) -> bool:
        """A pooler that is new, as in BERT that was trained for masked words, is in no adapter."""
        masked = "BertForMaskedLM" in self.checkpoint.published_architectures
        return super().must_merge or masked

    def encoder(self) -> Callable[[str | None], Encode]:
        """What makes token ids of a query and its passages; a cross-encoder has no prompt."""
        encode = pair_encoder(self.checkpoint, rerank_settings(self.settings)).encode
        return lambda prompt: encode

    def _scores(self, pairs: _Padded) -> Tensor:
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
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        return self.checkpoint.load(AutoModelForCausalLM, config, dtype, torch.device("cpu"), attention=ATTENTION)

    def _scores(self, pairs: _Padded) -> Tensor:
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
        check_layers([first], layers)
        self.layers = range(first, layers.stop)
        return tuple(f"layer {layer}" for layer in self.layers)

    def _load(self, dtype: torch.dtype) -> Any:
        published = self.checkpoint.config
        self._answer = Prompt(self.checkpoint, rerank_settings(self.settings), self._positions()).answer_id
        self._hidden_scale = hidden_scale(published)
        if published["head_type"] != "simple":
            self.trained_whole = ()
        return self.checkpoint.load(
            LayerwiseModel,
            granite_config(published, published["num_hidden_layers"]),
            dtype,
            torch.device("cpu"),
            attention=ATTENTION,
            may_lack=("lm_head.",) if self.checkpoint.is_base_model else (),
        )

    def _scores(self, pairs: _Padded) -> Tensor:
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


def _check_no_lora_options(settings: FinetuneSettings) -> None:
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules"):
        if (value := getattr(settings, name)) != FinetuneSettings.model_fields[name].default:
            raise ValueError(f"{name}={value!r}: {settings.model!r} is trained whole; lora=True trains an adapter")


def _set_dropout(network: nn.Module, rate: float) -> None:
    """Sets the rate of all dropout in a transformers model; its config, which is saved, keeps the checkpoint's."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", rate)  # noqa: B010  # of a type that modules do not declare


def _rows(hidden: Tensor, last_rows: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), last_rows]


def _times_row(hidden: Tensor, row: Tensor) -> Tensor:
    """Hidden states times one row of a head, float32 whatever the precision around it. Shape (pairs, 1)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return (hidden.float() @ row.float())[:, None]

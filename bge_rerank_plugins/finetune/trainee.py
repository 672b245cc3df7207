"""A network in training, whatever its family: its adapter, its scores of padded batches, its files to save and to restore.

The token ids are those that `Scorer` uses, and so are the model classes; batches are padded, and the attention is transformers'
own. Knows nothing of groups, losses or Trainer.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.checkpoint import UNFIT
from ..core.prompt import Prompt
from ..core.sequences import TokenSequence
from ..core.tokenizer import load_tokenizer
from ..core.weights import alone_and_quiet, untie_words
from .checkpoints import TrainingCheckpoint, rerank_settings
from .settings import FinetuneSettings

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


class Padded(NamedTuple):
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
        checkpoint.check_causal()
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
        tokenizer = load_tokenizer(self.checkpoint)  # one, also where each line has a prompt of its own

        @cache
        def encode_for(prompt: str | None) -> Encode:
            settings = rerank_settings(self.settings, prompt)
            return Prompt(self.checkpoint, settings, self._positions(), tokenizer).encode

        return lambda prompt: encode_for(prompt or self.settings.prompt)

    def _positions(self) -> int:
        return int(self.checkpoint.config["max_position_embeddings"])

    def _with_adapter(self) -> Any:
        from peft import LoraConfig, get_peft_model

        settings = self.settings
        targets = settings.target_modules or list(self.lora_targets)
        names = [name for name, _ in self.network.named_modules()]
        for target in [targets] if isinstance(targets, str) else targets:
            layers = [name for name in names if f".{name}".endswith(f".{target}")]
            if not layers:
                raise ValueError(f"target_modules={targets!r}: {settings.model!r} has no layer {target!r}")
            if target not in self.trained_whole and any(name.startswith("lm_head") for name in layers):
                raise ValueError(
                    f"target_modules={targets!r}: {target!r} is the head, of which single rows are read, past any adapter; "
                    f"take others, such as {', '.join(self.lora_targets)}, or lora=False, which trains the head too"
                )
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
        return self._scores(Padded(input_ids, attention_mask, position_ids, last_rows, token_type_ids))

    @abstractmethod
    def _scores(self, pairs: Padded) -> Tensor:
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
            load_tokenizer(self.checkpoint).save_pretrained(folder)
        for name in _TOKENIZER_FILES:
            self._copy(name, folder)

    def _copy(self, name: str, folder: Path) -> None:
        found = self.checkpoint.file(name)
        if found is not None:
            shutil.copyfile(found, folder / name)

    def export(self, folder: Path) -> None:
        """Writes what the user gets when the training is over: as `save`, or the model with its adapter merged."""
        if self.uses_lora and self.must_merge:
            untie_words(self.inner, [name for name, weight in self.network.named_parameters() if weight.requires_grad])
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
        """Reads what `save` wrote.

        Raises:
            ValueError: It cannot be read, or is another model's.
        """
        try:
            if self.uses_lora:
                from peft import load_peft_weights, set_peft_model_state_dict

                set_peft_model_state_dict(self.network, load_peft_weights(str(folder), device="cpu"))
                return
            files = folder.glob("*.safetensors")
            weights = {name: tensor for path in files for name, tensor in load_file(path).items()}
            missing, unexpected = self.inner.load_state_dict(weights, strict=False)
        except UNFIT as error:
            raise ValueError(f"{folder}: its weights cannot be loaded: {error}") from error
        tied = set(getattr(self.inner, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ValueError(f"{folder}: its weights are not those of {self.settings.model!r}")


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

"""Family 2: causal language models that answer "Yes" (bge-reranker-v2-gemma, and others fine-tuned the FlagEmbedding way).

The score is the logit of the first token of "Yes" at the last position. Only that position and that row of the head are
computed, in float32, never tokens x vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from .inplace import work_in_place
from .int8 import round_linear_layers
from .last_layer import LastRows
from .linear import multiply_by_onednn
from .packing import Pack
from .prompt import Prompt
from .sequences import TokenSequence
from .weights import load_model

if TYPE_CHECKING:
    from ..settings import RerankSettings
    from .checkpoint import Checkpoint


class Decoder:
    """A causal language model as a reranker. See `families.Family` for what its methods mean."""

    name: ClassVar[str] = "decoder"
    architectures: ClassVar[tuple[str, ...]] = (
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    )
    float16_is_safe: ClassVar[bool] = False
    layers: ClassVar[range | None] = None

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self.max_length = prompt.max_length
        self._prompt = prompt
        self._backbone: Any = model.base_model
        multiply_by_onednn(self._backbone)
        work_in_place(self._backbone)
        LastRows(self._backbone.layers[-1])
        self._answer_row = model.get_output_embeddings().weight[prompt.answer_id].float().clone()  # without the head
        self._softcap = softcap_of(model.config)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, settings: RerankSettings, device: torch.device, dtype: torch.dtype
    ) -> Decoder:
        """The language model with its weights on `device`, its vocabulary head cut to one row.

        Raises:
            ValueError: `cutoff_layer`, which only layerwise checkpoints have; float16 on Gemma; a `max_length` beyond the
                positions; weights that are not in the files.
        """
        config, prompt = _checked(checkpoint, settings)
        model: Any = load_model(checkpoint, AutoModelForCausalLM, config, dtype, device)
        if dtype == torch.int8:
            round_linear_layers(model.base_model.layers)
        return cls(model, prompt)

    @classmethod
    def describe(cls, checkpoint: Checkpoint, settings: RerankSettings) -> dict[str, str]:
        """Facts from the config, by name, without loading any weights.

        Raises:
            ValueError: As `load`, but for what only the weights can tell.
        """
        config, prompt = _checked(checkpoint, settings)
        return {
            "layers": str(config.num_hidden_layers),
            "hidden size": str(config.hidden_size),
            "vocabulary": f"{config.vocab_size} tokens",
            "max_length": f"{prompt.max_length} tokens a pair, and {prompt.extra_tokens} of prompt",
        }

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """The model card's token ids, the query as a prefix that the passages share."""
        return self._prompt.encode(query, passages)

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next."""
        return self._prompt.windows(query, passage)

    def forward(self, pack: Pack, cutoff_layers: Sequence[int] = ()) -> Tensor:
        """Logits of "Yes" after each of the pack's sequences. Shape (sequences,), float32."""
        hidden: Tensor = self._backbone(
            input_ids=pack.input_ids[None], position_ids=pack.position_ids[None], use_cache=False, pack=pack
        ).last_hidden_state
        logits = hidden[0, : len(pack.last_rows)].float() @ self._answer_row
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


def softcap_of(config: Any) -> float | None:
    """Bound of the logits; Gemma 2's alone: configs of other models may name one, too, which those models do not look at."""
    softcap: float | None = config.final_logit_softcapping if config.model_type == "gemma2" else None
    return softcap


def _checked(checkpoint: Checkpoint, settings: RerankSettings) -> tuple[Any, Prompt]:
    """The config and the prompt, once the settings are known to fit the checkpoint."""
    if settings.cutoff_layer is not None:
        raise ValueError(
            f"cutoff_layer={settings.cutoff_layer}: {checkpoint.model!r} is no layerwise checkpoint, it scores at the end"
        )
    checkpoint.check_causal()
    config = checkpoint.transformers_config()
    if settings.dtype == "float16" and config.model_type.startswith("gemma"):  # nothing else chooses it for this family
        raise ValueError("dtype='float16': Gemma's hidden states overflow in it to NaN; use 'bfloat16' or 'float32'")
    return config, Prompt(checkpoint, settings, config.max_position_embeddings)

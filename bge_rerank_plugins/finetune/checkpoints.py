"""The checkpoints that are trained on, base models among them. Knows nothing of networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..core.checkpoint import Checkpoint
from ..core.encoder import CLASSIFIER_OF
from ..settings import RerankSettings
from .settings import FinetuneSettings

START_LAYER = 8
"""Lowest layer that gets a head where a base model has none, as the published recipe has it."""

RERANKER_OF = {**CLASSIFIER_OF, "MiniCPMForCausalLM": "LayerWiseMiniCPMForCausalLM"}
"""Architectures of base models, and of the rerankers that are made of them."""


@dataclass(frozen=True)
class TrainingCheckpoint(Checkpoint):
    """A checkpoint to train on. That of a base model is read as one of the reranker that it will be.

    Attributes:
        start_layer: Lowest layer that gets a head, in a layerwise reranker made of a base model.
    """

    start_layer: int = START_LAYER

    @property
    def is_base_model(self) -> bool:
        """Whether it has no scoring head yet."""
        return any(name in RERANKER_OF for name in super().config.get("architectures") or [])

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it stands, or that of the reranker that a base model becomes."""
        config = super().config
        if not self.is_base_model:
            return config
        config = config | {"architectures": [RERANKER_OF.get(name, name) for name in config["architectures"]]}
        if "LayerWiseMiniCPMForCausalLM" in config["architectures"]:
            return config | {"start_layer": self.start_layer, "head_multi": True, "head_type": "simple"}
        return config

    def transformers_config(self) -> PreTrainedConfig:
        """The config as the class of transformers that it is for, with the one label of the reranker that is made."""
        config = super().transformers_config()
        if self.is_base_model:
            config.num_labels = 1
        return config


def checkpoint_of(settings: FinetuneSettings) -> TrainingCheckpoint:
    """The checkpoint that the settings name."""
    checkpoint = TrainingCheckpoint.from_settings(rerank_settings(settings))
    return checkpoint if settings.start_layer is None else replace(checkpoint, start_layer=settings.start_layer)


def rerank_settings(settings: FinetuneSettings, prompt: str | None = None) -> RerankSettings:
    """The options of a `Scorer` that makes the same token ids."""
    return RerankSettings(
        model=settings.model,
        max_length=settings.max_length,
        query_max_length=settings.query_max_len,
        prompt=prompt,
        query_instruction=settings.query_instruction,
        passage_instruction=settings.passage_instruction,
        peft_path=settings.peft_path,
        revision=settings.revision,
        cache_dir=settings.cache_dir,
        local_files_only=settings.local_files_only,
        token=settings.token,
    )

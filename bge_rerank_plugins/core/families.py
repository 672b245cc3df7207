"""config.json -> family, from a table. The family is never guessed from a name or a path."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .decoder import Decoder
from .encoder import CLASSIFIER_OF, Encoder
from .layerwise import Layerwise
from .packing import Pack
from .sequences import TokenSequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..settings import RerankSettings


class Family(Protocol):
    """One of the kinds of reranker: how text becomes token ids, and how packs of them become scores.

    `encode` may be called from many threads at once; `forward` only by the one thread that owns the model.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    float16_is_safe: ClassVar[bool]

    @property
    def max_length(self) -> int:
        """Longest pair in tokens."""
        ...

    @property
    def layers(self) -> range | None:
        """Layers after which the family can score; None if only after the last."""
        ...

    def encode(self, query: str, passages: Sequence[str]) -> list[TokenSequence]:
        """Token ids of the query with each of the passages, cut to `max_length`."""
        ...

    def windows(self, query: str, passage: str) -> list[str]:
        """The passage in parts that fit beside the query, each overlapping the next; the passage itself if it fits."""
        ...

    def forward(self, pack: Pack, cutoff_layers: Sequence[int] = ()) -> Tensor:
        """Raw scores of the pack's sequences, float32.

        Shape (sequences,), or (sequences, cutoff_layers) where the family scores after several layers and is asked to.
        """
        ...

    @classmethod
    def load(cls, checkpoint: Checkpoint, settings: RerankSettings, device: torch.device, dtype: torch.dtype) -> Family:
        """The family with its weights on `device`."""
        ...

    @classmethod
    def describe(cls, checkpoint: Checkpoint, settings: RerankSettings) -> dict[str, str]:
        """Facts for `bge-rerank info`, by name, without loading any weights; fails where `load` would, as far as can be told."""
        ...


FAMILIES: tuple[type[Family], ...] = (Encoder, Decoder, Layerwise)


def family_of(checkpoint: Checkpoint) -> type[Family]:
    """The family of a checkpoint, from its config's `architectures`.

    A LoRA adapter that was trained for sequence classification makes an encoder of a checkpoint without a head.

    Raises:
        ValueError: Not a reranker that is supported; the message lists those that are.
    """
    named = checkpoint.config.get("architectures") or []
    architectures: list[str] = [named] if isinstance(named, str) else named
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(
            f"model={checkpoint.model!r}: architectures={named!r} in its config.json: expected a list of names"
        )
    if (checkpoint.adapter_config or {}).get("task_type") == "SEQ_CLS":
        architectures = [CLASSIFIER_OF.get(name, name) for name in architectures]
        if not set(architectures) & set(Encoder.architectures):
            raise ValueError(
                f"peft_path={checkpoint.peft_path!r}: an adapter for sequence classification, and model={checkpoint.model!r} is "
                f"{', '.join(architectures) or 'nothing that is named'}; supported for it: {', '.join(CLASSIFIER_OF)}"
            )
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
    supported = "; ".join(f"{family.name}: {', '.join(family.architectures)}" for family in FAMILIES)
    raise ValueError(
        f"model={checkpoint.model!r}: its config.json names the architecture "
        f"{', '.join(architectures) or 'of nothing'}, which is not supported ({supported})"
    )

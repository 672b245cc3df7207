"""Fine-tuning of the three families on transformers' Trainer, hard negatives and distillation; the extra `finetune`.

Importing this package loads nothing else: torch comes with the first call. Nothing in `core/` knows of it.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .distillation import distill
    from .mining import mine
    from .settings import FinetuneSettings, MineSettings
    from .train import FinetuneResult, finetune

__all__ = ["FinetuneResult", "FinetuneSettings", "MineSettings", "distill", "finetune", "mine"]

_HOMES = {
    "FinetuneResult": ".train",
    "FinetuneSettings": ".settings",
    "MineSettings": ".settings",
    "distill": ".distillation",
    "finetune": ".train",
    "mine": ".mining",
}

if not TYPE_CHECKING:  # or a type checker would take every wrong name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)

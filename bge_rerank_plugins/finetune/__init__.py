"""Fine-tuning of the three families on transformers' Trainer, hard negatives and distillation; the extra `finetune`.

Importing this package loads nothing else: torch comes with the first call. Nothing in `core/` knows of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(_HOMES[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__])

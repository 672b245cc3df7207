"""BGE rerankers for LangChain and LlamaIndex over one scoring core.

Importing this package loads nothing else: `Scorer` and its companions are resolved at first use, and the adapters live in
`bge_rerank_plugins.langchain` and `bge_rerank_plugins.llama_index`, which need only their own framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ranking import RankedPassage
    from .scorer import Scorer
    from .settings import RerankSettings

__version__ = "0.1.0"

__all__ = ["RankedPassage", "RerankSettings", "Scorer"]

_HOMES = {"RankedPassage": ".ranking", "Scorer": ".scorer", "RerankSettings": ".settings"}

if not TYPE_CHECKING:  # or a type checker would take every wrong name

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(_HOMES[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__])

"""BGE rerankers for LangChain and LlamaIndex over one scoring core.

Importing this package loads nothing else: `Scorer` and its companions are resolved at first use, and the adapters live in
`bge_rerank_plugins.langchain` and `bge_rerank_plugins.llama_index`, which need only their own framework.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .ranking import RankedPassage
    from .scorer import Scorer
    from .settings import RerankSettings

__version__ = "0.1.0"

__all__ = ["RankedPassage", "RerankSettings", "Scorer"]

_HOMES = {"RankedPassage": ".ranking", "Scorer": ".scorer", "RerankSettings": ".settings"}

if not TYPE_CHECKING:  # or a type checker would take every wrong name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)

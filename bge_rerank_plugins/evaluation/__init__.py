"""Measures rerankers on a set of judged queries: quality before and after, significance, time.

`evaluate` does it for data and scorers of your own, `bge-rerank eval` for files and models. Needs the extra `eval`. Knows
nothing of torch or of model families: a reranker is anything with `score(query, passages)`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .comparison import Report, System, evaluate
    from .first_stage import bm25_run, encoder_run
    from .inputs import JudgedSet, read_beir, read_files, read_rerank_set, read_run
    from .settings import EvaluationSettings
    from .standard_library import standard_library_set

__all__ = [
    "EvaluationSettings",
    "JudgedSet",
    "Report",
    "System",
    "bm25_run",
    "encoder_run",
    "evaluate",
    "read_beir",
    "read_files",
    "read_rerank_set",
    "read_run",
    "standard_library_set",
]

_HOMES = {
    "EvaluationSettings": ".settings",
    "JudgedSet": ".inputs",
    "Report": ".comparison",
    "System": ".comparison",
    "bm25_run": ".first_stage",
    "encoder_run": ".first_stage",
    "evaluate": ".comparison",
    "read_beir": ".inputs",
    "read_files": ".inputs",
    "read_rerank_set": ".inputs",
    "read_run": ".inputs",
    "standard_library_set": ".standard_library",
}

if not TYPE_CHECKING:  # or a type checker would take every wrong name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)

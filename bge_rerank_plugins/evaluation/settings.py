"""Every option of an evaluation, defined and described once; the command line makes its flags from them."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from ..settings import Settings

STANDARD_LIBRARY = "standard-library"
DEFAULT_TOP_K = 100
MEASURES = ["nDCG@10", "RR@10", "AP", "R@10", "Success@10"]


class EvaluationSettings(Settings):
    """What is evaluated, on which candidates, and with which measures.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid")

    data: str | None = Field(
        default=None,
        description="Folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/*.tsv; each may end in .gz), or a file of JSON "
        "lines with query, positive and negative, or 'standard-library': the documentation of this Python.",
    )
    split: str = Field(default="test", description="Which file of the folder's qrels to use.")
    corpus: str | None = Field(default=None, description="File of passages, as BEIR's corpus.jsonl, instead of DATA.")
    queries: str | None = Field(
        default=None, description="File of queries, as BEIR's queries.jsonl; goes with --corpus."
    )
    qrels: str | None = Field(
        default=None,
        description="File of judgements, TREC's four columns or BEIR's three; goes with --corpus, or takes the place of "
        "those in the folder.",
    )
    run: str | None = Field(
        default=None,
        description="File of candidates, TREC's six columns: another system's results are reranked, not those of the first "
        "stage.",
    )
    first_stage: str = Field(
        default="bm25",
        min_length=1,
        description="What finds the candidates: 'bm25', or a sentence-transformers encoder, its local directory or hub id.",
    )
    first_stage_prompt: str = Field(default="", description="Text that the encoder wants before every query.")
    top_k: int | None = Field(
        default=None,
        ge=1,
        description=f"How many candidates of each query are reranked. By default {DEFAULT_TOP_K}, and all of a rerank set.",
    )
    sample: int | None = Field(
        default=None, ge=1, description="Only so many of the queries, drawn at random, the same ones every time."
    )
    ignore_identical_ids: bool = Field(
        default=False,
        description="Leave out passages that have the query's own id, as BEIR does for ArguAna and Quora.",
    )
    measures: list[str] = Field(
        default=MEASURES,
        min_length=1,
        description="What is measured, in the words of ir_measures, comma-separated; the first one is tested and plotted.",
    )
    cutoff_layers: list[int] | None = Field(
        default=None, description="Layers of the layerwise models to compare, comma-separated."
    )

    @field_validator("data", "corpus", "queries", "qrels", "run", "first_stage", mode="before")
    @classmethod
    def _path_is_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("measures", "cutoff_layers", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, int)) else value

    @model_validator(mode="after")
    def _data_is_given_once(self) -> Self:
        files = {name: getattr(self, name) for name in ("corpus", "queries", "qrels")}
        if self.data is not None:
            for name in ("corpus", "queries"):
                if files[name] is not None:
                    raise ValueError(
                        f"{name}={files[name]!r}: data={self.data!r} has them already, give one or the other"
                    )
        elif missing := [name for name, value in files.items() if value is None]:
            raise ValueError(f"{missing[0]} is missing: give a data set, or its corpus, queries and qrels")
        return self

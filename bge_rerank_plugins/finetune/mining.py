"""Hard negatives: passages that a retriever ranks high for a query and that do not answer it.

They are drawn from a range of places below the best, since what stands at the very top often answers too. Knows nothing of
rerankers or of training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.first_stage import load_encoder
from ..jsonl import InputError, Line, check_text, read_all_lines
from .data import check_example, example_of, positives_by_query, same_text
from .settings import MineSettings

QUERIES_AT_ONCE = 256

Retriever = Callable[[Sequence[str], int], list[list[int]]]
"""Queries and a number to the places in the corpus of the best so many passages for each, best first."""


def mine(records: Sequence[dict[str, Any]], settings: MineSettings) -> list[dict[str, Any]]:
    """Gives lines of training data hard negatives, which never are a positive of their query on any line.

    Args:
        records: Lines as for `finetune`; their own negatives are kept where no others are found.
        settings: What finds the negatives, where in its ranking, and how many.

    Returns:
        Copies of the lines with new "neg", fewer than `settings.negatives` where the range holds no more; other keys are kept,
        but for a teacher's scores.

    Raises:
        ValueError: A line that cannot be used.
        InputErrors: Lines of `settings.corpus` that cannot be used.
        ImportError: The retriever's library is not installed.
    """
    for record in records:
        check_example(record)
    corpus = _corpus(records, settings.corpus)
    keys = [same_text(text) for text in corpus]
    positives = positives_by_query([example_of(record) for record in records])
    retrieve = _retriever(settings, corpus)
    mined = []
    for start in range(0, len(records), QUERIES_AT_ONCE):
        part = records[start : start + QUERIES_AT_ONCE]
        rankings = retrieve([record["query"] for record in part], min(settings.last, len(corpus)))
        for number, (record, ranking) in enumerate(zip(part, rankings, strict=True), start=start):
            query = same_text(record["query"])
            answers = positives[query] | {query}
            found = [corpus[place] for place in ranking[settings.first - 1 :] if keys[place] not in answers]
            draw = random.Random(f"{settings.seed} {number}")
            chosen = draw.sample(range(len(found)), min(settings.negatives, len(found)))
            negatives = [found[place] for place in sorted(chosen)]
            kept = {key: value for key, value in record.items() if key not in ("pos_scores", "neg_scores")}
            mined.append(kept | {"neg": negatives or record["neg"]})
    return mined


def read_records(path: str) -> list[dict[str, Any]]:
    """Lines of training data with all their keys.

    Raises:
        InputErrors: Every line that cannot be used, with its number and why.
    """
    with Path(path).open("rb") as source:
        return [line.record for line in read_all_lines(source, path, check_example)]


def _corpus(records: Sequence[dict[str, Any]], path: str | None) -> list[str]:
    """Every passage once."""
    if path is None:
        texts = [text for record in records for text in (*record["pos"], *record["neg"])]
    else:
        with Path(path).open("rb") as source:
            lines: list[Line] = read_all_lines(source, path, lambda record: check_text(record, "text"))
        texts = [line.record["text"] for line in lines]
        if not any(text.strip() for text in texts):
            raise InputError(f"corpus={path!r}: all of its texts are empty")
    return list({same_text(text): text for text in texts if text.strip()}.values())


def _retriever(settings: MineSettings, corpus: Sequence[str]) -> Retriever:
    return _bm25(corpus) if settings.retriever == "bm25" else _encoder(settings, corpus)


def _bm25(corpus: Sequence[str]) -> Retriever:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("retriever='bm25' needs bm25s: pip install \"bge-rerank-plugins[finetune]\"") from error

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)

    indexed = words(corpus)
    if not any(indexed.ids):
        return lambda queries, count: [[] for _ in queries]  # nothing but stop words, of which bm25s makes no index
    index = bm25s.BM25()
    index.index(indexed, show_progress=False)

    def retrieve(queries: Sequence[str], count: int) -> list[list[int]]:
        places, scores = index.retrieve(words(queries), k=count, show_progress=False)
        rows = zip(places.tolist(), scores.tolist(), strict=True)
        return [[p for p, score in zip(row, row_scores, strict=True) if score > 0] for row, row_scores in rows]

    return retrieve


def _encoder(settings: MineSettings, corpus: Sequence[str]) -> Retriever:
    model = load_encoder(
        settings.retriever,
        option="retriever",
        extra="finetune",
        cache_dir=settings.cache_dir,
        local_files_only=settings.local_files_only,
        token=settings.token,
    )
    vectors = model.encode(list(corpus), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)

    def retrieve(queries: Sequence[str], count: int) -> list[list[int]]:
        asked = model.encode(list(queries), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
        places: list[list[int]] = (asked @ vectors.T).topk(count, dim=1).indices.tolist()
        return places

    return retrieve

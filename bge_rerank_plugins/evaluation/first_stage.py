"""Finds the candidates that are reranked: BM25 or an encoder over all passages, or over each query's pool.

Knows nothing of rerankers or measures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .inputs import JudgedSet, Run

Found = Mapping[str, Mapping[str, float]]
"""For each query the score of what was found."""


def bm25_run(data: JudgedSet, top_k: int | None, *, ignore_identical_ids: bool = False) -> Run:
    """BM25's best passages for each query.

    Passages that share no word with the query are not found; in a rerank set, where each query has only its own texts, they
    come last. Words are runs of letters and digits without English stop words, so text that is written without spaces needs
    an encoder or a run.

    Args:
        data: The queries and passages.
        top_k: How many for each query; None for all that are found.
        ignore_identical_ids: Leave out passages that have the query's own id.

    Raises:
        ValueError: A `top_k` below 1, or a query whose pool is missing or has unknown passages.
        ImportError: bm25s is not installed; the message says how to install it.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('BM25 needs bm25s: pip install "bge-rerank-plugins[eval]"') from error

    _check(data, top_k)

    def tokens(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)  # type: ignore[no-any-return]

    ids = list(data.passages)
    passages = tokens(list(data.passages.values()))
    if not any(passages):  # not a word in them: nothing to index
        unscored = {query: dict.fromkeys(data.pools[query] if data.pools else (), 0.0) for query in data.queries}
        return _cut(unscored, data, top_k)
    index = bm25s.BM25()
    index.index(passages, show_progress=False)
    place = {passage: row for row, passage in enumerate(ids)}
    known = set(index.vocab_dict)
    found: dict[str, dict[str, float]] = {}
    for query, words in zip(data.queries, tokens(list(data.queries.values())), strict=True):
        words = [word for word in words if word in known]
        scores = index.get_scores(words) if words else np.zeros(len(ids), dtype=np.float32)
        rows = [place[passage] for passage in data.pools[query]] if data.pools else _best(scores, top_k)
        found[query] = {
            ids[row]: float(scores[row])
            for row in rows
            if (scores[row] > 0 or data.pools) and not (ignore_identical_ids and ids[row] == query)
        }
    return _cut(found, data, top_k)


def encoder_run(
    data: JudgedSet,
    model: str,
    top_k: int | None,
    *,
    prompt: str = "",
    ignore_identical_ids: bool = False,
    device: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Run:
    """The passages whose embeddings are nearest to each query's, by cosine.

    Args:
        data: The queries and passages.
        model: Local directory or hub id of a sentence-transformers encoder.
        top_k: How many for each query; None for all.
        prompt: Text that the encoder wants before every query.
        ignore_identical_ids: Leave out passages that have the query's own id.
        device: Where the encoder runs; by default where sentence-transformers puts it.
        cache_dir: Directory of the hub's download cache.
        local_files_only: Never download; use only files that are already here.
        token: Access token for the hub.

    Raises:
        ValueError: No encoder can be loaded there; a `top_k` below 1, or a query whose pool is missing or has unknown passages.
        ImportError: sentence-transformers is not installed; the message says how to install it.
    """
    _check(data, top_k)
    encoder = load_encoder(
        model,
        option="first_stage",
        extra="eval",
        device=device,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    encode: Callable[[list[str]], Any] = lambda texts: encoder.encode(  # noqa: E731
        texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
    )
    ids = list(data.passages)
    place = {passage: row for row, passage in enumerate(ids)}
    passages = encode(list(data.passages.values()))
    queries = encode([prompt + text for text in data.queries.values()])
    found: dict[str, dict[str, float]] = {}
    for query, vector in zip(data.queries, queries, strict=True):
        scores = passages @ vector
        rows = [place[passage] for passage in data.pools[query]] if data.pools else _best(scores, top_k)
        found[query] = {
            ids[row]: float(scores[row]) for row in rows if not (ignore_identical_ids and ids[row] == query)
        }
    return _cut(found, data, top_k)


def _check(data: JudgedSet, top_k: int | None) -> None:
    """Raises ValueError for what no passages can be found for."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: take at least 1, or None for all")
    data.check_pools()


def load_encoder(
    model: str,
    *,
    option: str,
    extra: str,
    device: str | None = None,
    cache_dir: str | None,
    local_files_only: bool,
    token: str | None,
) -> Any:
    """The encoder of sentence-transformers that an option names in the place of BM25.

    Raises:
        ValueError: None can be loaded there.
        ImportError: sentence-transformers is not installed; the message names our extra that brings it.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f'{option}={model!r} needs sentence-transformers: pip install "bge-rerank-plugins[{extra}]"'
        ) from error
    try:
        return SentenceTransformer(
            model,
            device=device,
            cache_folder=cache_dir,
            local_files_only=local_files_only,
            token=token,
            # transformers looks for a LoRA adapter beside the weights, and there knows nothing of the options above.
            model_kwargs={"adapter_kwargs": {"cache_dir": cache_dir, "local_files_only": local_files_only}},
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}={model!r}: not 'bm25', and no encoder can be loaded there: {error}") from error


def _best(scores: Any, top_k: int | None) -> list[int]:
    """Rows of the best scores, and one more for a passage that is the query itself; equal scores in the corpus's order."""
    count = len(scores) if top_k is None else min(top_k + 1, len(scores))
    lowest = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, at = np.flatnonzero(scores > lowest), np.flatnonzero(scores == lowest)
    return [*above.tolist(), *at[: count - len(above)].tolist()]


def _cut(found: Found, data: JudgedSet, top_k: int | None) -> Run:
    """Ids, best first; equal scores keep the corpus's order, or in a rerank set one that depends on the texts alone."""
    run: Run = {}
    for query, scores in found.items():
        ids = list(scores)
        if data.pools:  # where the positives may stand first
            ids.sort(key=lambda passage: hashlib.sha256(data.passages[passage].encode()).digest())
        run[query] = sorted(ids, key=lambda passage, scores=scores: -scores[passage])[:top_k]  # type: ignore[misc]
    return run

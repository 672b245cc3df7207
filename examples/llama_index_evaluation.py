r"""MRR and hit rate of embedding models with and without rerankers, by LlamaIndex's own `RetrieverEvaluator`.

    pip install "bge-rerank-plugins[llama-index,demo,eval]"
    python examples/llama_index_evaluation.py
    python examples/llama_index_evaluation.py --data scifact --embeddings BAAI/bge-large-en-v1.5,BAAI/bge-m3 \
        --rerankers BAAI/bge-reranker-base,BAAI/bge-reranker-v2-m3

The form of the last table of the model card of bge-reranker-v2-m3: one column pair for each embedding model, one row for
each reranker. Each query retrieves `--similarity-top-k` passages from a `VectorStoreIndex`, the reranker keeps `--top-n` of
them; without a reranker the index's own best `--top-n` count. The default data are the docstrings of this Python's standard
library, the default models are the ones of the extra `demo`, so that it runs without a model hub.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import TextNode
from pydantic import PrivateAttr
from sentence_transformers import SentenceTransformer

from bge_rerank_plugins.evaluation import EvaluationSettings, JudgedSet
from bge_rerank_plugins.evaluation.command import load
from bge_rerank_plugins.llama_index import BGERerank
from bge_rerank_plugins.models import embedded_base

METRICS = ("mrr", "hit_rate")
MINILM = "all-MiniLM-L6-v2"
NO_RERANKER = "without reranker"

Scores = dict[str, float]


class LocalEmbedding(BaseEmbedding):
    """A sentence-transformers encoder as LlamaIndex's embedding model."""

    _encoder: SentenceTransformer = PrivateAttr()

    def __init__(self, model: str) -> None:
        super().__init__(model_name=model, embed_batch_size=64)
        self._encoder = SentenceTransformer(str(embedded_base()) if model == MINILM else model)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: Any = self._encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return [vector.tolist() for vector in vectors]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def main(arguments: Sequence[str] | None = None) -> dict[tuple[str, str], Scores]:
    """Evaluate every pair of an embedding model and a reranker, and print the table."""
    options = parse_options(arguments)
    data = smaller(load(EvaluationSettings(data=options.data, sample=options.queries)), options.passages)
    if data.pools is not None:
        raise SystemExit(f"--data {options.data}: its queries have texts of their own, and an index has all in one")
    print(
        f"{data.name}: {len(data.queries)} queries, {len(data.passages)} passages; {options.similarity_top_k} retrieved, "
        f"{options.top_n} kept."
    )
    table: dict[tuple[str, str], Scores] = {}
    nodes = [TextNode(id_=passage, text=text) for passage, text in data.passages.items()]
    for embedding in options.embeddings.split(","):
        index = VectorStoreIndex(nodes, embed_model=LocalEmbedding(embedding))
        table[embedding, NO_RERANKER] = evaluated(index, data, options.top_n)
        for reranker in options.rerankers.split(","):
            with_close = BGERerank(model=reranker, top_n=options.top_n, max_length=options.max_length)
            table[embedding, reranker] = evaluated(index, data, options.similarity_top_k, with_close)
            with_close.close()
    print_table(table)
    return table


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="standard-library", help="as for bge-rerank eval, but for rerank sets")
    parser.add_argument("--embeddings", default=MINILM, metavar="MODEL[,MODEL...]")
    parser.add_argument("--rerankers", default="embedded", metavar="MODEL[,MODEL...]")
    parser.add_argument("--queries", type=int, help="so many queries drawn at random; all by default")
    parser.add_argument("--passages", type=int, help="only so many passages besides the relevant ones; all by default")
    parser.add_argument("--similarity-top-k", type=int, default=10)
    parser.add_argument("--top-n", type=int, default=5)
    parser.add_argument("--max-length", type=int)
    return parser.parse_args(arguments)


def smaller(data: JudgedSet, passages: int | None) -> JudgedSet:
    """The set with fewer of its passages, those that are judged among them."""
    if passages is None:
        return data
    judged = {passage for query in data.queries for passage in data.qrels[query]}
    kept = judged | set(list(data.passages)[:passages])
    return replace(data, passages={passage: text for passage, text in data.passages.items() if passage in kept})


def evaluated(
    index: VectorStoreIndex, data: JudgedSet, top_k: int, reranker: BaseNodePostprocessor | None = None
) -> Scores:
    """The means of the evaluator's metrics over all queries; those without a relevant passage, which it refuses, count 0."""
    evaluator = RetrieverEvaluator.from_metric_names(
        list(METRICS),
        retriever=index.as_retriever(similarity_top_k=top_k),
        node_postprocessors=[] if reranker is None else [reranker],
    )
    relevant = {query: [passage for passage, value in data.qrels[query].items() if value > 0] for query in data.queries}
    results = [evaluator.evaluate(data.queries[query], relevant[query]) for query in data.answerable]
    return {
        metric: sum(result.metric_vals_dict[metric] for result in results) / len(data.queries) for metric in METRICS
    }


def print_table(table: dict[tuple[str, str], Scores]) -> None:
    """A Markdown table: rerankers as rows, MRR and hit rate of each embedding model as columns, in percent."""
    embeddings = list(dict.fromkeys(embedding for embedding, _ in table))
    rerankers = list(dict.fromkeys(reranker for _, reranker in table))
    width = max(map(len, rerankers))
    print(f"| {'':{width}} |" + "".join(f" {embedding}: MRR | hit rate |" for embedding in embeddings))
    print(f"|{'-' * (width + 2)}|" + "--:|--:|" * len(embeddings))
    for reranker in rerankers:
        cells = [f" {100 * table[embedding, reranker][metric]:.2f} |" for embedding in embeddings for metric in METRICS]
        print(f"| {reranker:{width}} |" + "".join(cells))


if __name__ == "__main__":
    main()

"""Measure the embedded models on text they were not trained on: the standard library's documentation.

    pip install "bge-rerank-plugins[demo]" ir_measures scipy
    python examples/evaluate_embedded.py
    python examples/evaluate_embedded.py --queries 200 --compare-dtypes
    python examples/evaluate_embedded.py --queries 300 --models embedded embedded-decoder
    python examples/evaluate_embedded.py --queries 300 --models embedded-layerwise --layers 2 5 8

Each query is the first sentence of a docstring, and the one relevant passage is its name and the rest. BM25
retrieves 50 of all passages, the model ranks them again; a passage that BM25 misses counts as not found for both.
"""

import argparse
import random
import time
from statistics import mean

import bm25s
import ir_measures
from ir_measures import RR, Success, nDCG
from scipy.stats import spearmanr

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.docstrings import Pair, pairs, standard_library

MEASURES = {"MRR@10": RR @ 10, "nDCG@10": nDCG @ 10, "hit@10": Success @ 10}

Run = dict[str, dict[str, float]]


def main() -> None:
    """Rank with BM25, rank again, print both."""
    options = parse_options()
    corpus = pairs(standard_library())
    asked = chosen_queries(len(corpus), options.queries)
    candidates = retrieve(corpus, asked, options.top)
    runs = {"BM25, shuffled": shuffled(candidates), "BM25 alone": candidates}
    start = time.perf_counter()
    for model in options.models:
        for layer in options.layers or [None]:
            scorer = Scorer(model, dtype=options.dtype, max_length=options.max_length, cutoff_layer=layer)
            runs[f"BM25 + {model}" + (f", layer {layer}" if layer else "")] = rerank(corpus, candidates, scorer)
    seconds = time.perf_counter() - start

    relevant = {query: {query: 1} for query in candidates}
    print(f"{len(asked)} queries, {len(corpus)} passages, the {options.top} best of BM25 reranked in {seconds:.0f} s")
    print_table(relevant, runs)
    if options.compare_dtypes:
        fast = rerank(corpus, candidates, Scorer("embedded", dtype="bfloat16", max_length=options.max_length))
        exact = rerank(corpus, candidates, Scorer("embedded", dtype="float32", max_length=options.max_length))
        print_correlation(fast, exact)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, help="so many queries drawn at random; all by default")
    parser.add_argument("--top", type=int, default=50, help="passages to rerank for each query")
    parser.add_argument("--models", nargs="+", default=["embedded"], help="models to rerank with, directories too")
    parser.add_argument("--layers", type=int, nargs="+", help="cutoff layers, of layerwise models")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--compare-dtypes", action="store_true", help="also correlate bfloat16 with float32")
    return parser.parse_args()


def chosen_queries(total: int, wanted: int | None) -> list[int]:
    """Places in the corpus of the queries to ask."""
    return sorted(random.Random(0).sample(range(total), wanted)) if wanted else list(range(total))


def retrieve(corpus: list[Pair], asked: list[int], top: int) -> Run:
    """BM25's best passages of each query. A query and its passage share a number, their place in the corpus."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize([pair.passage for pair in corpus], show_progress=False), show_progress=False)
    queries = bm25s.tokenize([corpus[i].query for i in asked], show_progress=False)
    found, scores = index.retrieve(queries, k=top, show_progress=False)
    return {
        str(i): {str(passage): float(score) for passage, score in zip(row, row_scores, strict=True)}
        for i, row, row_scores in zip(asked, found, scores, strict=True)
    }


def rerank(corpus: list[Pair], candidates: Run, scorer: Scorer) -> Run:
    """The model's score of every candidate."""
    with scorer:
        return {
            query: dict(
                zip(found, scorer.score(corpus[int(query)].query, [corpus[int(i)].passage for i in found]), strict=True)
            )
            for query, found in candidates.items()
        }


def shuffled(candidates: Run) -> Run:
    """The same candidates in random order: what knowing nothing achieves."""
    draw = random.Random(0)
    return {query: {passage: draw.random() for passage in found} for query, found in candidates.items()}


def print_table(relevant: dict[str, dict[str, int]], runs: dict[str, Run]) -> None:
    """A Markdown table, a row for each run."""
    width = max(map(len, runs))
    print(f"| {'':{width}} |" + "".join(f" {name:>7} |" for name in MEASURES))
    print(f"|{'-' * (width + 2)}|" + f"{'-' * 8}:|" * len(MEASURES))
    for name, run in runs.items():
        values = ir_measures.calc_aggregate(MEASURES.values(), relevant, run)
        print(f"| {name:{width}} |" + "".join(f" {values[measure]:7.3f} |" for measure in MEASURES.values()))


def print_correlation(fast: Run, exact: Run) -> None:
    """Spearman's rank correlation of the scores of each query's passages."""
    correlations = [spearmanr(list(fast[q].values()), list(exact[q].values())).statistic for q in exact]
    print(f"bfloat16 against float32: rank correlation {mean(correlations):.5f}, lowest {min(correlations):.5f}")


if __name__ == "__main__":
    main()

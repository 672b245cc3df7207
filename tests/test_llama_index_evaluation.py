"""The example that evaluates embedding models and rerankers with LlamaIndex's own evaluator."""

import pytest
from conftest import DATA
from llama_index_evaluation import MINILM, NO_RERANKER, main

ENCODER = str(DATA / "encoder")
SMALL = ["--queries", "12", "--passages", "60"]


def test_the_embedded_model_ranks_better_than_the_index_alone(capsys: pytest.CaptureFixture[str]) -> None:
    table = main([*SMALL, "--rerankers", f"embedded,{ENCODER}", "--max-length", "112"])

    assert set(table) == {(MINILM, NO_RERANKER), (MINILM, "embedded"), (MINILM, ENCODER)}
    for scores in table.values():
        assert 0 <= scores["mrr"] <= scores["hit_rate"] <= 1
    assert table[MINILM, "embedded"]["mrr"] > table[MINILM, ENCODER]["mrr"], "which has random weights"
    assert table[MINILM, NO_RERANKER]["hit_rate"] > 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("standard-library: 12 queries, ")
    assert lines[1].split("|")[2:4] == [f" {MINILM}: MRR ", " hit rate "]
    assert [line.split("|")[1].strip() for line in lines[3:]] == [NO_RERANKER, "embedded", ENCODER]


def test_what_is_retrieved_bounds_what_reranking_finds() -> None:
    """With as many kept as retrieved, a reranker changes the order and not the hits."""
    table = main([*SMALL, "--rerankers", ENCODER, "--similarity-top-k", "5", "--top-n", "5"])

    assert table[MINILM, ENCODER]["hit_rate"] == table[MINILM, NO_RERANKER]["hit_rate"]
    assert table[MINILM, ENCODER]["mrr"] != table[MINILM, NO_RERANKER]["mrr"]

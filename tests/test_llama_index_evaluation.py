"""The example that evaluates embedding models and rerankers with LlamaIndex's own evaluator."""

import json
from pathlib import Path

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


def write_beir(folder: Path) -> Path:
    """Two queries, one of which no passage answers."""
    (folder / "qrels").mkdir()
    texts = {"p1": "a red fox", "p2": "a blue bird"}
    lines = [json.dumps({"_id": passage, "text": text}) for passage, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": query, "text": text}) for query, text in {"q1": "red fox", "q2": "green cat"}.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text("q1\tp1\t1\nq2\tp2\t-1\n")
    return folder


def test_a_query_that_no_passage_answers_counts_0(tmp_path: Path) -> None:
    table = main(["--data", str(write_beir(tmp_path)), "--rerankers", ENCODER, "--similarity-top-k", "2"])
    assert table[MINILM, NO_RERANKER] == {"mrr": 0.5, "hit_rate": 0.5}
    assert table[MINILM, ENCODER]["hit_rate"] == 0.5


def test_a_set_whose_queries_have_texts_of_their_own_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "rerank.jsonl"
    data.write_text('{"query": "red fox", "positive": ["a red fox"], "negative": ["a blue bird"]}\n')
    with pytest.raises(SystemExit, match="its queries have texts of their own"):
        main(["--data", str(data)])


def test_what_is_retrieved_bounds_what_reranking_finds() -> None:
    """With as many kept as retrieved, a reranker changes the order and not the hits."""
    table = main([*SMALL, "--rerankers", ENCODER, "--similarity-top-k", "5", "--top-n", "5"])

    assert table[MINILM, ENCODER]["hit_rate"] == table[MINILM, NO_RERANKER]["hit_rate"]
    assert table[MINILM, ENCODER]["mrr"] != table[MINILM, NO_RERANKER]["mrr"]

"""Judged sets and runs from files: what is read, and how each thing that is wrong is told."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bge_rerank_plugins.evaluation import read_beir, read_files, read_rerank_set, read_run, standard_library_set
from bge_rerank_plugins.evaluation.settings import EvaluationSettings
from bge_rerank_plugins.jsonl import InputError

CORPUS = [
    {"_id": "a", "title": "Panda", "text": "A bear of Sichuan."},
    {"_id": "b", "title": "", "text": "A red fox."},
    {"_id": "c", "text": "Bamboo is a grass."},
]
QUERIES = [
    {"_id": "q1", "text": "what is a panda?"},
    {"_id": "q2", "text": "what eats bamboo?"},
    {"_id": "q3", "text": "?"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\nq2\tc\t2\n"


def jsonl(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pandas" / "qrels").mkdir(parents=True)
    (tmp_path / "pandas" / "corpus.jsonl").write_text(jsonl(CORPUS))
    (tmp_path / "pandas" / "queries.jsonl").write_text(jsonl(QUERIES))
    (tmp_path / "pandas" / "qrels" / "test.tsv").write_text(QRELS)
    return tmp_path / "pandas"


def pack(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def test_a_beir_folder_is_read(folder: Path) -> None:
    data = read_beir(folder)

    assert data.name == "pandas"
    assert data.passages == {"a": "Panda A bear of Sichuan.", "b": "A red fox.", "c": "Bamboo is a grass."}
    assert data.queries == {"q1": "what is a panda?", "q2": "what eats bamboo?"}, "q3 is not judged"
    assert data.qrels == {"q1": {"a": 1, "b": 0}, "q2": {"c": 2}}
    assert data.pools is None


def test_packed_files_are_read_as_plain_ones(folder: Path) -> None:
    plain = read_beir(folder)
    for path in [*folder.glob("*.jsonl"), *folder.glob("qrels/*.tsv")]:
        pack(path)

    assert read_beir(folder) == plain


def test_another_split_and_other_judgements_can_be_named(folder: Path) -> None:
    (folder / "qrels" / "dev.tsv").write_text("q3\tb\t1\n")  # without the title line
    trec = folder / "own.qrels"
    trec.write_text("q2 0 a 1\n\nq2 0 c 0\n")

    assert read_beir(folder, "dev").qrels == {"q3": {"b": 1}}
    assert read_beir(folder, qrels=trec).qrels == {"q2": {"a": 1, "c": 0}}
    assert read_files(folder / "corpus.jsonl", folder / "queries.jsonl", trec).qrels == {"q2": {"a": 1, "c": 0}}


@pytest.mark.parametrize(
    "title", ["query-id\tcorpus-id\tscore", "\n \nquery-id\tcorpus-id\tscore", "frage antwort 'gut?'"]
)
def test_a_title_is_skipped_whatever_its_words_and_also_after_blank_lines(folder: Path, title: str) -> None:
    (folder / "qrels" / "test.tsv").write_text(f"{title}\nq1\ta\t1\n")

    assert read_beir(folder).qrels == {"q1": {"a": 1}}


def test_queries_without_a_relevant_passage_stay_and_are_counted(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_text("q1\ta\t0\nq2\tc\t1\n")

    data = read_beir(folder)

    assert set(data.queries) == {"q1", "q2"}
    assert data.queries_without_relevant == 1


BROKEN: dict[str, tuple[str, str, str]] = {
    "bad JSON": ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": \n', "corpus.jsonl:2: not JSON"),
    "no text": ("corpus.jsonl", '{"_id": "a"}\n', 'corpus.jsonl:1: no "text"'),
    "an id that is no string": ("corpus.jsonl", '{"_id": 1, "text": "x"}\n', 'corpus.jsonl:1: "_id" is a number'),
    "a title that is no string": ("corpus.jsonl", '{"_id": "a", "title": 1, "text": "x"}\n', '"title" is a number'),
    "a passage twice": ("corpus.jsonl", jsonl([CORPUS[0], CORPUS[0]]), "corpus.jsonl:2: the id 'a' is given twice"),
    "a query twice": ("queries.jsonl", jsonl([QUERIES[0]] * 2), "queries.jsonl:2: the id 'q1' is given twice"),
    "an unknown passage": ("qrels/test.tsv", "q1\ta\t1\nq1\tz\t1\n", "test.tsv:2: passage 'z' is not in the corpus"),
    "an unknown query": ("qrels/test.tsv", "q1\ta\t1\nq9\ta\t1\n", "test.tsv:2: query 'q9' is not among the queries"),
    "a judgement twice": ("qrels/test.tsv", "q1\ta\t1\nq1\ta\t1\n", "test.tsv:2: passage 'a' is judged twice"),
    "a relevance that is no number": ("qrels/test.tsv", "q1\ta\t1\nq1\tb\tyes\n", "test.tsv:2: relevance 'yes'"),
    "too few columns": (
        "qrels/test.tsv",
        "q1\ta\t1\nq1\tb\n",
        "test.tsv:2: 2 columns, expected query passage relevance",
    ),
    "a relevance that is no whole number, at the top": (
        "qrels/test.tsv",
        "q1\ta\t0.5\n",
        "test.tsv:1: relevance '0.5'",
    ),
    "one of too many digits, at the top": (
        "qrels/test.tsv",
        "q1\ta\t1000000000\n",
        "test.tsv:1: relevance '1000000000'",
    ),
    "one of words, at the top": ("qrels/test.tsv", "q1\ta\tyes\n", "test.tsv:1: relevance 'yes'"),
    "one of unknown ids, at the top": ("qrels/test.tsv", "q9\tz\t0.5\n", "test.tsv:1: relevance '0.5'"),
    "two title lines": ("qrels/test.tsv", f"x y z\n{QRELS}", "test.tsv:2: relevance 'score'"),
    "no judgement": ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: holds no judgement"),
}


@pytest.mark.parametrize(("file", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_told_with_file_and_line(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)

    with pytest.raises(InputError) as caught:
        read_beir(folder)

    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_told_with_file_and_line(folder: Path) -> None:
    (folder / "qrels" / "test.tsv").write_bytes(b"q1\ta\t1\nq2\t\xff\t1\n")

    with pytest.raises(InputError, match=r"test.tsv:2: not UTF-8"):
        read_beir(folder)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "ends too early": lambda raw: raw[:-6],
    "no gzip": lambda raw: b"no gzip at all",
    "wrong sum": lambda raw: raw[:-8] + bytes(8),
    "wrong in the middle": lambda raw: raw[:10] + b"\xff" * 8 + raw[18:],
}


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_gz_file_is_told_with_file_and_line(
    folder: Path, file: str, damage: Callable[[bytes], bytes]
) -> None:
    packed = pack(folder / file)
    packed.write_bytes(damage(packed.read_bytes()))

    with pytest.raises(InputError, match=r"\.gz:\d+: damaged gzip file"):
        read_beir(folder)


def test_a_folder_without_the_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"corpus.jsonl"):
        read_beir(tmp_path)


# Runs


def test_a_run_is_ordered_by_score_and_equal_scores_keep_the_order_of_the_lines(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.trec"
    run.write_text("q1 Q0 b 1 2.0 x\nq1 Q0 a 2 2.0 x\nq1 Q0 c 3 7e1 x\nq3 Q0 a 1 1 x\nelsewhere Q0 z 1 1 x\n")

    assert read_run(run, read_beir(folder)) == {"q1": ["c", "b", "a"], "q2": []}, "q2 found nothing, q3 is not judged"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1 Q0 a 1 2.0\n", "run.trec:1: 5 columns, expected query Q0 passage rank score tag"),
        ("q1 Q0 a 1 2.0 x\nq1 Q0 z 1 2.0 x\n", "run.trec:2: passage 'z' is not in the corpus"),
        ("q1 Q0 a 1 2.0 x\nq1 Q0 a 2 1.0 x\n", "run.trec:2: passage 'a' is named twice for query 'q1'"),
        ("q1 Q0 a 1 high x\n", "run.trec:1: score 'high': expected a number"),
        ("q1 Q0 a 1 nan x\n", "run.trec:1: score 'nan': expected a number"),
        ("q9 Q0 a 1 1 x\n", "run.trec: names none of the 2 judged queries"),
    ],
)
def test_what_is_wrong_with_a_run_is_told(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    run = tmp_path / "run.trec"
    run.write_text(content)

    with pytest.raises(InputError) as caught:
        read_run(run, read_beir(folder))

    assert message in str(caught.value)


# Rerank sets


def test_a_rerank_set_gives_each_query_its_own_passages(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl.gz"
    records = [
        {"query": "x", "positive": ["one"], "negative": ["two", "three", "two", "one"]},
        {"query": "y", "positive": "two", "negative": []},
        {"query": "x", "positive": [], "negative": []},
    ]
    path.write_bytes(gzip.compress(jsonl(records).encode()))

    data = read_rerank_set(path)

    assert data.name == "own"
    assert data.queries == {"1": "x", "2": "y", "3": "x"}
    texts = {query: {data.passages[p]: r for p, r in judged.items()} for query, judged in data.qrels.items()}
    assert texts == {"1": {"one": 1, "two": 0, "three": 0}, "2": {"two": 1}, "3": {}}, "once each, positive if anywhere"
    assert data.pools is not None
    assert {query: set(pool) for query, pool in data.pools.items()} == {q: set(data.qrels[q]) for q in data.queries}
    assert data.queries_without_relevant == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "x", "positive": []}', 'own.jsonl:2: no "negative"'),
        ('{"query": "x", "positive": [1], "negative": []}', 'own.jsonl:2: "positive"[0] is a number'),
        ('{"query": ["x"], "positive": [], "negative": []}', 'own.jsonl:2: "query" is an array'),
        ("[]", "own.jsonl:2: expected an object"),
    ],
)
def test_what_is_wrong_with_a_rerank_set_is_told(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"query": "x", "positive": [], "negative": []}\n' + line)

    with pytest.raises(InputError) as caught:
        read_rerank_set(path)

    assert message in str(caught.value)


# Of no file


def test_a_sample_is_the_same_queries_every_time() -> None:
    data = standard_library_set()

    sample = data.sampled(20)

    assert sample == data.sampled(20)
    assert len(sample.queries) == len(sample.qrels) == 20
    assert list(sample.queries) != list(data.queries)[:20]
    assert sample.passages == data.passages
    assert data.sampled(None) is data.sampled(10**6) is data


def test_the_standard_library_has_one_relevant_passage_for_each_query() -> None:
    data = standard_library_set()

    assert len(data.queries) == len(data.passages) == len(data.qrels) > 1000
    assert data.qrels["q:textwrap.shorten"] == {"textwrap.shorten": 1}
    assert data.queries["q:textwrap.shorten"].startswith("Collapse and truncate")
    assert data.queries["q:textwrap.shorten"] not in data.passages["textwrap.shorten"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "corpus is missing"),
        ({"corpus": "c", "queries": "q"}, "qrels is missing"),
        ({"data": "d", "corpus": "c"}, "corpus='c': data='d' has them already"),
        ({"data": "d", "top_k": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**options)

"""Evaluation: measures are ir_measures' own, every special case is defined, and nothing is scored twice."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import AP, RR, Judged, R, Success, nDCG

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.evaluation import JudgedSet, bm25_run, encoder_run, evaluate
from bge_rerank_plugins.evaluation import report as report_module
from bge_rerank_plugins.evaluation.command import first_stage
from bge_rerank_plugins.evaluation.measures import (
    measure,
    p_value,
    parse_measures,
    recall_of_candidates,
    trec_scores,
)
from bge_rerank_plugins.evaluation.report import WIDTH, notes, plot, table
from bge_rerank_plugins.evaluation.settings import MEASURES, EvaluationSettings
from bge_rerank_plugins.jsonl import InputError
from bge_rerank_plugins.models import embedded_base

THREE = JudgedSet(
    name="three",
    queries={"q1": "one", "q2": "two", "q3": "three"},
    passages={"a": "A", "b": "B", "c": "C", "d": "D"},
    qrels={"q1": {"a": 1, "d": 0}, "q2": {"b": 2, "c": 1}, "q3": {"d": 1}},
)
FOUND = {"q1": ["b", "a", "c"], "q2": ["a", "c", "b"], "q3": []}
SECOND = 1 / math.log2(3)
"""What the second place is worth in nDCG; the third is worth a half."""


class Table:
    """A scorer that has a score for each text, and counts how many it was asked for."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        self.asked.append((query, tuple(passages)))
        return [self.scores[passage] for passage in passages]


def test_three_queries_by_hand() -> None:
    """Reranking puts a first for q1, and for q2 b first and a before c, which have equal scores."""
    report = evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1), "for a": Table(A=3, B=2, C=1)})

    before, table_, for_a = report.systems
    ideal = 2 + SECOND
    assert table_.run == {"q1": ["b", "a", "c"], "q2": ["b", "a", "c"], "q3": []}
    assert for_a.run == {"q1": ["a", "b", "c"], "q2": ["a", "b", "c"], "q3": []}
    assert before.quality.mean == pytest.approx(
        {
            "nDCG@10": (SECOND + (SECOND + 2 / 2) / ideal + 0) / 3,
            "RR@10": (1 / 2 + 1 / 2 + 0) / 3,
            "AP": (1 / 2 + (1 / 2 + 2 / 3) / 2 + 0) / 3,
            "R@10": 2 / 3,
            "Success@10": 2 / 3,
        }
    )
    assert table_.quality.mean == pytest.approx(
        {
            "nDCG@10": (SECOND + (2 + 1 / 2) / ideal + 0) / 3,
            "RR@10": (1 / 2 + 1 + 0) / 3,
            "AP": (1 / 2 + (1 + 2 / 3) / 2 + 0) / 3,
            "R@10": 2 / 3,
            "Success@10": 2 / 3,
        }
    )
    assert for_a.quality.per_query["RR@10"] == pytest.approx({"q1": 1, "q2": 1 / 2, "q3": 0})
    assert report.recall == pytest.approx(2 / 3)
    assert (table_.pairs, len(table_.seconds)) == (6, 2), "q3 has nothing to score"


@given(st.randoms(use_true_random=False))
def test_measures_equal_ir_measures_on_the_same_run(random) -> None:  # type: ignore[no-untyped-def]
    passages = [f"p{i}" for i in range(30)]
    queries = [f"q{i}" for i in range(8)]
    qrels = {query: {p: random.choice([0, 0, 1, 2]) for p in random.sample(passages, 6)} for query in queries}
    run = {query: random.sample(passages, random.choice([0, 1, 25])) for query in queries}
    data = JudgedSet("random", dict.fromkeys(queries, ""), dict.fromkeys(passages, ""), qrels)
    wanted = [nDCG @ 10, RR @ 10, AP, R @ 10, Success @ 10]

    found = measure(wanted, data, run)

    scores = [
        ir_measures.ScoredDoc(query, passage, -float(place))
        for query, passages in run.items()
        for place, passage in enumerate(passages)
    ]
    judged = [ir_measures.Qrel(query, p, r) for query, each in qrels.items() for p, r in each.items()]
    assert found.mean == pytest.approx(
        {str(m): v for m, v in ir_measures.calc_aggregate(wanted, judged, scores).items()}
    )
    for value in ir_measures.iter_calc(wanted, judged, scores):
        assert found.per_query[str(value.measure)][value.query_id] == pytest.approx(value.value)
    assert all(set(values) == set(queries) for values in found.per_query.values())


def test_every_judged_query_counts_even_without_results_or_anything_relevant() -> None:
    data = JudgedSet("two", {"q1": "", "q2": ""}, {"a": ""}, {"q1": {"a": 1}, "q2": {"a": 0}})

    assert measure([RR @ 10], data, {"q1": ["a"], "q2": ["a"]}).mean == {"RR@10": 0.5}
    assert measure([RR @ 10], data, {"q1": ["a"]}).mean == {"RR@10": 0.5}
    assert measure([RR @ 10], data, {"q1": [], "q2": []}).mean == {"RR@10": 0.0}


def test_a_query_that_has_negative_judgements_alone_counts_0(tmp_path: Path) -> None:
    """Where the best one is -2, pytrec_eval writes past its memory, and the process died."""
    qrels = {"q1": {"d": -2, "a": -3}, "q2": {"b": 2, "c": -2}, "q3": {"d": -1}}
    code = (
        "from bge_rerank_plugins.evaluation import JudgedSet\n"
        "from bge_rerank_plugins.evaluation.measures import measure, parse_measures\n"
        f"data = JudgedSet('d', dict.fromkeys({list(qrels)}, ''), dict.fromkeys('abcd', ''), {qrels})\n"
        "for _ in range(30):\n"
        f"    found = measure(parse_measures({list(MEASURES)}), data, {FOUND})\n"
        "print(sorted(found.per_query['RR@10'].items()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == str([("q1", 0.0), ("q2", 1 / 3), ("q3", 0.0)]), (ran.returncode, ran.stderr)


def test_no_scores_are_equal_so_that_no_tool_breaks_ties_in_its_own_way() -> None:
    assert trec_scores({"q": ["b", "a", "c"], "r": []}) == {"q": {"b": 3.0, "a": 2.0, "c": 1.0}, "r": {}}


def test_an_unknown_measure_is_named() -> None:
    assert [str(m) for m in parse_measures(["nDCG@5", "P@1"])] == ["nDCG@5", "P@1"]
    for wrong in ("beauty", "nDCG@@", "import os", "SDCG@10"):
        with pytest.raises(ValueError, match=f"measures='{wrong}': ir_measures does not know it"):
            parse_measures(["AP", wrong])


def test_measures_are_read_without_what_pythons_parser_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """ir_measures takes numbers for `ast.Num`, which Python warns of from 3.12 on and does not have from 3.14 on."""
    if sys.version_info < (3, 12):
        monkeypatch.delattr("ast.Num")
    assert parse_measures(MEASURES) == [nDCG @ 10, RR @ 10, AP, R @ 10, Success @ 10]


def test_nothing_is_judged_where_nothing_was_found() -> None:
    """ir_measures divides by the number of results."""
    assert measure([Judged @ 10], THREE, FOUND).mean == pytest.approx({"Judged@10": (1 / 3 + 2 / 3 + 0) / 3})
    assert measure([Judged @ 10, RR], THREE, {}).mean == {"Judged@10": 0.0, "RR": 0.0}


def test_a_measure_whose_program_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ir_measures.gdeval, "_is_available", None)  # which remembers
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ValueError, match="measures='ERR@10': nothing that ir_measures finds on this machine"):
        parse_measures(["AP", "ERR@10"])


@pytest.mark.skipif(shutil.which("perl") is None, reason="what computes ERR needs perl")
def test_a_measure_that_cannot_be_computed_is_named() -> None:
    """gdeval knows no query by a name."""
    with pytest.raises(ValueError, match="measures='AP,ERR@10': ir_measures cannot compute them"):
        measure(parse_measures(["AP", "ERR@10"]), THREE, FOUND)


# Significance


def test_significance_is_of_the_paired_differences() -> None:
    first = {str(i): i / 100 for i in range(100)}
    better = {query: value + 0.1 + int(query) % 3 / 100 for query, value in first.items()}
    noisy = {query: value + (0.1 if int(query) % 2 else -0.1) for query, value in first.items()}

    assert p_value(better, first) == p_value(first, better) < 0.001
    assert p_value(noisy, first) > 0.5
    assert p_value(first, first) == 1.0
    assert p_value({"q": 1.0}, {"q": 0.0}) == 1.0


def test_significance_by_hand() -> None:
    """Four differences, all +1: of the 16 ways to flip their signs, two are as extreme."""
    ones, zeros = dict.fromkeys("abcd", 1.0), dict.fromkeys("abcd", 0.0)

    assert p_value(ones, zeros) == pytest.approx(2 / 16)


# First stages


def test_bm25_leaves_out_what_shares_no_word_and_keeps_the_order_of_equal_passages() -> None:
    passages = {"x": "bamboo grass", "a": "red fox", "b": "bamboo grass", "c": "giant panda eats bamboo"}
    data = JudgedSet("d", {"q1": "bamboo", "q2": "zebra", "q3": "the", "c": "panda"}, passages, {})

    run = bm25_run(data, None)

    assert run["q1"][:2] == ["x", "b"]
    assert set(run["q1"]) == {"x", "b", "c"}
    assert (run["q2"], run["q3"]) == ([], [])
    assert bm25_run(data, 1) == {"q1": ["x"], "q2": [], "q3": [], "c": ["c"]}
    assert bm25_run(data, 1, ignore_identical_ids=True)["c"] == []


def test_where_a_querys_own_passage_is_left_out_the_next_one_takes_its_place() -> None:
    data = JudgedSet("d", {"a": "panda bamboo"}, {"a": "panda bamboo", "b": "a panda", "c": "a stone"}, {})

    assert bm25_run(data, 1, ignore_identical_ids=True) == {"a": ["b"]}
    assert encoder_run(data, str(embedded_base()), 1, ignore_identical_ids=True) == {"a": ["b"]}


def test_bm25_finds_nothing_where_there_are_no_words() -> None:
    data = JudgedSet("d", {"q": "?"}, {"a": "!", "b": "..."}, {})

    assert bm25_run(data, 10) == {"q": []}
    pool = replace(data, pools={"q": ["b", "a"]})
    assert {*bm25_run(pool, 10)["q"]} == {"a", "b"}, "each query has its own texts to rank"


def test_a_pool_is_ranked_whole_and_gains_nothing_from_the_order_of_the_file() -> None:
    """Positives stand first in a rerank set: a first stage that says nothing must not profit from it."""
    texts = {f"p{i}": f"text {i}" for i in range(40)}
    pools = {"q": list(texts)}
    data = JudgedSet("d", {"q": "zebra"}, texts, {"q": {"p0": 1}}, pools)
    turned = JudgedSet("d", {"q": "zebra"}, texts, {"q": {"p0": 1}}, {"q": list(texts)[::-1]})

    run = bm25_run(data, None)

    assert set(run["q"]) == set(texts)
    assert run == bm25_run(turned, None)
    assert run["q"] not in (list(texts), list(texts)[::-1])


def test_an_encoder_finds_by_meaning() -> None:
    passages = {"a": "How to cook rice", "b": "The giant panda eats bamboo", "c": "A train to Berlin"}
    data = JudgedSet("d", {"q": "food of bears in China", "c": "railway"}, passages, {})

    run = encoder_run(data, str(embedded_base()), 2)

    assert run["q"][0] == "b"
    assert run["c"][0] == "c"
    assert all(len(found) == 2 for found in run.values())
    assert "c" not in encoder_run(data, str(embedded_base()), 2, ignore_identical_ids=True)["c"]
    assert len(encoder_run(data, str(embedded_base()), None, prompt="query: ")["q"]) == 3


@pytest.mark.parametrize("device", ["meta", ["meta", "cpu"]])
def test_an_encoder_runs_on_the_first_device_that_is_named(device: str | list[str]) -> None:
    """On torch's "meta", where nothing can be computed: it ran where sentence-transformers liked."""
    settings = RerankSettings(model="m").model_copy(update={"device": device})

    with pytest.raises(RuntimeError, match="meta"):
        first_stage(THREE, EvaluationSettings(data="d", first_stage=str(embedded_base())), settings)


# What is kept


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    first, second = Table(A=1, B=3, C=1), Table(A=1, B=3, C=1)

    before = evaluate(THREE, FOUND, {"table": first}, output=tmp_path)
    after = evaluate(THREE, FOUND, {"table": second}, output=tmp_path)

    assert len(first.asked) == 3, "one to warm up, two queries"
    assert second.asked == []
    assert after == before, "the times too"


def test_scores_of_other_candidates_or_another_system_are_not_taken(tmp_path: Path) -> None:
    evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)
    other, fewer = Table(A=1, B=3, C=1), Table(A=1, B=3, C=1)

    evaluate(THREE, FOUND, {"other": other}, output=tmp_path)
    evaluate(THREE, {**FOUND, "q1": ["b", "a"]}, {"table": fewer}, output=tmp_path)

    assert len(other.asked) == 3
    assert [passages for _, passages in fewer.asked] == [("B",), ("B", "A")]


def test_settings_and_weights_tell_one_scorer_from_another(tmp_path: Path) -> None:
    with Scorer(str(DATA / "encoder")) as plain, Scorer(str(DATA / "encoder"), max_length=8) as short:
        for scorer in (plain, short, plain):
            evaluate(THREE, FOUND, {"same name": scorer}, output=tmp_path)

    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4


class Reversed(Scorer):
    """One that scores as it likes."""

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        return [-score for score in super().score(query, passages)]


@pytest.mark.parametrize("names", [("plain", "reversed"), ("reversed", "plain")])
@pytest.mark.parametrize("written", [False, True], ids=["", "written"])
def test_a_subclass_does_not_get_the_scores_of_its_parent(
    names: tuple[str, str], written: bool, tmp_path: Path
) -> None:
    """Both had the same options, and the one that came second was not asked."""
    model, output = str(DATA / "encoder"), tmp_path if written else None
    with Scorer(model) as plain, Reversed(model) as reversed_:
        scorers = {"plain": plain, "reversed": reversed_}
        report = evaluate(THREE, FOUND, [(name, scorers[name]) for name in names], output=output)
    runs = {system.name: system.run for system in report.systems}
    assert runs["reversed"] == {query: found[::-1] for query, found in runs["plain"].items()}


# What is given by hand


def test_what_belongs_to_other_queries_is_left_out() -> None:
    """The first stage was measured on all that is judged, and rerankers on the queries that there are."""
    few = replace(THREE, queries={"q2": "Q2"})
    report = evaluate(few, FOUND, {"table": Table(A=3, B=2, C=1)}, measures="nDCG@10")

    alone = evaluate(
        replace(few, qrels={"q2": THREE.qrels["q2"]}), {"q2": FOUND["q2"]}, {"table": Table(A=3, B=2, C=1)}
    )
    for system, expected in zip(report.systems, alone.systems, strict=True):
        assert system.run == expected.run
        assert system.quality.mean["nDCG@10"] == expected.quality.mean["nDCG@10"]
        assert system.quality.per_query["nDCG@10"].keys() == {"q2"}
    assert report.systems[1].p_value == 1.0
    assert report.recall == alone.recall == 1.0
    assert report.measures == ("nDCG@10",)


def test_numbers_and_lists_may_be_numpys(tmp_path: Path) -> None:
    qrels = {
        query: {passage: np.int64(value) for passage, value in judged.items()} for query, judged in THREE.qrels.items()
    }
    found: Any = {query: np.array(passages) for query, passages in FOUND.items()}

    report = evaluate(replace(THREE, qrels=qrels), found, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)
    assert report.systems == evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path).systems


@pytest.mark.parametrize(
    ("data", "found", "message"),
    [
        (replace(THREE, queries={}), FOUND, "there is no query"),
        (THREE, {"q1": {"a": 0.1, "b": 0.9}}, "candidates: {'a': 0.1, 'b': 0.9} for query 'q1': expected a list"),
        (THREE, {"q1": [["a", 2.0]]}, r"candidates: \[\['a', 2.0\]\] for query 'q1': expected ids, each a string"),
        (THREE, {"q1": {"a"}}, "candidates: {'a'} for query 'q1': expected a list"),
        (THREE, {"q1": "ab"}, "candidates: 'ab' for query 'q1': expected a list"),
        (THREE, {"q1": None}, "candidates: None for query 'q1': expected a list"),
        (replace(THREE, queries={1: "Q1"}), FOUND, "queries: the id 1: expected a string"),  # type: ignore[dict-item]
        (replace(THREE, qrels={**THREE.qrels, "q1": ["a"]}), FOUND, r"qrels: \['a'\] for query 'q1': expected the"),  # type: ignore[dict-item]
        (replace(THREE, qrels={**THREE.qrels, "q1": {1: 1}}), FOUND, "qrels: the id of passage 1 for query 'q1'"),  # type: ignore[dict-item]
        (
            replace(THREE, qrels={**THREE.qrels, "q1": {"a": 2**31}}),
            FOUND,
            "qrels: relevance 2147483648 of passage 'a' for query 'q1': expected a whole number up to 999999999",
        ),
        (THREE, {"q1": ["a", "nope"]}, "candidates: passage 'nope' of query 'q1' is not among the passages"),
        (THREE, {"q1": ["a", "b", "a"]}, "candidates: passage 'a' is named twice for query 'q1'"),
        (replace(THREE, queries={"q9": "Q9"}), FOUND, "qrels: query 'q9' is not judged"),
        (
            replace(THREE, qrels={**THREE.qrels, "q1": {"a": 0.5}}),  # type: ignore[dict-item]
            FOUND,
            "qrels: relevance 0.5 of passage 'a' for query 'q1': expected a whole number",
        ),
    ],
)
def test_what_is_wrong_with_what_was_given_is_named(data: JudgedSet, found: Any, message: str) -> None:
    table = Table(A=1, B=3, C=1)
    with pytest.raises(InputError, match=message):
        evaluate(data, found, {"table": table})
    assert table.asked == []


class Broken:
    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        raise KeyError("x")


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ({1: Table(A=1)}, "scorers: the name=1: expected a string"),
        ({"a\ud800": Table(A=1)}, "scorers: the name='a.ud800': not valid Unicode"),
        ({"a\tb": Table(A=1)}, r"scorers: the name 'a.tb': a table of results holds no tab"),
        ({"none": object()}, r"scorers: 'none' is <object .*, which has no method score"),
        ({"broken": Broken()}, r"broken, query 'q1': KeyError\('x'\)"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_named(scorers: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(THREE, FOUND, scorers, output=tmp_path)


def test_at_least_one_measure_is_asked_for() -> None:
    with pytest.raises(InputError, match="measures: name at least one"):
        evaluate(THREE, FOUND, {}, measures=[])


@pytest.mark.parametrize(
    ("pools", "top_k", "message"),
    [
        ({"q1": ["a"]}, None, "pools: query 'q2' has none"),
        ({"q1": "a"}, None, "pools: query 'q1' has none, or no list"),
        ({"q1": ["a"], "q2": ["z"], "q3": []}, None, "pools: passage 'z' of query 'q2' is not among the passages"),
        (None, 0, "top_k=0: take at least 1"),
        (None, -1, "top_k=-1: take at least 1"),
    ],
)
def test_what_no_first_stage_can_be_made_of_is_named(pools: Any, top_k: int | None, message: str) -> None:
    data = replace(THREE, pools=pools)
    for first in (bm25_run, lambda data, top_k: encoder_run(data, str(embedded_base()), top_k)):
        with pytest.raises(ValueError, match=message):
            first(data, top_k)
    with pytest.raises(ValueError, match="count=0: take at least 1"):
        data.sampled(0)


def test_more_than_a_million_candidates_have_different_scores_in_a_run(tmp_path: Path) -> None:
    passages = {f"p{number}": "" for number in range(1_000_002)}
    data = JudgedSet("many", {"q1": "Q1"}, passages, {"q1": {"p0": 1}})
    evaluate(data, {"q1": list(passages)}, {}, measures="RR@10", output=tmp_path)
    with (tmp_path / "runs" / "first-stage.trec").open() as file:
        scores = [line.split()[4] for line, _ in zip(file, range(3), strict=False)]
    assert scores == ["1000002", "1000001", "1000000"]


# What is kept, by its files


def test_another_vocabulary_is_another_scorer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DATA / "encoder", model)
    for words in ("one", "one\ntwo"):
        (model / "vocab.txt").write_text(words)
        with Scorer(str(model)) as scorer:
            evaluate(THREE, FOUND, {"same name": scorer}, output=tmp_path / "out")

    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("torn", [b'{"key": "12', b'{"key": "1", "scores": [1.0], "seconds": 1}'])
def test_a_torn_last_line_is_dropped_and_scored_again(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "scores.jsonl"
    whole = evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + torn)
    table_ = Table(A=1, B=3, C=1)

    again = evaluate(THREE, FOUND, {"table": table_}, output=tmp_path)

    assert [query for query, _ in table_.asked] == ["two", "two"], "one to warm up"
    assert [json.loads(line)["query"] for line in file.read_bytes().splitlines()] == ["q1", "q2"]
    assert again.systems[1].quality == whole.systems[1].quality


def test_a_bad_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_bytes(b'{"key": "1", "scores": 7, "seconds": 1}\n{"key')
    content = file.read_bytes()

    with pytest.raises(InputError, match=r'scores.jsonl:1: "scores" is a number'):
        evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)

    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_results_of_other_data_are_not_overwritten(tmp_path: Path) -> None:
    evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = JudgedSet("three", THREE.queries, THREE.passages, {**THREE.qrels, "q3": {"d": 0}})

    with pytest.raises(InputError, match=r"results.json: the results of other data, which would be lost"):
        evaluate(other, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"results.json: not the results of an evaluation"):
        evaluate(THREE, FOUND, {"table": Table(A=1, B=3, C=1)}, output=tmp_path)


def test_the_files_agree_with_the_report(tmp_path: Path) -> None:
    report = evaluate(THREE, FOUND, {"the table": Table(A=1, B=3, C=1)}, output=tmp_path)

    rows = [line.split("\t") for line in (tmp_path / "per_query.tsv").read_text().splitlines()]
    assert rows[0] == ["query", "system", "nDCG@10", "RR@10", "AP", "R@10", "Success@10"]
    assert rows[1:4] == [
        ["q1", "first stage", f"{SECOND:.6g}", "0.5", "0.5", "1", "1"],
        rows[2],
        ["q3", "first stage", "0", "0", "0", "0", "0"],
    ]
    assert len(rows) == 7
    written = list(ir_measures.read_trec_run(str(tmp_path / "runs" / "the-table.trec")))
    qrels = {query: dict(judged) for query, judged in THREE.qrels.items()}
    assert ir_measures.calc_aggregate([AP, nDCG @ 10], qrels, written) == pytest.approx(
        {AP: report.systems[1].quality.mean["AP"], nDCG @ 10: report.systems[1].quality.mean["nDCG@10"]}
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [system["measures"] for system in results["systems"]] == [dict(s.quality.mean) for s in report.systems]
    assert results["systems"][1]["pairs"] == 6


def test_names_that_differ_in_what_a_file_name_cannot_hold_get_a_file_each(tmp_path: Path) -> None:
    evaluate(THREE, FOUND, {"a/b": Table(A=1, B=3, C=1), "A-b": Table(A=3, B=2, C=1)}, output=tmp_path)

    firsts = {path.name: path.read_text().split()[2] for path in (tmp_path / "runs").iterdir()}
    assert firsts == {"first-stage.trec": "b", "a-b.trec": "b", "A-b-2.trec": "a"}


def test_long_names_make_names_of_files_that_a_system_takes(tmp_path: Path) -> None:
    """The table was lost when all had been scored, and again at every retry."""
    names = ["模" * 114 + "/model", "型" * 114 + "/model"]
    evaluate(THREE, FOUND, {name: Table(A=1, B=3, C=1) for name in names}, output=tmp_path)
    runs = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(runs) == 3
    assert sum(name.endswith("-model.trec") for name in runs) == 2


def test_a_name_that_is_given_twice_is_refused() -> None:
    """The second scorer was given the scores of the first."""
    with pytest.raises(InputError, match="'table' is named twice"):
        evaluate(THREE, FOUND, [("table", Table(A=1, B=3, C=1)), ("table", Table(A=3, B=2, C=1))])


@pytest.mark.parametrize("place", ["query", "passage"])
def test_an_id_that_no_trec_run_can_hold_is_refused_where_one_is_written(place: str, tmp_path: Path) -> None:
    query, passage = ("q 1", "a") if place == "query" else ("q", "a b")
    data = JudgedSet("d", {query: "one"}, {passage: "A"}, {query: {passage: 1}})
    table_ = Table(A=1)

    assert evaluate(data, {query: [passage]}, {"table": Table(A=1)}).recall == 1
    with pytest.raises(
        InputError, match=f"holds no id that is empty or has blanks: '{passage if place == 'passage' else query}'"
    ):
        evaluate(data, {query: [passage]}, {"table": table_}, output=tmp_path / "out")

    assert table_.asked == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "returned 1 scores for 3"),
        ([1.0, math.nan, 1.0], "score of passage 1 is nan"),
        ("xyz", "returned .xyz.: expected a list of numbers"),
    ],
)
def test_a_scorer_that_fails_is_named_with_its_query(scores: Sequence[float], message: str) -> None:
    class Wrong:
        def score(self, query: str, passages: Sequence[str]) -> Sequence[float]:
            return scores

    with pytest.raises(InputError, match=f"wrong, query 'q1': .*{message}"):
        evaluate(THREE, FOUND, {"wrong": Wrong()})


# What is shown


def test_the_table_fits_80_columns_and_says_what_is_unsure() -> None:
    long = "BAAI/bge-reranker-v2-minicpm-layerwise@28"
    report = evaluate(THREE, FOUND, {long: Table(A=1, B=3, C=1), "b": Table(A=3, B=2, C=1)}, first_stage="BM25")

    titles, rows = table(report)

    assert titles == ("", "nDCG@10", "MRR@10", "MAP", "R@10", "hit@10", "p", "ms", "pairs/s")
    assert rows[0] == ("BM25", "0.417", "0.333", "0.361", "0.667", "0.667", "", "", "")
    assert rows[1][0].endswith("layerwise@28")
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= WIDTH
    shown = notes(report)
    assert shown[0] == "The candidates hold 66.7% of the relevant passages; reranking cannot find more."
    assert f"b against {long}: -0." in " ".join(shown) or f"{long} against b: -0." in " ".join(shown)
    assert max(map(len, shown)) <= WIDTH


def test_queries_without_a_relevant_passage_take_nothing_from_what_the_candidates_hold() -> None:
    """They counted as if their passages had not been found: 66.7% where all were."""
    data = replace(THREE, qrels={"q1": {"a": 1}, "q2": {"b": 2, "c": 1}, "q3": {"d": 0}})

    shown = notes(evaluate(data, FOUND, {}))

    assert shown[0] == "The candidates hold 100.0% of the relevant passages; reranking cannot find more."
    assert "1 of the queries have no relevant passage and count 0." in shown
    assert recall_of_candidates(replace(data, qrels={query: {"d": 0} for query in FOUND}), FOUND) == 1, "none is missed"


def test_the_plot_is_a_picture_even_where_nothing_was_timed(tmp_path: Path) -> None:
    for number, scorers in enumerate(({}, {"table": Table(A=1, B=3, C=1)})):
        plot(evaluate(THREE, FOUND, scorers), tmp_path / f"{number}.png")

        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_names_stand_in_the_plot_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two dollar signs a name was a formula, or none that could be drawn."""
    drawn: list[Any] = []
    monkeypatch.setattr(report_module, "save_picture", lambda figure, path: drawn.append(figure))
    name = "a$b_{$"
    report = evaluate(replace(THREE, name=name), FOUND, {name + "2": Table(A=1, B=3, C=1)}, first_stage=name)
    timed = [replace(system, seconds=(0.001,)) for system in report.systems]

    plot(replace(report, systems=tuple(timed)), tmp_path / "plot.png")

    (axes,) = drawn[0].axes
    for text in (axes.title, *axes.texts, *axes.get_legend().get_texts()):
        assert text._preprocess_math(text.get_text())[0].startswith(name)


def test_labels_in_the_plot_lie_neither_on_points_nor_on_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"length 112": 7.0, "length 112, fast": 6.0, "length 112, float32": 7.0}
    report = evaluate(THREE, FOUND, {name: Table(A=1, B=3, C=1) for name in times})
    alike = [replace(system, seconds=(times[system.name] / 1000,)) for system in report.systems[1:]]
    drawn: list[Any] = []
    monkeypatch.setattr(report_module, "save_picture", lambda figure, path: drawn.append(figure))

    plot(replace(report, systems=(report.systems[0], *alike)), tmp_path / "plot.png")

    (axes,) = drawn[0].axes
    labels = [label.get_window_extent() for label in axes.texts]
    assert [label.get_text() for label in axes.texts] == list(times)
    assert not [pair for pair in combinations(labels, 2) if pair[0].overlaps(pair[1])]
    points = [axes.transData.transform(label.xy) for label in axes.texts]
    assert not [label for label in labels for point in points if label.contains(*point)]

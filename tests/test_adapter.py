import asyncio
import copy
import itertools
import math
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import PydanticDeprecatedSince20

from bge_rerank_plugins import Scorer, langchain, llama_index
from bge_rerank_plugins.adapter import AdapterSettings
from bge_rerank_plugins.core.engine import Engine

MODEL = str(Path(__file__).parent / "data" / "encoder")
PASSAGES = ["hi", "Pandas eat bamboo.", "The giant panda is a bear.", "datetime.strptime parses a string."]
QUERY = "what is panda?"

ADAPTERS = pytest.mark.parametrize("adapter", [langchain.BGERerank, llama_index.BGERerank], ids=["langchain", "llama"])


@pytest.fixture(scope="module", autouse=True)
def reference():
    """A scorer that keeps the model loaded while these tests run."""
    with Scorer(MODEL) as scorer:
        scorer.warmup()
        yield scorer


class NumberScorer:
    """The passages are numbers, and are their own scores."""

    def score(self, query, passages):
        return [float(passage) for passage in passages]


class Returning:
    """A scorer that returns what it is told to."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, query, passages):
        return self.scores


def reranked(adapter, passages, query=QUERY):
    """Index and score of what an adapter of either framework returns."""
    if isinstance(adapter, langchain.BGERerank):
        documents = [Document(text, metadata={"index": i}) for i, text in enumerate(passages)]
        found = adapter.compress_documents(documents, query)
        return [(document.metadata["index"], document.metadata["relevance_score"]) for document in found]
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0.5) for i, text in enumerate(passages)]
    return [(int(node.node_id), node.score) for node in adapter.postprocess_nodes(nodes, query_str=query)]


def scores_in_order(adapter, query=QUERY):
    return [score for _, score in sorted(reranked(adapter, PASSAGES, query))]


def workers():
    """The engines' worker threads: one for each model that is loaded."""
    return {thread for thread in threading.enumerate() if thread.name == "bge-rerank-device"}


@ADAPTERS
@given(
    scores=st.lists(st.sampled_from([-3.5, -1.0, 0.0, 0.25, 2.0]) | st.floats(-1e6, 1e6), max_size=12),
    top_n=st.none() | st.integers(0, 14),
    threshold=st.none() | st.sampled_from([-1.0, 0.0, 2.0]),
)
def test_ranking_is_the_input_reordered_and_cut_by_threshold_then_top_n(adapter, scores, top_n, threshold):
    ranked = reranked(
        adapter(scorer=NumberScorer(), top_n=top_n, score_threshold=threshold), [repr(score) for score in scores]
    )
    indices = [index for index, _ in ranked]
    assert [scores[index] for index in indices] == [score for _, score in ranked], "each keeps its own score"
    assert len(set(indices)) == len(indices), "none twice"
    assert all(a > b or (a == b and i < j) for (i, a), (j, b) in itertools.pairwise(ranked)), "ties stable"
    passing = [i for i, score in enumerate(scores) if threshold is None or score >= threshold]
    assert len(indices) == min(len(passing), len(passing) if top_n is None else top_n)
    assert set(indices) <= set(passing)
    left_out = [scores[i] for i in passing if i not in indices]
    assert not ranked or not left_out or max(left_out) <= ranked[-1][1], "nothing better was left out"


@ADAPTERS
def test_scores_are_the_scorers(adapter, reference):
    assert scores_in_order(adapter(model=MODEL, top_n=None)) == pytest.approx(
        reference.score(QUERY, PASSAGES), abs=1e-5
    )


@ADAPTERS
def test_a_sooner_threshold_leaves_room_for_what_passes_it(adapter):
    assert reranked(adapter(scorer=NumberScorer(), top_n=2, score_threshold=1), ["0", "3", "1", "2"]) == [
        (1, 3),
        (3, 2),
    ]


@ADAPTERS
@pytest.mark.parametrize("top_n", [-1, True, 2.5, "3"])
def test_impossible_top_n_is_refused_at_construction_and_assignment(adapter, top_n):
    """Validating the whole after an assignment left the refused value in place, and every later assignment failed."""
    with pytest.raises(ValueError, match=f"top_n={top_n!r}"):
        adapter(model=MODEL, top_n=top_n)
    reranker = adapter(model=MODEL, top_n=1)
    with pytest.raises(ValueError, match=f"top_n={top_n!r}"):
        reranker.top_n = top_n
    assert reranker.top_n == 1
    reranker.normalize = True


@ADAPTERS
@pytest.mark.parametrize("threshold", [math.nan, True, "high"])
def test_impossible_threshold_is_refused_at_construction_and_assignment(adapter, threshold):
    with pytest.raises(ValueError, match=f"score_threshold={threshold!r}"):
        adapter(model=MODEL, score_threshold=threshold)
    reranker = adapter(model=MODEL, score_threshold=0.5)
    with pytest.raises(ValueError, match=f"score_threshold={threshold!r}"):
        reranker.score_threshold = threshold
    assert reranker.score_threshold == 0.5


@ADAPTERS
def test_a_top_n_that_came_past_validation_is_refused_at_the_call(adapter):
    reranker = adapter(model=MODEL).model_copy(update={"top_n": -2})
    with pytest.raises(ValueError, match="top_n=-2"):
        reranked(reranker, PASSAGES)


@ADAPTERS
def test_unknown_options_are_refused(adapter):
    with pytest.raises(ValueError, match="topn"):
        adapter(model=MODEL, topn=3)


@ADAPTERS
def test_model_or_scorer_is_required(adapter):
    with pytest.raises(ValueError, match="name a model, or give a scorer"):
        adapter()
    with pytest.raises(ValueError, match="name a model, or give a scorer"):
        adapter(model="")
    by_model, by_scorer = adapter(model=MODEL), adapter(scorer=NumberScorer())
    with pytest.raises(ValueError, match="name a model, or give a scorer"):
        by_model.model = ""
    with pytest.raises(ValueError, match="name a model, or give a scorer"):
        by_scorer.scorer = None
    assert by_model.model == MODEL
    assert isinstance(by_scorer.scorer, NumberScorer)


@ADAPTERS
@pytest.mark.parametrize("scorer", ["a name", object(), NumberScorer])
def test_a_scorer_that_cannot_score_is_refused(adapter, scorer):
    with pytest.raises(ValueError, match=r"expected an object with a method score\(query, passages\)"):
        adapter(scorer=scorer)


@ADAPTERS
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "1 scores for 4 passages"),
        ([1.0, math.nan, 2.0, 3.0], "score of passage 1 is nan"),
        ([1.0, 2.0, math.inf, 3.0], "score of passage 2 is inf"),
        (None, "returned None: expected a list of numbers"),
    ],
)
def test_wrong_scores_of_a_foreign_scorer_are_an_error(adapter, scores, message):
    """Fewer scores than passages would silently lose passages; NaN sorts anywhere."""
    with pytest.raises(ValueError, match=message):
        reranked(adapter(scorer=Returning(scores)), PASSAGES)


@ADAPTERS
@pytest.mark.parametrize("query", [None, 3, b"panda"])
@pytest.mark.parametrize("passages", [PASSAGES, []], ids=["passages", "empty"])
def test_a_query_that_is_not_a_string_is_an_error_even_with_nothing_to_rank(adapter, query, passages):
    reranker = adapter(scorer=NumberScorer())
    with pytest.raises(ValueError, match="query"):
        reranked(reranker, passages, query)


@ADAPTERS
@pytest.mark.parametrize("options", [{"model": "no/such-model"}, {"scorer": Returning(None)}], ids=["model", "scorer"])
def test_nothing_to_return_needs_no_scoring(adapter, options):
    assert reranked(adapter(**options), []) == []
    assert reranked(adapter(**options, top_n=0), PASSAGES) == []


@ADAPTERS
def test_settings_assigned_after_use_take_effect(adapter, reference):
    reranker = adapter(model=MODEL, top_n=None)
    raw = scores_in_order(reranker)
    reranker.normalize = True
    assert scores_in_order(reranker) == pytest.approx([1 / (1 + math.exp(-score)) for score in raw], abs=1e-6)
    reranker.scorer = Returning([1, 2, 3, 4])
    assert scores_in_order(reranker) == [1, 2, 3, 4]
    reranker.scorer, reranker.normalize = None, False
    assert scores_in_order(reranker) == pytest.approx(raw, abs=1e-6)
    reranker.query_instruction = "Represent this sentence: "
    instructed = reference.score("Represent this sentence: " + QUERY, PASSAGES)
    assert scores_in_order(reranker) == pytest.approx(instructed, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(raw, instructed, strict=True)) > 1e-3


@ADAPTERS
def test_the_model_is_loaded_once_for_all_calls(adapter):
    before = workers()
    reranker = adapter(model=MODEL, max_length=55)
    reranked(reranker, PASSAGES)
    loaded = workers() - before
    reranked(reranker, PASSAGES, "another query")
    assert workers() - before == loaded
    assert len(loaded) == 1
    reranker.close()


def test_adapters_with_equal_settings_share_one_loaded_model_until_the_last_is_closed():
    before = workers()
    options = {"model": MODEL, "max_length": 77}
    first, second = langchain.BGERerank(**options, top_n=4), llama_index.BGERerank(**options, top_n=4)
    scores = scores_in_order(first)
    assert scores_in_order(second) == scores
    assert len(workers() - before) == 1
    first.close()
    first.close()
    assert scores_in_order(second) == scores
    second.close()
    assert not workers() - before
    assert scores_in_order(first) == scores, "a closed adapter loads again"
    first.close()


@ADAPTERS
def test_closing_leaves_a_given_scorer_open(adapter):
    with Scorer(MODEL) as scorer:
        reranker = adapter(scorer=scorer)
        reranked(reranker, PASSAGES)
        reranker.close()
        assert reranked(reranker, PASSAGES)


@ADAPTERS
def test_closing_a_copy_leaves_the_original_open(adapter):
    """pydantic's shallow copy shares private attributes: closing the copy closed the original's scorer."""
    reranker = adapter(model=MODEL, top_n=None)
    scores = scores_in_order(reranker)
    for copied in (copy.copy(reranker), reranker.model_copy(update={"top_n": 4}), copy.deepcopy(reranker)):
        assert scores_in_order(copied) == scores
        copied.close()
        assert scores_in_order(reranker) == scores


@ADAPTERS
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda reranker: reranker.model_copy(update={"top_n": 1})]
)
def test_copies_made_for_each_request_load_the_model_once(adapter, copied, monkeypatch):
    """A copy was the only one to hold the model while its original had not been used: it was loaded for every request."""
    loads, start = [], Engine.__init__

    def counted(self, settings):
        loads.append(settings)
        start(self, settings)

    monkeypatch.setattr(Engine, "__init__", counted)
    base = adapter(model=MODEL, max_batch_tokens=777)
    for _ in range(3):
        assert reranked(copied(base), PASSAGES)
    assert len(loads) == 1
    assert reranked(base, PASSAGES)
    base.close()
    assert len(loads) == 1


@ADAPTERS
def test_a_copy_in_pydantics_old_way_shares_the_model_too(adapter):
    """Its hold was the original's own: other options loaded the model at every call, and closing the copy closed the original."""
    base = adapter(model=MODEL, top_n=None, max_batch_tokens=779)
    with pytest.warns(PydanticDeprecatedSince20):
        other = base.copy(update={"top_n": 2})
    before = scores_in_order(base)
    assert len(reranked(other, PASSAGES)) == 2
    scorers = [each._active_scorer() for each in (base, other, base, other)]
    assert scorers[:2] == scorers[2:]
    other.close()
    assert base._active_scorer() is scorers[0]
    assert scores_in_order(base) == before
    base.close()


@ADAPTERS
def test_a_copy_whose_options_were_never_checked_keeps_its_scorer(adapter, tmp_path, monkeypatch):
    """A relative directory is never equal to what a scorer made of it: there was a new one at every call."""
    shutil.copytree(MODEL, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    copied = adapter(model=MODEL).model_copy(update={"model": "model"})
    assert copied._active_scorer() is copied._active_scorer()
    other = copied.model_copy(update={"normalize": True})
    assert other._active_scorer() is not copied._active_scorer()


@ADAPTERS
def test_options_that_a_given_scorer_does_not_heed_are_named(adapter, caplog):
    reranker = adapter(scorer=NumberScorer(), model="name", top_n=2, score_threshold=0.0)
    assert not caplog.records
    adapter(scorer=NumberScorer(), normalize=True, max_length=64)
    assert [record.getMessage() for record in caplog.records] == [
        "max_length, normalize: for a local model alone, and not used where a scorer is given"
    ]
    caplog.clear()
    reranker.cutoff_layer = 8
    reranker.cutoff_layer = None
    reranker.top_n = 1
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["cutoff_layer"]


@ADAPTERS
def test_the_last_of_copies_to_close_frees_the_model(adapter):
    before = workers()
    base = adapter(model=MODEL, max_batch_tokens=778)
    copies = [copy.copy(base), copy.deepcopy(base)]
    reranked(copies[0], PASSAGES)
    for closed in (copies[0], base):
        closed.close()
        assert len(workers() - before) == 1
    copies[1].close()
    assert workers() == before


@ADAPTERS
def test_a_copy_with_other_options_goes_its_own_way(adapter, reference):
    base = adapter(model=MODEL, top_n=None)
    other = base.model_copy(update={"normalize": True})
    raw = scores_in_order(base)
    assert scores_in_order(other) == pytest.approx([1 / (1 + math.exp(-score)) for score in raw])
    other.close()
    assert scores_in_order(base) == raw == pytest.approx(reference.score(QUERY, PASSAGES), abs=1e-5)


@ADAPTERS
def test_what_an_adapter_has_loaded_is_no_part_of_what_it_is(adapter):
    reranker = adapter(model=MODEL)
    loaded = pickle.loads(pickle.dumps(reranker))
    reranked(reranker, PASSAGES)
    if adapter is langchain.BGERerank:  # LlamaIndex' callback managers are compared by identity
        assert reranker == loaded == copy.copy(reranker) == adapter(model=MODEL)
    assert reranker._hold == loaded._hold
    assert reranker != adapter(model=MODEL, max_length=9)


@ADAPTERS
def test_a_model_that_cannot_be_loaded_fails_at_warmup(adapter, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        adapter(model=str(tmp_path / "nowhere"), local_files_only=True).warmup()
    adapter(scorer=NumberScorer()).warmup()
    before = workers()
    reranker = adapter(model=MODEL, max_batch_tokens=779)
    reranker.warmup()
    assert len(workers() - before) == 1
    reranker.close()


@ADAPTERS
def test_an_infinite_threshold_outlives_json(adapter):
    """It became null, which is no threshold at all."""
    reranker = adapter(model=MODEL, score_threshold=math.inf)
    assert adapter.model_validate_json(reranker.model_dump_json()).score_threshold == math.inf


@ADAPTERS
def test_numbers_of_numpy_are_numbers(adapter):
    reranker = adapter(scorer=NumberScorer(), top_n=np.int64(1), score_threshold=np.float32(0.5))
    assert reranked(reranker, ["0", "3", "1"]) == [(1, 3)]
    assert (type(reranker.top_n), type(reranker.score_threshold)) == (int, float)


@ADAPTERS
@pytest.mark.parametrize(
    "scores", [{0: 1.0, 1: 2.0}, {1.0, 2.0}, "12", b"12", [10**400, 1], ["x", 1], [[1, 2], [3, 4]]]
)
def test_what_is_no_list_of_numbers_is_refused(adapter, scores):
    """Keys of a dictionary were taken for scores, and so were the digits of a string, and a set, which has no order."""
    with pytest.raises(ValueError, match="expected a list of numbers"):
        reranked(adapter(scorer=Returning(scores)), ["a", "b"])


@pytest.mark.parametrize("batch", [None, 5, [[1.0]], [[1.0], [2.0], [3.0]], {0: [1.0], 1: [2.0]}])
def test_a_batch_of_a_foreign_scorer_has_a_list_for_each_request(batch):
    class Batching(NumberScorer):
        def score_batch(self, requests):
            return batch

    documents = [Document("1")]
    with pytest.raises(ValueError, match=r"the scorer returned .*: expected 2 lists of scores"):
        langchain.BGERerank(scorer=Batching()).compress_documents_batch([(documents, "a"), (documents, "b")])


@pytest.mark.parametrize(
    ("scores", "message"),
    [(iter([[1.0], [2.0, 3.0]]), "returned 1 scores for 2 passages"), (iter([None]), "returned None: expected a list")],
)
def test_a_cross_encoder_checks_each_querys_scores(scores, message):
    """A score too few for one query and one too many for the next moved scores from pair to pair."""

    class Next:
        def score(self, query, passages):
            return next(scores)

    with pytest.raises(ValueError, match=message):
        langchain.BGECrossEncoder(scorer=Next()).score([("a", "x"), ("a", "y"), ("b", "z")])


@ADAPTERS
def test_a_scorer_of_pairs_is_refused_at_construction(adapter):
    with pytest.raises(ValueError, match=r"expected an object with a method score\(query, passages\)"):
        adapter(scorer=langchain.BGECrossEncoder(model=MODEL))


@ADAPTERS
def test_a_scorer_that_runs_out_of_something_does_not_leave_who_awaits_it_waiting(adapter):
    """No future can hold a StopIteration, so that the task that waited for one waited for ever."""

    class RunsOut(NumberScorer):
        def score(self, query, passages):
            return [next(iter(())) for _ in passages]

    async def asked():
        reranker = adapter(scorer=RunsOut())
        if adapter is langchain.BGERerank:
            call = reranker.acompress_documents([Document("1")], QUERY)
        else:
            call = reranker.apostprocess_nodes([NodeWithScore(node=TextNode(text="1"))], query_str=QUERY)
        await asyncio.wait_for(call, timeout=10)

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        asyncio.run(asked())


@ADAPTERS
def test_an_ascore_that_is_no_coroutine_is_taken_as_well(adapter):
    class Both(NumberScorer):
        def ascore(self, query, passages):
            return self.score(query, passages)

    reranker = adapter(scorer=Both(), top_n=1)
    texts = ["0", "3", "1"]
    if adapter is langchain.BGERerank:
        (best,) = asyncio.run(reranker.acompress_documents([Document(text) for text in texts], QUERY))
        assert best.page_content == "3"
    else:
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        (best,) = asyncio.run(reranker.apostprocess_nodes(nodes, query_str=QUERY))
        assert best.node.get_content() == "3"


@ADAPTERS
def test_token_and_scorer_are_neither_printed_nor_dumped(adapter):
    reranker = adapter(model=MODEL, token="hf_secret", scorer=NumberScorer())
    for shown in (repr(reranker), str(reranker), str(reranker.model_dump()), reranker.model_dump_json()):
        assert "hf_secret" not in shown
        assert "NumberScorer" not in shown


@ADAPTERS
def test_a_pickle_after_use_carries_settings_and_no_weights(adapter):
    reranker = adapter(model=MODEL, top_n=4, max_length=64)
    scores = scores_in_order(reranker)
    data = pickle.dumps(reranker)
    assert len(data) < 10_000
    loaded = pickle.loads(data)
    assert loaded.model_dump() == reranker.model_dump()
    assert scores_in_order(loaded) == scores


@ADAPTERS
def test_threads_may_share_an_adapter(adapter, reference):
    reranker, results = adapter(model=MODEL, top_n=None), {}

    def rerank(query):
        results[query] = scores_in_order(reranker, query=query)

    threads = [threading.Thread(target=rerank, args=(f"{QUERY} {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for query, scores in results.items():
        assert scores == pytest.approx(reference.score(query, PASSAGES), abs=1e-5)


def test_model_name_names_the_model_or_the_scorer():
    assert AdapterSettings(model="a/b").model_name == "a/b"
    assert AdapterSettings(scorer=NumberScorer()).model_name == "NumberScorer"

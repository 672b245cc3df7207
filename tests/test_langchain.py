import asyncio
import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import LANGSMITHS_WARNING
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, CallbackManager
from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import BaseModel

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.langchain import BGECrossEncoder, BGERerank

MODEL = str(Path(__file__).parent / "data" / "encoder")
QUERY = "what is panda?"
TEXTS = [
    "hi",
    "The giant panda is a bear species endemic to China.",
    "datetime.strptime parses a string representing a time.",
    "Pandas eat bamboo.",
    "",
    "大熊猫是中国特有的熊科动物。",
]


@pytest.fixture(scope="module", autouse=True)
def reference():
    """A scorer that keeps the model loaded while these tests run."""
    with Scorer(MODEL) as scorer:
        scorer.warmup()
        yield scorer


@pytest.fixture
def documents():
    return [Document(text, id=f"id-{i}", metadata={"source": {"line": i}}) for i, text in enumerate(TEXTS)]


@pytest.fixture(params=["sync", "async"])
def compress(request):
    """`compress_documents`, or its async form, as one coroutine function."""

    async def run(reranker, documents, query=QUERY, **options):
        if request.param == "sync":
            return reranker.compress_documents(documents, query, **options)
        return await reranker.acompress_documents(documents, query, **options)

    return run


class LengthScorer:
    """Longer passages score more; counts its calls."""

    def __init__(self, error=None):
        self.error = error
        self.calls = []

    def score(self, query, passages):
        self.calls.append((query, passages))
        if self.error is not None:
            raise self.error
        return [np.float32(len(passage)) for passage in passages]


class Recorder(BaseCallbackHandler):
    """Remembers every run: its name, parent, inputs, outputs and error."""

    def __init__(self):
        self.runs = {}

    def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, **kwargs):
        self.runs[run_id] = {"name": kwargs.get("name"), "id": run_id, "parent": parent_run_id, "inputs": inputs}

    def on_chain_end(self, outputs, *, run_id, **kwargs):
        self.runs[run_id]["outputs"] = outputs

    def on_chain_error(self, error, *, run_id, **kwargs):
        self.runs[run_id]["error"] = error

    def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, **kwargs):
        self.runs[run_id] = {"name": kwargs.get("name"), "id": run_id, "parent": parent_run_id}

    def run_named(self, name):
        (run,) = [run for run in self.runs.values() if run["name"] == name]
        return run


def in_memory_retriever():
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document(text, id=str(i), metadata={"index": i}) for i, text in enumerate(TEXTS)])
    return store.as_retriever(search_kwargs={"k": len(TEXTS)})


async def test_documents_come_back_best_first_with_the_models_scores(compress, documents, reference):
    expected = sorted(zip(reference.score(QUERY, TEXTS), documents, strict=True), key=lambda pair: -pair[0])
    found = await compress(BGERerank(model=MODEL, top_n=None), documents)
    assert [document.page_content for document in found] == [document.page_content for _, document in expected]
    assert [document.metadata["relevance_score"] for document in found] == pytest.approx(
        [score for score, _ in expected], abs=1e-5
    )


@pytest.mark.parametrize(("options", "count"), [({}, 3), ({"top_n": None}, 6), ({"top_n": 0}, 0), ({"top_n": 99}, 6)])
async def test_top_n_documents_come_back_three_by_default(compress, documents, options, count):
    assert len(await compress(BGERerank(scorer=LengthScorer(), **options), documents)) == count


async def test_ids_classes_and_metadata_are_kept_and_inputs_untouched(compress, documents):
    """A new Document in place of a copy loses the id and what a subclass adds."""

    class Page(Document):
        number: int

    given = [Page(page_content=d.page_content, id=d.id, metadata=d.metadata, number=i) for i, d in enumerate(documents)]
    before = copy.deepcopy(given)
    found = await compress(BGERerank(scorer=LengthScorer(), top_n=2), given)
    assert given == before
    assert [type(document) for document in found] == [Page, Page]
    assert [(d.id, d.number, d.page_content) for d in found] == [("id-2", 2, TEXTS[2]), ("id-1", 1, TEXTS[1])]
    assert found[0].metadata == {"source": {"line": 2}, "relevance_score": 54.0}
    found[0].metadata["mine"] = 1
    assert given == before


async def test_a_stale_score_never_wins_and_stays_on_the_input(compress):
    given = [Document("a", metadata={"relevance_score": 99.0}), Document("bbb", metadata={"relevance_score": "old"})]
    found = await compress(BGERerank(scorer=LengthScorer()), given)
    assert [(d.page_content, d.metadata["relevance_score"]) for d in found] == [("bbb", 3.0), ("a", 1.0)]
    assert [d.metadata["relevance_score"] for d in given] == [99.0, "old"]


async def test_the_score_key_is_configurable(compress):
    reranker = BGERerank(scorer=LengthScorer(), relevance_score_key="bge")
    (found,) = await compress(reranker, [Document("abc", metadata={"relevance_score": 0.7})])
    assert found.metadata == {"relevance_score": 0.7, "bge": 3.0}
    with pytest.raises(ValueError, match="relevance_score_key"):
        BGERerank(model=MODEL, relevance_score_key="")


async def test_scores_are_python_floats_that_json_takes(compress, documents):
    """numpy's float32 is refused by json."""
    for reranker in (BGERerank(model=MODEL), BGERerank(scorer=LengthScorer())):
        found = await compress(reranker, documents)
        assert {type(document.metadata["relevance_score"]) for document in found} == {float}
        json.dumps([document.metadata for document in found])


async def test_duplicates_and_equal_scores_keep_their_order(compress):
    twin = Document("abc", id="twin")
    found = await compress(BGERerank(scorer=LengthScorer(), top_n=None), [twin, Document("xyz", id="other"), twin])
    assert [document.id for document in found] == ["twin", "other", "twin"]
    assert found[0] is not found[2]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("a text", "documents='a text'"),
        (Document("a"), "documents=Document"),
        (["a text"], r"documents\[0\]='a text': expected a Document, got str"),
        ([Document("a"), None], r"documents\[1\]=None"),
    ],
)
async def test_what_is_not_a_list_of_documents_is_an_error(compress, documents, message):
    scorer = LengthScorer()
    with pytest.raises(ValueError, match=message):
        await compress(BGERerank(scorer=scorer), documents)
    assert scorer.calls == []


async def test_a_query_that_is_not_a_string_is_an_error(compress, documents):
    with pytest.raises(ValueError, match="query=None: expected a string"):
        await compress(BGERerank(scorer=LengthScorer()), documents, None)


async def test_an_unloadable_model_is_an_error_that_names_it(compress, documents, tmp_path):
    with pytest.raises(ValueError, match="nothing-here"):
        await compress(BGERerank(model=str(tmp_path / "nothing-here"), local_files_only=True), documents)


async def test_async_lets_the_event_loop_run_while_the_model_scores(documents):
    beats = 0

    async def heartbeat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    reranker = BGERerank(model=MODEL, max_batch_tokens=1, top_n=None)
    many = [Document(f"{text} {i}") for i in range(30) for text in TEXTS]
    pulse = asyncio.create_task(heartbeat())
    try:
        assert len(await reranker.acompress_documents(many, QUERY)) == len(many)
    finally:
        pulse.cancel()
    assert beats >= 5


async def test_async_runs_a_scorer_without_ascore_in_a_thread():
    go = threading.Event()

    class Waiting:
        def score(self, query, passages):
            assert go.wait(10), "the event loop is blocked"
            return [1.0] * len(passages)

    async def let_go():
        go.set()

    found, _ = await asyncio.gather(BGERerank(scorer=Waiting()).acompress_documents([Document("a")], "q"), let_go())
    assert found[0].metadata["relevance_score"] == 1.0


async def test_concurrent_calls_give_what_single_calls_give(documents):
    reranker = BGERerank(model=MODEL, top_n=None)
    queries = [f"{QUERY} {i}" for i in range(8)]
    together = await asyncio.gather(*(reranker.acompress_documents(documents, query) for query in queries))
    for query, found in zip(queries, together, strict=True):
        alone = reranker.compress_documents(documents, query)
        assert [d.id for d in found] == [d.id for d in alone]


# rerank, as CohereRerank's


@pytest.fixture(params=["sync", "async"])
def rank(request):
    """`rerank`, or its async form, as one coroutine function."""

    async def run(reranker, documents, query=QUERY, **options):
        if request.param == "sync":
            return reranker.rerank(documents, query, **options)
        return await reranker.arerank(documents, query, **options)

    return run


async def test_rerank_gives_positions_and_scores_of_documents_and_strings(rank):
    reranker = BGERerank(scorer=LengthScorer(), top_n=2)
    mixed = ["ab", Document("abcd"), "abc"]
    assert await rank(reranker, mixed) == [{"index": 1, "relevance_score": 4.0}, {"index": 2, "relevance_score": 3.0}]
    assert [found["index"] for found in await rank(reranker, mixed, top_n=None)] == [1, 2, 0]
    assert [found["index"] for found in await rank(reranker, mixed, top_n=1)] == [1]
    assert await rank(reranker, mixed, top_n=0) == []
    assert await rank(reranker, []) == []


@pytest.mark.parametrize("top_n", [-1, 1.5, "2"])
async def test_rerank_refuses_an_impossible_top_n(rank, top_n):
    with pytest.raises(ValueError, match=f"top_n={top_n!r}"):
        await rank(BGERerank(scorer=LengthScorer()), ["a"], top_n=top_n)


@pytest.mark.parametrize("documents", ["a text", [{"text": "a"}], [b"a"]])
async def test_rerank_refuses_what_is_neither_document_nor_string(rank, documents):
    with pytest.raises(ValueError, match=r"expected a list|expected a Document or a str, got"):
        await rank(BGERerank(scorer=LengthScorer()), documents)


# Callbacks


async def test_a_run_is_traced_with_its_documents(compress, documents):
    recorder = Recorder()
    found = await compress(BGERerank(scorer=LengthScorer()), documents, callbacks=[recorder])
    (run,) = recorder.runs.values()
    assert (run["name"], run["parent"]) == ("BGERerank", None)
    assert run["inputs"] == {"query": QUERY, "documents": documents}
    assert run["outputs"] == {"documents": found}


@pytest.mark.parametrize("manager", [CallbackManager, AsyncCallbackManager])
async def test_a_run_nests_under_the_child_manager_it_is_given(compress, documents, manager):
    recorder = Recorder()
    parent = manager(handlers=[recorder], inheritable_handlers=[recorder]).on_chain_start(None, {}, name="parent")
    parent = await parent if asyncio.iscoroutine(parent) else parent
    await compress(BGERerank(scorer=LengthScorer()), documents, callbacks=parent.get_child())
    assert recorder.run_named("BGERerank")["parent"] == recorder.run_named("parent")["id"]


@pytest.mark.parametrize("query", [QUERY, None])
async def test_an_error_is_reported_and_raised_unchanged(compress, documents, query):
    recorder, error = Recorder(), KeyError("boom")
    with pytest.raises((KeyError, ValueError)) as raised:
        await compress(BGERerank(scorer=LengthScorer(error)), documents, query, callbacks=[recorder])
    (run,) = recorder.runs.values()
    assert run["error"] is raised.value
    assert "outputs" not in run
    if query is not None:
        assert raised.value is error


async def test_a_cancelled_run_is_closed(documents):
    recorder, started = Recorder(), asyncio.Event()

    class Endless:
        def score(self, query, passages): ...

        async def ascore(self, query, passages):
            started.set()
            await asyncio.Event().wait()

    reranker = BGERerank(scorer=Endless())
    task = asyncio.create_task(reranker.acompress_documents(documents, QUERY, callbacks=[recorder]))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(recorder.run_named("BGERerank")["error"], asyncio.CancelledError)


# Inside LangChain


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_works_and_is_traced_inside_contextual_compression_retriever(form, reference):
    recorder = Recorder()
    retriever = ContextualCompressionRetriever(
        base_compressor=BGERerank(model=MODEL, top_n=2), base_retriever=in_memory_retriever()
    )
    config = {"callbacks": [recorder]}
    found = retriever.invoke(QUERY, config) if form == "sync" else await retriever.ainvoke(QUERY, config)
    best = [index for index, _ in reference.rank(QUERY, TEXTS, top_n=2)]
    assert [document.metadata["index"] for document in found] == best
    assert [document.id for document in found] == [str(index) for index in best]
    run = recorder.run_named("BGERerank")
    assert run["parent"] == recorder.run_named("ContextualCompressionRetriever")["id"]
    assert run["outputs"] == {"documents": found}


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_works_and_is_traced_inside_document_compressor_pipeline(form, documents):
    """The pipeline passes callbacks on only to compressors whose signature names them."""

    class Lines(BaseDocumentTransformer):
        def transform_documents(self, documents, **kwargs):
            return [document for document in documents if document.page_content]

        async def atransform_documents(self, documents, **kwargs):
            return self.transform_documents(documents)

    recorder = Recorder()
    pipeline = DocumentCompressorPipeline(transformers=[Lines(), BGERerank(scorer=LengthScorer(), top_n=None)])
    if form == "sync":
        found = pipeline.compress_documents(documents, QUERY, callbacks=[recorder])
    else:
        found = await pipeline.acompress_documents(documents, QUERY, callbacks=[recorder])
    assert [document.id for document in found] == ["id-2", "id-1", "id-3", "id-5", "id-0"]
    assert recorder.run_named("BGERerank")["outputs"] == {"documents": found}


# Before Python 3.11, asyncio cannot hand the surrounding run on to a coroutine.
@pytest.mark.parametrize(
    "form", ["sync", pytest.param("async", marks=pytest.mark.skipif("sys.version_info < (3, 11)"))]
)
async def test_works_inside_an_lcel_chain_and_nests_there_by_itself(form):
    reranker, recorder = BGERerank(scorer=LengthScorer(), top_n=1), Recorder()

    def rerank(given):
        return reranker.compress_documents(given["documents"], given["query"])

    async def arerank(given):
        return await reranker.acompress_documents(given["documents"], given["query"])

    chain = (
        {"documents": in_memory_retriever(), "query": RunnablePassthrough()}
        | RunnableLambda(rerank, arerank, name="rerank")
        | (lambda found: found[0].page_content)
    )
    config = {"callbacks": [recorder]}
    found = chain.invoke(QUERY, config) if form == "sync" else await chain.ainvoke(QUERY, config)
    assert found == max(TEXTS, key=len)
    assert recorder.run_named("BGERerank")["parent"] == recorder.run_named("rerank")["id"]


class RerankedRetriever(BaseRetriever):
    """A retriever with its number of results as an option, as `langchain-tests` wants it."""

    base: BaseRetriever
    reranker: BGERerank
    k: int = 3

    def _get_relevant_documents(self, query, *, run_manager, k=None):
        documents = self.base.invoke(query, {"callbacks": run_manager.get_child()})
        reranker = self.reranker.model_copy(update={"top_n": self.k if k is None else k})
        return reranker.compress_documents(documents, query, callbacks=run_manager.get_child())


class TestStandardRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return RerankedRetriever

    @property
    def retriever_constructor_params(self):
        return {"base": in_memory_retriever(), "reranker": BGERerank(model=MODEL)}

    @property
    def retriever_query_example(self) -> str:
        return QUERY


# BGECrossEncoder


def test_cross_encoder_scores_pairs_of_any_queries_in_order(reference):
    pairs = [("a", "b"), (QUERY, TEXTS[1]), (QUERY, TEXTS[0]), ("a", "c"), ("", "")]
    scores = BGECrossEncoder(model=MODEL).score(pairs)
    assert scores == pytest.approx(reference.score_pairs(pairs), abs=1e-5)
    assert {type(score) for score in scores} == {float}
    assert BGECrossEncoder(model="no/such-model").score([]) == []


def test_cross_encoder_takes_a_scorer_that_scores_one_query_at_a_time():
    scorer = LengthScorer()
    scores = BGECrossEncoder(scorer=scorer).score([("p", "a"), ("p", "bbb"), ("q", "cc"), ("p", "dddd")])
    assert scores == [1.0, 3.0, 2.0, 4.0]
    assert {type(score) for score in scores} == {float}
    assert scorer.calls == [("p", ["a", "bbb"]), ("q", ["cc"]), ("p", ["dddd"])]


def test_cross_encoder_gives_pairs_of_several_queries_to_the_scorer_at_once():
    class PairScorer(LengthScorer):
        def score_pairs(self, pairs):
            self.calls.append(pairs)
            return [0.5] * len(pairs)

    scorer, pairs = PairScorer(), [("p", "a"), ("q", "b")]
    assert BGECrossEncoder(scorer=scorer).score(pairs) == [0.5, 0.5]
    assert scorer.calls == [pairs]


@pytest.mark.parametrize("pairs", [[("a", "b", "c")], ["ab"], [("a", None)], [None], "ab", [("a", "b"), 3], None])
@pytest.mark.parametrize("options", [{"model": MODEL}, {"scorer": LengthScorer()}], ids=["model", "scorer"])
def test_cross_encoder_refuses_what_is_not_a_pair_of_strings(pairs, options):
    with pytest.raises(ValueError, match="pairs"):
        BGECrossEncoder(**options).score(pairs)


def test_cross_encoder_works_inside_cross_encoder_reranker(documents, reference):
    reranker = CrossEncoderReranker(model=BGECrossEncoder(model=MODEL), top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=in_memory_retriever())
    best = [index for index, _ in reference.rank(QUERY, TEXTS, top_n=2)]
    assert [document.metadata["index"] for document in retriever.invoke(QUERY)] == best
    assert list(reranker.compress_documents([], QUERY)) == []


# Importing


def python(code):
    command = [sys.executable, "-W", "error", "-W", LANGSMITHS_WARNING, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_import_without_langchain_core_names_the_cure():
    done = python("import sys; sys.modules['langchain_core'] = None; import bge_rerank_plugins.langchain")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: the LangChain adapter needs langchain-core")
    assert 'pip install "bge-rerank-plugins[langchain]"' in done.stderr.splitlines()[-1]


def test_import_and_construction_load_neither_torch_nor_transformers():
    done = python(
        "import sys; from bge_rerank_plugins.langchain import BGERerank; BGERerank(model='a/b');"
        "assert not {'torch', 'transformers', 'llama_index'} & set(sys.modules)"
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_documents_may_come_from_a_generator(documents):
    """They are gone through more than once: a generator was used up, and nothing came back."""
    reranker = BGERerank(scorer=LengthScorer(), top_n=1)
    longest = max(TEXTS, key=len)
    assert [found.page_content for found in reranker.compress_documents(iter(documents), QUERY)] == [longest]
    assert [found.page_content for found in reranker.compress_documents(dict(enumerate(documents)).values(), QUERY)]
    assert asyncio.run(reranker.acompress_documents(iter(documents), QUERY))[0].page_content == longest
    assert reranker.rerank(iter(TEXTS), QUERY)[0]["index"] == TEXTS.index(longest)
    batch = reranker.compress_documents_batch((iter(documents), query) for query in (QUERY, "b"))
    assert [[found.page_content for found in of] for of in batch] == [[longest], [longest]]
    pairs = [(QUERY, text) for text in TEXTS]
    assert BGECrossEncoder(scorer=LengthScorer()).score(iter(pairs)) == [len(text) for text in TEXTS]
    assert BGECrossEncoder(model=MODEL).score(zip(*zip(*pairs, strict=True), strict=True))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([([Document("a")], "q"), (["x"], "z")], r"requests\[1\]: documents\[0\]='x': expected a Document"),
        ([([Document("a")],)], r"requests\[0\]: expected \(documents, query\)"),
        ([([Document("a")], None)], r"requests\[0\]: query=None"),
        ([(7, "q")], r"requests\[0\]: documents=7: expected a list"),
        ([({"id": "text"}, "q")], r"requests\[0\]: documents={'id': 'text'}: expected a list"),
        (None, r"requests=None: expected a list of \(documents, query\)"),
    ],
)
def test_a_request_of_a_batch_that_is_refused_is_named(requests, message):
    with pytest.raises(ValueError, match=message):
        BGERerank(scorer=LengthScorer()).compress_documents_batch(requests)


def test_a_batch_is_a_run_for_each_request(documents):
    recorder = Recorder()
    reranker = BGERerank(scorer=LengthScorer(), top_n=1)
    reranker.compress_documents_batch([(documents, "a"), ([], "b")], callbacks=[recorder])
    assert [(run["inputs"]["query"], len(run["outputs"]["documents"])) for run in recorder.runs.values()] == [
        ("a", 1),
        ("b", 0),
    ]
    failing = Recorder()
    with pytest.raises(KeyError):
        BGERerank(scorer=LengthScorer(KeyError("x"))).compress_documents_batch([(documents, "a")] * 2, [failing])
    assert [type(run["error"]) for run in failing.runs.values()] == [KeyError, KeyError]


@pytest.mark.parametrize("given", ["x", {}, {"documents": []}, [("documents", [])], None])
async def test_a_step_of_a_chain_says_what_it_takes(given):
    step = BGERerank(model=MODEL).as_runnable()
    with pytest.raises(ValueError, match=r'expected \{"documents": ..., "query": ...\}'):
        step.invoke(given)
    with pytest.raises(ValueError, match=r'expected \{"documents": ..., "query": ...\}'):
        await step.ainvoke(given)


async def test_a_step_of_a_chain_is_one_run_and_can_be_pickled(documents):
    step = BGERerank(model=MODEL, top_n=1).as_runnable()
    given = {"documents": documents, "query": QUERY}
    for found in (pickle.loads(pickle.dumps(step)).invoke(given), await step.ainvoke(given)):
        assert len(found) == 1
    recorder = Recorder()
    step.invoke(given, {"callbacks": [recorder]})
    assert [run["name"] for run in recorder.runs.values()] == ["BGERerank"]


class Filtered(BGERerank):
    """A subclass as users write them, for one of two methods."""

    def compress_documents(self, documents, query, callbacks=None):
        kept = [document for document in documents if "bamboo" not in document.page_content]
        return super().compress_documents(kept, query, callbacks)


class FilteredTwice(Filtered):
    async def acompress_documents(self, documents, query, callbacks=None):
        return (await super().acompress_documents(documents, query, callbacks))[:1]


async def test_a_subclass_that_overrides_the_blocking_method_means_all_of_them(documents):
    """Async calls, batches and steps of a chain went past it."""
    reranker = Filtered(model=MODEL, top_n=None)
    step, given = reranker.as_runnable(), {"documents": documents, "query": QUERY}
    for found in (
        reranker.compress_documents(documents, QUERY),
        await reranker.acompress_documents(documents, QUERY),
        *reranker.compress_documents_batch([(documents, QUERY)] * 2),
        step.invoke(given),
        await step.ainvoke(given),
    ):
        assert sorted(document.id for document in found) == ["id-0", "id-1", "id-2", "id-4", "id-5"]
    twice = FilteredTwice(model=MODEL, top_n=None)
    for found in (await twice.acompress_documents(documents, QUERY), await twice.as_runnable().ainvoke(given)):
        assert [document.id for document in found] == [reranker.compress_documents(documents, QUERY)[0].id]


class Quiet:
    """A mixin with one of the two methods."""

    def compress_documents(self, documents, query, *, callbacks=None):
        return documents[:1] if query == QUERY else _refuse(query)


class Hurried:
    async def acompress_documents(self, documents, query, callbacks=None):
        return documents[:2]


class QuietReranker(Quiet, BGERerank):
    pass


class QuietAndHurried(Quiet, Hurried, BGERerank):
    pass


class HurriedWithOwn(Hurried, BGERerank):
    compress_documents = Quiet.compress_documents


def _refuse(query):
    raise ValueError(f"query={query!r}: not that one")


async def test_methods_that_are_inherited_before_the_rerankers_count_as_its_own(documents):
    """Those of a mixin were passed by, or replaced."""
    assert await HurriedWithOwn(model=MODEL).acompress_documents(documents, QUERY) == documents[:2]
    assert await QuietAndHurried(model=MODEL).acompress_documents(documents, QUERY) == documents[:2]
    quiet = QuietReranker(model=MODEL)
    assert quiet.compress_documents_batch([(documents, QUERY)]) == [documents[:1]]
    assert quiet.as_runnable().invoke({"documents": documents, "query": QUERY}) == documents[:1]
    with pytest.raises(ValueError, match=r"requests\[1\]: query='other': not that one"):
        quiet.compress_documents_batch([(documents, QUERY), (documents, "other")])


class SyncMixin:
    def compress_documents(self, documents, query, callbacks=None):
        return documents[:1]


class WithSyncMixin(SyncMixin, BGERerank):
    pass


async def test_a_blocking_method_of_a_mixin_means_async_calls_too(documents):
    reranker = WithSyncMixin(model=MODEL)
    assert await reranker.acompress_documents(documents, QUERY) == documents[:1]
    assert await reranker.as_runnable().ainvoke({"documents": documents, "query": QUERY}) == documents[:1]


async def test_what_is_done_to_nested_metadata_of_the_result_is_not_done_to_the_input(compress, documents):
    lock = threading.Lock()
    documents[0].metadata["lock"] = lock  # of which there is no copy
    documents[0].metadata["itself"] = [documents[0].metadata]
    for document in await compress(BGERerank(model=MODEL, top_n=None), documents):
        if document.id == "id-0":
            assert document.metadata["lock"] is lock
            (again,) = document.metadata["itself"]
            assert again["itself"] == [again]
        document.metadata["source"]["line"] = "changed"
    assert [document.metadata["source"] for document in documents] == [{"line": i} for i in range(len(documents))]


@pytest.mark.filterwarnings("ignore:This API is in beta")
def test_a_step_can_be_a_tool(documents):
    """Which needs to know what it takes."""
    step = BGERerank(model=MODEL, top_n=1).as_runnable()
    tool = step.as_tool(name="rerank", description="Ranks documents.")
    assert tool.args.keys() == {"documents", "query"}
    (found,) = tool.invoke({"documents": documents, "query": QUERY})
    assert found == step.invoke({"documents": documents, "query": QUERY})[0]


class State(BaseModel):
    """As LangGraph hands it to a node."""

    query: str
    documents: list[Document]


async def test_a_step_takes_a_state(documents):
    step = BGERerank(model=MODEL, top_n=1).as_runnable()
    state = State(query=QUERY, documents=documents)
    assert step.invoke(state) == await step.ainvoke(state) == step.invoke(dict(state))

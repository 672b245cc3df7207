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
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from pydantic import BaseModel, Field, PrivateAttr

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.llama_index import BGERerank

MODEL = str(Path(__file__).parent / "data" / "encoder")
QUERY = "what is panda?"
TEXTS = [
    "hi",
    "The giant panda is a bear species endemic to China.",
    "datetime.strptime parses a string representing a time.",
    "Pandas eat bamboo.",
]


@pytest.fixture(scope="module", autouse=True)
def reference():
    """A scorer that keeps the model loaded while these tests run."""
    with Scorer(MODEL) as scorer:
        scorer.warmup()
        yield scorer


@pytest.fixture
def nodes():
    return [
        NodeWithScore(
            node=TextNode(
                text=text,
                id_=f"id-{i}",
                metadata={"title": f"Title {i}", "secret": "of the embedding"},
                excluded_embed_metadata_keys=["secret"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="document")},
            ),
            score=i / 10,
        )
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture(params=["sync", "async"])
def postprocess(request):
    """`postprocess_nodes`, or its async form, as one coroutine function."""

    async def run(reranker, nodes, query=QUERY):
        bundle = QueryBundle(query) if query is not None else None
        if request.param == "sync":
            return reranker.postprocess_nodes(nodes, bundle)
        return await reranker.apostprocess_nodes(nodes, bundle)

    return run


class LengthScorer:
    """Longer passages score more; remembers what it was asked."""

    def __init__(self, error=None):
        self.error = error
        self.calls = []

    def score(self, query, passages):
        self.calls.append((query, passages))
        if self.error is not None:
            raise self.error
        return [np.float32(len(passage)) for passage in passages]


class Events(BaseEventHandler):
    seen: list = Field(default_factory=list)

    def handle(self, event, **kwargs):
        self.seen.append(event)


class Instruments:
    """Events and spans, as an observability tool gets them."""

    def __init__(self):
        self.events = Events()
        self.spans = SimpleSpanHandler()

    def rerank_events(self):
        return [event for event in self.events.seen if isinstance(event, (ReRankStartEvent, ReRankEndEvent))]


@pytest.fixture
def instruments():
    root, instruments = get_dispatcher("root"), Instruments()
    root.add_event_handler(instruments.events)
    root.add_span_handler(instruments.spans)
    yield instruments
    root.event_handlers.remove(instruments.events)
    root.span_handlers.remove(instruments.spans)


async def test_nodes_come_back_best_first_with_the_models_scores(postprocess, nodes, reference):
    texts = [node.get_content(MetadataMode.EMBED) for node in nodes]
    expected = reference.rank(QUERY, texts)
    found = await postprocess(BGERerank(model=MODEL, top_n=None), nodes)
    assert [node.node_id for node in found] == [f"id-{index}" for index, _ in expected]
    assert [node.score for node in found] == pytest.approx([score for _, score in expected], abs=1e-5)


@pytest.mark.parametrize(("options", "count"), [({}, 2), ({"top_n": None}, 4), ({"top_n": 0}, 0), ({"top_n": 99}, 4)])
async def test_top_n_nodes_come_back_two_by_default(postprocess, nodes, options, count):
    assert len(await postprocess(BGERerank(scorer=LengthScorer(), **options), nodes)) == count


@pytest.mark.parametrize("keep", [False, True])
async def test_nodes_that_come_in_are_never_modified(postprocess, nodes, keep):
    """LlamaIndex's own rerankers overwrite the scores, and write metadata into nodes that the index shares."""
    before, inner = copy.deepcopy(nodes), [node.node for node in nodes]
    found = await postprocess(BGERerank(scorer=LengthScorer(), top_n=None, keep_retrieval_score=keep), nodes)
    assert nodes == before
    assert all(node.node is same for node, same in zip(nodes, inner, strict=True))
    assert not {id(node) for node in found} & {id(node) for node in nodes}
    by_id = {node.node_id: node.node for node in nodes}
    for node in found:
        assert node.node.relationships == by_id[node.node_id].relationships
        assert keep or node.node.hash == by_id[node.node_id].hash
    found[0].score = None
    assert nodes == before


async def test_the_retrieval_score_is_kept_without_changing_what_is_embedded_or_read(postprocess, nodes):
    found = await postprocess(BGERerank(scorer=LengthScorer(), top_n=None, keep_retrieval_score=True), nodes)
    by_id = {node.node_id: node for node in nodes}
    for node in found:
        original = by_id[node.node_id]
        assert node.metadata == {**original.metadata, "retrieval_score": original.score}
        for mode in (MetadataMode.EMBED, MetadataMode.LLM):
            assert node.get_content(mode) == original.get_content(mode)


async def test_reranking_again_gives_the_same_scores(postprocess, nodes):
    """A retrieval score in the metadata became part of the text, and the second rerank scored another text."""
    reranker = BGERerank(model=MODEL, top_n=None, keep_retrieval_score=True)
    once = await postprocess(reranker, nodes)
    twice = await postprocess(reranker, once)
    assert [node.node_id for node in twice] == [node.node_id for node in once]
    assert [node.score for node in twice] == pytest.approx([node.score for node in once], abs=1e-6)
    assert [node.metadata["retrieval_score"] for node in twice] == [node.score for node in once]
    assert twice[0].node.excluded_embed_metadata_keys.count("retrieval_score") == 1


async def test_without_keep_retrieval_score_metadata_are_as_before(postprocess, nodes):
    for node in await postprocess(BGERerank(scorer=LengthScorer()), nodes):
        assert "retrieval_score" not in node.metadata


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "title: Title 0\n\nhi"),
        ({"metadata_mode": "none"}, "hi"),
        ({"metadata_mode": MetadataMode.ALL}, "title: Title 0\nsecret: of the embedding\n\nhi"),
    ],
)
async def test_metadata_mode_chooses_what_is_scored(postprocess, nodes, options, text):
    scorer = LengthScorer()
    await postprocess(BGERerank(scorer=scorer, **options), nodes[:1])
    assert scorer.calls == [(QUERY, [text])]


async def test_scores_are_python_floats(postprocess, nodes):
    for reranker in (BGERerank(model=MODEL), BGERerank(scorer=LengthScorer())):
        assert {type(node.score) for node in await postprocess(reranker, nodes)} == {float}


async def test_a_retrieval_score_of_numpy_is_kept_as_a_number(postprocess):
    """Other rerankers leave such scores, pydantic does not look at them, and JSON has none."""
    node = NodeWithScore(node=TextNode(text="a"))
    node.score = np.float32(0.25)
    (found,) = await postprocess(BGERerank(scorer=LengthScorer(), keep_retrieval_score=True), [node])
    assert found.node.metadata == {"retrieval_score": 0.25}
    assert type(found.node.metadata["retrieval_score"]) is float
    assert json.loads(found.to_json())["node"]["metadata"] == {"retrieval_score": 0.25}


async def test_nodes_without_text_are_scored_as_empty(postprocess, reference):
    textless = [ImageNode(image_path="panda.png"), IndexNode(index_id="other"), TextNode(), Node()]
    given = [NodeWithScore(node=node, score=0.5) for node in [*textless, TextNode(text="some text")]]
    found = await postprocess(BGERerank(model=MODEL, top_n=None, keep_retrieval_score=True), given)
    scores = {type(node.node).__name__ + node.node.get_content(): node.score for node in found}
    (empty,) = reference.score(QUERY, [""])
    assert {name: scores[name] for name in ("ImageNode", "IndexNode", "TextNode", "Node")} == pytest.approx(
        dict.fromkeys(["ImageNode", "IndexNode", "TextNode", "Node"], empty), abs=1e-5
    )
    assert {node.node_id for node in found} == {node.node_id for node in given}


async def test_a_subclass_of_node_with_score_survives(postprocess):
    class Cited(NodeWithScore):
        page: int = 0

    (found,) = await postprocess(BGERerank(scorer=LengthScorer()), [Cited(node=TextNode(text="a"), page=7)])
    assert (type(found), found.page, found.score) == (Cited, 7, 1.0)


async def test_a_missing_query_is_an_error(postprocess, nodes):
    with pytest.raises(ValueError, match="query_bundle=None: reranking needs a query"):
        await postprocess(BGERerank(scorer=LengthScorer()), nodes, None)


async def test_async_lets_the_event_loop_run_while_the_model_scores(nodes):
    beats = 0

    async def heartbeat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    pulse = asyncio.create_task(heartbeat())
    try:
        await BGERerank(model=MODEL, max_batch_tokens=1).apostprocess_nodes(nodes * 40, query_str=QUERY)
    finally:
        pulse.cancel()
    assert beats >= 5


async def test_async_runs_a_scorer_without_ascore_in_a_thread(nodes):
    go = threading.Event()

    class Waiting:
        def score(self, query, passages):
            assert go.wait(10), "the event loop is blocked"
            return [1.0] * len(passages)

    async def let_go():
        go.set()

    await asyncio.gather(BGERerank(scorer=Waiting()).apostprocess_nodes(nodes, query_str=QUERY), let_go())


# Events, spans, callbacks


@pytest.mark.parametrize(
    ("case", "query", "error"),
    [
        ("ordinary", QUERY, None),
        ("empty", QUERY, None),
        ("no query", None, ValueError),
        ("scorer fails", QUERY, KeyError),
    ],
)
async def test_events_spans_and_callbacks_are_always_closed(postprocess, nodes, instruments, case, query, error):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    scorer = LengthScorer(KeyError("boom") if case == "scorer fails" else None)
    reranker = BGERerank(scorer=scorer, callback_manager=CallbackManager([debug]))
    given = [] if case == "empty" else nodes
    if error is None:
        found = await postprocess(reranker, given, query)
    else:
        found = []
        with pytest.raises(error):
            await postprocess(reranker, given, query)
    start, end = instruments.rerank_events()
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert (start.nodes, start.top_n, start.model_name) == (given, 2, "LengthScorer")
    assert start.query == (QueryBundle(query) if query is not None else None)
    assert end.nodes == found
    assert not instruments.spans.open_spans
    ended = instruments.spans.completed_spans if error is None else instruments.spans.dropped_spans
    assert [span.id_ for span in ended] == [start.span_id] == [end.span_id]
    ((opened, closed),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert opened.payload == {
        EventPayload.NODES: given,
        EventPayload.MODEL_NAME: "LengthScorer",
        EventPayload.QUERY_STR: query,
        EventPayload.TOP_K: 2,
    }
    if error is None:
        assert closed.payload == {EventPayload.NODES: found}


async def test_a_cancelled_call_leaves_nothing_open(nodes, instruments):
    debug, started = LlamaDebugHandler(print_trace_on_end=False), asyncio.Event()

    class Endless:
        def score(self, query, passages): ...

        async def ascore(self, query, passages):
            started.set()
            await asyncio.Event().wait()

    reranker = BGERerank(scorer=Endless(), callback_manager=CallbackManager([debug]))
    task = asyncio.create_task(reranker.apostprocess_nodes(nodes, query_str=QUERY))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [type(event) for event in instruments.rerank_events()] == [ReRankStartEvent, ReRankEndEvent]
    assert not instruments.spans.open_spans
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


async def test_the_start_event_counts_all_nodes_where_top_n_is_none(postprocess, nodes, instruments):
    """Its top_n is a whole number, and None in it is an error that hides the ranking."""
    await postprocess(BGERerank(model=MODEL, top_n=None), nodes)
    start, _ = instruments.rerank_events()
    assert (start.top_n, start.model_name) == (4, MODEL)


async def test_an_engine_may_assign_the_callback_manager(postprocess, nodes):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker = BGERerank(scorer=LengthScorer(), callback_manager=None)
    await postprocess(reranker, nodes)
    reranker.callback_manager = CallbackManager([debug])
    await postprocess(reranker, nodes)
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


# Serialisation


def test_dict_and_json_round_trips_carry_all_but_scorer_and_token():
    reranker = BGERerank(
        model=MODEL,
        top_n=5,
        metadata_mode=MetadataMode.LLM,
        keep_retrieval_score=True,
        token="hf_secret",
        dtype="float32",
    )
    data = reranker.to_dict()
    assert data["class_name"] == BGERerank.class_name() == "BGERerank"
    assert not {"token", "scorer", "callback_manager"} & set(data)
    assert "hf_secret" not in reranker.to_json()
    for loaded in (BGERerank.from_dict(data), BGERerank.from_json(reranker.to_json())):
        assert loaded.to_dict() == data
        assert loaded.metadata_mode is MetadataMode.LLM
    json.dumps(data)


def test_a_dict_of_an_adapter_with_a_scorer_is_loaded_with_one():
    scorer = LengthScorer()
    loaded = BGERerank.from_dict(BGERerank(scorer=scorer, top_n=1).to_dict(), scorer=scorer)
    assert (loaded.scorer, loaded.top_n) == (scorer, 1)


async def test_pickle_and_deepcopy_after_use_carry_no_weights_and_still_work(postprocess, nodes):
    reranker = BGERerank(model=MODEL, top_n=3, keep_retrieval_score=True)
    found = await postprocess(reranker, nodes)
    assert len(pickle.dumps(reranker)) < 10_000
    for copied in (pickle.loads(pickle.dumps(reranker)), copy.deepcopy(reranker)):
        assert copied.to_dict() == reranker.to_dict()
        assert [node.node_id for node in await postprocess(copied, nodes)] == [node.node_id for node in found]


def test_a_scorer_that_cannot_be_pickled_is_an_error_and_not_left_out(nodes):
    """LlamaIndex leaves out what it cannot pickle, so that the copy scored with another model, or none."""
    scorer = LengthScorer()
    scorer.lock = threading.Lock()
    reranker = BGERerank(model=MODEL, scorer=scorer)
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(reranker)
    assert reranker.scorer is scorer


def test_pickling_leaves_the_callback_manager_in_place(nodes):
    """LlamaIndex removes what cannot be pickled from the living object: the next call found no callback manager."""
    debug = LlamaDebugHandler(print_trace_on_end=False)
    debug.lock = threading.Lock()
    reranker = BGERerank(scorer=LengthScorer(), callback_manager=CallbackManager([debug]))
    assert pickle.loads(pickle.dumps(reranker)).postprocess_nodes(nodes, query_str=QUERY)
    reranker.postprocess_nodes(nodes, query_str=QUERY)
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1


# Inside LlamaIndex


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_works_in_a_query_engine(form, reference, instruments):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    index = VectorStoreIndex(
        [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)], embed_model=MockEmbedding(4)
    )
    retriever = index.as_retriever(similarity_top_k=len(TEXTS))
    engine = RetrieverQueryEngine.from_args(
        retriever,
        llm=MockLLM(),
        node_postprocessors=[BGERerank(model=MODEL, keep_retrieval_score=True)],
        callback_manager=CallbackManager([debug]),
    )
    response = engine.query(QUERY) if form == "sync" else await engine.aquery(QUERY)
    best = reference.rank(QUERY, TEXTS, top_n=2)
    assert [node.node_id for node in response.source_nodes] == [str(index) for index, _ in best]
    assert [node.score for node in response.source_nodes] == pytest.approx([score for _, score in best], abs=1e-5)
    assert "retrieval_score" not in str(response)
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1, "the engine's callback manager reaches the reranker"
    assert len(instruments.rerank_events()) == 2
    assert not instruments.spans.open_spans
    stored = index.docstore.docs.values()
    assert not any("retrieval_score" in node.metadata for node in stored), "the index is as before"


# Importing


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_without_llama_index_core_names_the_cure():
    done = python("import sys; sys.modules['llama_index.core'] = None; import bge_rerank_plugins.llama_index")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: the LlamaIndex adapter needs llama-index-core")
    assert 'pip install "bge-rerank-plugins[llama-index]"' in done.stderr.splitlines()[-1]


def test_import_and_construction_load_neither_torch_nor_transformers():
    done = python(
        "import sys; from bge_rerank_plugins.llama_index import BGERerank; BGERerank(model='a/b');"
        "assert not {'torch', 'transformers', 'langchain_core'} & set(sys.modules)"
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_what_pydantic_writes_it_reads_again():
    """LlamaIndex writes `class_name` among the fields, which was then refused as an option that is not known."""

    class Config(BaseModel):
        reranker: BGERerank

    reranker = BGERerank(model=MODEL, top_n=7)
    assert BGERerank.model_validate_json(reranker.model_dump_json()).top_n == 7
    assert BGERerank(**reranker.model_dump()).top_n == 7
    assert Config.model_validate_json(Config(reranker=reranker).model_dump_json()).reranker.top_n == 7
    with pytest.raises(ValueError, match="top_m"):
        BGERerank(model=MODEL, top_m=7)


class Preset(BGERerank):
    """A subclass with a constructor of its own."""

    _note: str = PrivateAttr(default="")

    def __init__(self, preset):
        super().__init__(model=preset, top_n=1)
        self._note = "mine"


def test_a_subclass_with_a_constructor_of_its_own_is_pickled_whole(nodes):
    """LlamaIndex calls the constructor with the fields, and left an adapter without what was not among them."""
    loaded = pickle.loads(pickle.dumps(Preset(MODEL)))
    assert (loaded.top_n, loaded._note) == (1, "mine")
    assert len(loaded.postprocess_nodes(nodes, query_str=QUERY)) == 1
    loaded.close()
    refused = pickle.loads(pickle.dumps(BGERerank(model=MODEL).model_copy(update={"top_n": -2})))
    with pytest.raises(ValueError, match="top_n=-2"):
        refused.postprocess_nodes(nodes, query_str=QUERY)


async def test_nodes_may_come_from_a_generator_and_a_query_as_text(nodes):
    """pydantic used a generator up for the event, and nothing came back."""
    reranker = BGERerank(scorer=LengthScorer(), top_n=1)
    (expected,) = reranker.postprocess_nodes(nodes, query_str=QUERY)
    assert reranker.postprocess_nodes(iter(nodes), query_str=QUERY) == [expected]
    assert reranker.postprocess_nodes(nodes, QUERY) == [expected]
    assert await reranker.apostprocess_nodes(iter(nodes), query_str=QUERY) == [expected]
    assert reranker.postprocess_nodes_batch((iter(nodes), query) for query in (QUERY, "b")) == [[expected]] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([TextNode(text="a")], r"nodes\[0\]=.*expected a NodeWithScore, got TextNode"),
        ([None], r"nodes\[0\]=None: expected a NodeWithScore"),
        (TextNode(text="a"), "nodes=.*expected a list"),
        ("text", "nodes='text': expected a list"),
        (3, "nodes=3: expected a list"),
    ],
)
def test_what_are_no_nodes_is_refused_by_its_place(given, message):
    reranker = BGERerank(scorer=LengthScorer())
    with pytest.raises(ValueError, match=message):
        reranker.postprocess_nodes(given, query_str=QUERY)
    with pytest.raises(ValueError, match=rf"requests\[1\]: {message}"):
        reranker.postprocess_nodes_batch([([], QUERY), (given, QUERY)])
    with pytest.raises(ValueError, match=r"requests\[0\]: query_bundle=None"):
        reranker.postprocess_nodes_batch([([], None)])


@pytest.mark.parametrize("query", [3, b"panda", {"query_str": "panda"}])
async def test_what_is_no_query_is_refused_by_name(nodes, query):
    reranker = BGERerank(scorer=LengthScorer())
    message = f"query_bundle={query!r}: expected a QueryBundle or a string"
    for given in (nodes, []):
        with pytest.raises(ValueError, match=message):
            reranker.postprocess_nodes(given, query)
        with pytest.raises(ValueError, match=message):
            await reranker.apostprocess_nodes(given, query)
    with pytest.raises(ValueError, match=rf"requests\[0\]: {message}"):
        reranker.postprocess_nodes_batch([(nodes, query)])


def test_the_requests_of_a_batch_are_reported_beside_each_other(nodes):
    """Each was the parent of the next."""
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    reranker = BGERerank(scorer=LengthScorer(), callback_manager=manager)
    with manager.event(CBEventType.QUERY):
        reranker.postprocess_nodes_batch([(nodes, "a"), (nodes, "b")])
        reranker.postprocess_nodes(nodes, query_str="c")
    reranked = {start.id_ for start, _ in debug.get_event_pairs(CBEventType.RERANKING)}
    assert len(reranked) == 3
    assert reranked in [set(ids) for ids in manager.trace_map.values()]


def test_a_retrieval_score_that_was_kept_is_scored_in_no_mode(nodes):
    for mode in MetadataMode:
        scorer = LengthScorer()
        reranker = BGERerank(scorer=scorer, top_n=None, keep_retrieval_score=True, metadata_mode=mode)
        reranker.postprocess_nodes(reranker.postprocess_nodes(nodes, query_str=QUERY), query_str=QUERY)
        first, second = (set(passages) for _, passages in scorer.calls)
        assert first == second


def test_a_retrieval_score_of_the_users_own_is_text_like_any_other():
    scorer = LengthScorer()
    node = NodeWithScore(node=TextNode(text="a", metadata={"retrieval_score": "mine"}))
    BGERerank(scorer=scorer, metadata_mode=MetadataMode.ALL).postprocess_nodes([node], query_str=QUERY)
    assert "mine" in scorer.calls[0][1][0]


class Filtered(BGERerank):
    """A subclass as users write them, for one of two methods."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        return super()._postprocess_nodes([node for node in nodes if "bamboo" not in node.text], query_bundle)


class OneNode:
    def _postprocess_nodes(self, nodes, query_bundle=None):
        return nodes[:1]


class TwoNodes:
    async def _apostprocess_nodes(self, nodes, query_bundle=None):
        return nodes[:2]


class WithOneNode(OneNode, BGERerank):
    pass


class WithTwoNodes(TwoNodes, BGERerank):
    def _postprocess_nodes(self, nodes, query_bundle=None):
        return nodes[:1]


async def test_methods_that_are_inherited_before_the_rerankers_count_as_its_own(nodes):
    """Those of a mixin were passed by, or replaced."""
    assert await WithOneNode(model=MODEL).apostprocess_nodes(nodes, query_str=QUERY) == nodes[:1]
    assert WithOneNode(model=MODEL).postprocess_nodes_batch([(nodes, QUERY)]) == [nodes[:1]]
    assert await WithTwoNodes(model=MODEL).apostprocess_nodes(nodes, query_str=QUERY) == nodes[:2]


async def test_a_subclass_that_overrides_the_blocking_method_means_all_of_them(nodes):
    """Async calls and batches went past it."""
    reranker = Filtered(model=MODEL, top_n=None)
    for found in (
        reranker.postprocess_nodes(nodes, query_str=QUERY),
        await reranker.apostprocess_nodes(nodes, query_str=QUERY),
        *reranker.postprocess_nodes_batch([(nodes, QUERY)] * 2),
    ):
        assert len(found) == len(TEXTS) - 1
        assert not any("bamboo" in node.text for node in found)

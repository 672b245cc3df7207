"""Several queries at once through the adapters."""

import pytest
from conftest import DATA
from langchain_core.documents import Document
from langchain_core.runnables import RunnablePassthrough
from llama_index.core.schema import NodeWithScore, TextNode

from bge_rerank_plugins import Scorer, langchain, llama_index

MODEL = str(DATA / "encoder")
QUERIES = ["panda", "datetime", "nothing", "bear of Sichuan"]
TEXTS = [["a bear", "giant panda", "strings"], ["parses a date"], [], [f"Sichuan {i}" for i in range(6)]]


class OnlyScore:
    """A scorer of somebody else, with the one method that is asked for."""

    def score(self, query: str, passages: list[str]) -> list[float]:
        assert passages
        return [float(len(passage)) for passage in passages]


@pytest.mark.parametrize("options", [{"model": MODEL}, {"scorer": OnlyScore()}])
def test_documents_of_a_batch_come_back_as_one_by_one(options: dict[str, object]) -> None:
    reranker = langchain.BGERerank(top_n=2, **options)  # type: ignore[arg-type]
    requests = [([Document(text) for text in texts], query) for query, texts in zip(QUERIES, TEXTS, strict=True)]
    batch = reranker.compress_documents_batch(requests)
    single = [reranker.compress_documents(documents, query) for documents, query in requests]
    assert [[d.page_content for d in each] for each in batch] == [[d.page_content for d in each] for each in single]
    scores = [d.metadata["relevance_score"] for each in batch for d in each]
    assert scores == pytest.approx([d.metadata["relevance_score"] for each in single for d in each], abs=1e-5)
    reranker.close()


@pytest.mark.parametrize("options", [{"model": MODEL}, {"scorer": OnlyScore()}])
def test_nodes_of_a_batch_come_back_as_one_by_one(options: dict[str, object]) -> None:
    reranker = llama_index.BGERerank(top_n=2, **options)  # type: ignore[arg-type]
    requests = [
        ([NodeWithScore(node=TextNode(text=text)) for text in texts], query)
        for query, texts in zip(QUERIES, TEXTS, strict=True)
    ]
    batch = reranker.postprocess_nodes_batch(requests)
    single = [reranker.postprocess_nodes(nodes, query_str=query) for nodes, query in requests]
    assert [[n.node_id for n in each] for each in batch] == [[n.node_id for n in each] for each in single]
    scores = [n.score for each in batch for n in each]
    assert scores == pytest.approx([n.score for each in single for n in each], abs=1e-5)
    reranker.close()


def test_events_of_a_batch_are_closed_when_it_fails() -> None:
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler

    names: list[str] = []

    class Names(BaseEventHandler):
        def handle(self, event: object, **kwargs: object) -> None:
            names.append(type(event).__name__)

    handler = Names()
    get_dispatcher().add_event_handler(handler)
    try:
        reranker = llama_index.BGERerank(model="/no/such/model")
        nodes = [NodeWithScore(node=TextNode(text="a"))]
        with pytest.raises(ValueError, match="no such directory"):
            reranker.postprocess_nodes_batch([(nodes, "a"), (nodes, "b")])
    finally:
        get_dispatcher().event_handlers.remove(handler)
    assert sorted(names) == ["ReRankEndEvent"] * 2 + ["ReRankStartEvent"] * 2 + ["SpanDropEvent"]


async def test_a_runnable_reranks_in_a_chain_and_its_batches_share_packs() -> None:
    with Scorer(MODEL, query_instruction="counted ") as counted:
        reranker = langchain.BGERerank(scorer=counted, top_n=1)
        documents = [Document(text) for text in TEXTS[0]]
        chain = {"documents": lambda _: documents, "query": RunnablePassthrough()} | reranker.as_runnable()
        expected = [reranker.compress_documents(documents, query) for query in QUERIES]
        assert chain.invoke(QUERIES[0]) == expected[0]
        assert await chain.ainvoke(QUERIES[1]) == expected[1]
        given = [{"documents": documents, "query": query} for query in QUERIES * 25]
        before = counted.stats()["packs"]
        results = await reranker.as_runnable().abatch(given)
        packs = counted.stats()["packs"] - before
    assert [[d.page_content for d in each] for each in results] == [
        [d.page_content for d in each] for each in expected * 25
    ]
    assert packs < 100


def test_a_bad_request_of_a_batch_is_named() -> None:
    reranker = langchain.BGERerank(model=MODEL)
    with pytest.raises(ValueError, match=r"requests\[1\]: query=None"):
        reranker.compress_documents_batch([([Document("a")], "b"), ([Document("a")], None)])  # type: ignore[list-item]

"""The embedded LLM rerankers: small, whole, and far better than chance on text that they were not trained on."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from safetensors import safe_open

from bge_rerank_plugins import Scorer
from bge_rerank_plugins import langchain as for_langchain
from bge_rerank_plugins import llama_index as for_llama_index
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.evaluation import Report, bm25_run, evaluate, standard_library_set
from bge_rerank_plugins.models import EMBEDDED_LLMS, embedded_llm

LENGTHS: dict[str, Any] = {"max_length": 64, "query_max_length": 20}
QUERY = "Parse a date from a string."
PASSAGES = [
    "threading.Thread.start\nIt must be called at most once per thread object.",
    "datetime.datetime.strptime\nReturn a datetime that the string stands for, parsed according to a format.",
    "os.remove\nRemove a file.",
]
BEST = PASSAGES[1]


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    data = standard_library_set().sampled(120)
    scorers = {
        "decoder": Scorer("embedded-decoder", **LENGTHS),
        **{f"layer {n}": Scorer("embedded-layerwise", cutoff_layer=n, **LENGTHS) for n in (2, 5, 8)},
    }
    yield evaluate(data, bm25_run(data, 20), scorers, first_stage="BM25")
    for scorer in scorers.values():
        scorer.close()


@pytest.mark.parametrize("name", EMBEDDED_LLMS)
def test_the_files_are_small_and_in_bfloat16(name: str) -> None:
    folder = embedded_llm(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    with safe_open(folder / "model.safetensors", framework="numpy") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert "For demos and tests only" in (folder / "README.md").read_text(encoding="utf-8")


def test_they_rank_far_better_than_chance(report: Report) -> None:
    """Of 20 candidates in random order the right one has a reciprocal rank of 0.18 on average, where it is among them."""
    chance = sum(1 / rank for rank in range(1, 21)) / 20 * report.recall
    for system in report.systems:
        if system.name in ("decoder", "layer 5", "layer 8"):
            assert system.quality.mean["RR@10"] > 1.8 * chance, system.name


def test_deeper_layers_are_better_than_shallow_ones(report: Report) -> None:
    quality = {system.name: system.quality.mean["RR@10"] for system in report.systems}
    assert min(quality["layer 5"], quality["layer 8"]) > quality["layer 2"] + 0.05


@pytest.mark.parametrize("name", EMBEDDED_LLMS)
def test_both_adapters_and_the_command_line_take_them_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(for_langchain.BGERerank(model=name, top_n=1)) as reranker:
        documents = reranker.compress_documents([Document(text) for text in PASSAGES], QUERY)
    assert [document.page_content for document in documents] == [BEST]
    with closing(for_llama_index.BGERerank(model=name, top_n=1)) as postprocessor:
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
        assert [node.text for node in postprocessor.postprocess_nodes(nodes, query_str=QUERY)] == [BEST]
    assert main(["info", name]) == 0
    assert name.removeprefix("embedded-") in capsys.readouterr().out

"""Checkpoints of 300 million parameters with the published models' layer counts and head widths, in bfloat16 on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_models import FAMILIES, make_checkpoint

QUERY = "what is panda?"
PASSAGES = ["hi", "The giant panda is a bear species endemic to China.", "datetime parses a string"]


@pytest.fixture(scope="module", params=["decoder", "layerwise"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    return str(make_checkpoint(request.param, FAMILIES[request.param].shapes["bench"], folder, torch.bfloat16))


def test_both_adapters_rank_with_it(directory: str) -> None:
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode

    from bge_rerank_plugins import langchain, llama_index

    compressor = langchain.BGERerank(model=directory, dtype="bfloat16", top_n=2)
    documents = compressor.compress_documents([Document(page_content=text) for text in PASSAGES], QUERY)
    postprocessor = llama_index.BGERerank(model=directory, dtype="bfloat16", top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    ranked = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [node.text for node in ranked] == [document.page_content for document in documents]
    assert [node.score for node in ranked] == pytest.approx([d.metadata["relevance_score"] for d in documents])
    compressor.close()
    postprocessor.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_no_second_copy_of_the_weights(directory: str) -> None:
    """Bfloat16 weights that pass through float32 on the way would take three times their size."""
    program = f"""
import json, threading
from pathlib import Path
import torch, transformers
from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core import engine

def resident(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

scorer = Scorer({directory!r}, dtype="bfloat16")
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
scorer.warmup()
print(json.dumps(resident("VmHWM") - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=True)
    weights = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    assert json.loads(done.stdout) < 1.3 * weights

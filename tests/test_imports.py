"""Importing is instant and has no effects."""

import subprocess
import sys

import pytest

import bge_rerank_plugins


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    "module",
    ["bge_rerank_plugins", "bge_rerank_plugins.scorer", "bge_rerank_plugins.settings", "bge_rerank_plugins.cli"],
)
def test_importing_loads_neither_torch_nor_a_framework(module: str) -> None:
    heavy = run(
        f"import sys, {module}; "
        "print([m for m in ('torch', 'transformers', 'langchain_core', 'llama_index', 'peft') if m in sys.modules])"
    )
    assert heavy == "[]\n"


def test_the_public_names_are_these() -> None:
    assert bge_rerank_plugins.__all__ == ["RankedPassage", "RerankSettings", "Scorer"]
    assert all(getattr(bge_rerank_plugins, name).__name__ == name for name in bge_rerank_plugins.__all__)
    assert set(bge_rerank_plugins.__all__) <= set(dir(bge_rerank_plugins))
    with pytest.raises(AttributeError, match="Reranker"):
        bge_rerank_plugins.Reranker  # noqa: B018

"""Importing is instant and has no effects."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bge_rerank_plugins

LAZY = ("bge_rerank_plugins", "bge_rerank_plugins.evaluation", "bge_rerank_plugins.finetune")


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


@pytest.mark.parametrize("name", LAZY)
def test_what_is_loaded_lazily_is_listed(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))


def test_a_type_checker_knows_a_wrong_name(tmp_path: Path) -> None:
    """It took every name."""
    program = tmp_path / "program.py"
    packages = {name: importlib.import_module(name) for name in LAZY}
    program.write_text("".join(f"from {name} import Scorrer, {packages[name].__all__[-1]}\n" for name in LAZY))
    files = [str(program), *(str(package.__file__) for package in packages.values())]
    options = ["--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path / 'cache'}", "--no-error-summary"]

    done = subprocess.run([sys.executable, "-m", "mypy", *options, *files], capture_output=True, text=True, check=False)

    errors = done.stdout.splitlines()
    assert len(errors) == len(LAZY)
    assert all(f'Module "{name}" has no attribute "Scorrer"' in error for name, error in zip(LAZY, errors, strict=True))

"""The README is true: its Python runs as it stands, its commands are one line each and pinned, its file tree exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LANGSMITHS_WARNING

from bge_rerank_plugins.demo import PUBLISHED_MODEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [code for language, code in BLOCKS if language == "bash"]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code: str) -> None:
    """Each in a process of its own, with the embedded model in place of the published one, which is 2 GB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": f"default,{LANGSMITHS_WARNING}"}
    ran = subprocess.run(
        [sys.executable, "-c", code.replace(PUBLISHED_MODEL, "embedded")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    for line in re.findall(r"^ *print\(.*# (.+)$", code, flags=re.MULTILINE):
        assert line in ran.stdout.splitlines()


def test_there_are_python_blocks_for_each_way_in() -> None:
    text = "\n".join(PYTHON)
    for name in (
        "from bge_rerank_plugins import Scorer",
        "bge_rerank_plugins.langchain",
        "bge_rerank_plugins.llama_index",
    ):
        assert name in text
    assert PUBLISHED_MODEL in text


def test_the_first_two_blocks_run_the_demo_and_the_tests_from_nothing() -> None:
    (first, demo), (second, tests) = BLOCKS[:2]

    assert (first, second) == ("bash", "bash")
    assert demo.count("\n") == tests.count("\n") == 1, "one command line each"
    assert demo.rstrip().endswith("bge-rerank demo")
    assert "-m pytest" in tests
    for command in (demo, tests):
        assert "-m venv " in command
        assert "-c constraints.txt" in command


def test_constraints_pin_exact_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]

    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*( ; python_version [<>=]+ \"3\.\d+\")?", pin), pin


def test_the_file_tree_exists() -> None:
    (tree,) = [code for _, code in BLOCKS if code.startswith("bge_rerank_plugins/\n")]
    folder = Path()
    for line in tree.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+).*", line).groups()  # type: ignore[union-attr]
        folder = Path(*folder.parts[: len(indent) // 2])
        assert (ROOT / folder / name).exists(), line
        if name.endswith("/"):
            folder /= name

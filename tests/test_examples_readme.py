"""examples/README.md is true: its programs run, its files, tasks and flags exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bge_rerank_plugins.cli import _parser
from bge_rerank_plugins.demo import PUBLISHED_MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = (EXAMPLES / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = [code for language, _, code in BLOCKS if language == "python"]
OFFLINE = [code for code in PROGRAMS if "mteb" not in code]
MTEB = [code for code in PROGRAMS if "mteb" in code]
TASKS = re.findall(r"^\| `(\w+[\w-]*)` \|", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("code", OFFLINE, ids=range(len(OFFLINE)))
def test_programs_run(code: str) -> None:
    """Each in a process of its own, with the embedded model in place of the published one, which is 2 GB."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace(PUBLISHED_MODEL, "embedded")],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert re.match(r"\{'(mine_map|first stage)': ", ran.stdout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mteb's own
def test_mteb_has_the_tasks_and_functions_that_are_named() -> None:
    mteb = pytest.importorskip("mteb", reason="mteb needs Python 3.11 or later")
    names = [name for name in TASKS if not name.startswith("bge-")]
    names += [name for code in MTEB for name in re.findall(r'"([A-Z]\w+(?:-reranking)?)"', code)]

    assert len(names) >= 27
    assert {task.metadata.name for task in mteb.get_tasks(sorted(set(names)))} == set(names)
    for code in MTEB:
        compile(code, "README.md", "exec")
        for name in re.findall(r"mteb\.(\w+)", code):
            assert hasattr(mteb, name)
        for name in re.findall(r"task\.(\w+)", code):
            assert hasattr(mteb.get_task("SciFact"), name)


def test_the_files_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://") or (EXAMPLES / target).exists(), target
    listed = set(re.findall(r"\]\(([\w.]+)\)", TEXT))
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} <= listed


def test_the_commands_can_be_parsed() -> None:
    console = "".join(code for language, _, code in BLOCKS if language == "console").replace("\\\n", " ")
    commands = re.findall(r"^\$ bge-rerank (.+)$", console, flags=re.MULTILINE)

    assert len(commands) >= 6
    for command in commands:
        _parser().parse_args(shlex.split(command))

"""Where an export goes: into a new directory or one that is there and empty, whole or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import DATA

from bge_rerank_plugins import RerankSettings, export
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.export import export_onnx
from bge_rerank_plugins.onnx import GRAPH, OnnxScorer

ENCODER = str(DATA / "encoder")


@pytest.mark.parametrize("kind", ["the working directory", "a link", "a directory"])
def test_an_empty_directory_is_filled_and_not_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some cannot be replaced: the working directory, a link, what a disk is mounted on. The export failed after all its work."""
    directory = tmp_path / "empty"
    directory.mkdir()
    before = directory.stat()
    given = {"the working directory": ".", "a link": str(tmp_path / "link"), "a directory": str(directory)}[kind]
    if kind == "a link":
        (tmp_path / "link").symlink_to(directory)
    names = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(directory)

    assert main(["export-onnx", ENCODER, given]) == 0

    assert os.path.samestat(directory.stat(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not list(directory.glob(".export-*"))
    with OnnxScorer(str(directory)) as scorer:
        assert len(scorer.score("panda", ["bear"])) == 1


@pytest.mark.parametrize("is_there", [True, False])
def test_a_graph_that_differs_leaves_nothing(is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    directory = tmp_path / "made"
    if is_there:
        directory.mkdir()

    with pytest.raises(ValueError, match="differ from torch's"):
        export_onnx(RerankSettings(model=ENCODER), directory)

    assert list(tmp_path.rglob("*")) == ([directory] if is_there else [])


def test_a_link_to_nothing_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")

    assert main(["export-onnx", str(DATA / "decoder"), str(tmp_path / "link")]) == 2

    assert "link: there is something already" in capsys.readouterr().err


def test_what_came_into_the_directory_meanwhile_is_kept(tmp_path: Path) -> None:
    made, directory = tmp_path / "made", tmp_path / "directory"
    shutil.copytree(ENCODER, made)
    (made / GRAPH).parent.mkdir()
    names = sorted(path.name for path in made.iterdir())
    directory.mkdir()
    (directory / "tokenizer.json").write_text("mine")

    with pytest.raises(ValueError, match=r"tokenizer\.json: there is something already"):
        export._move_into(directory, made)

    assert [path.name for path in directory.iterdir()] == ["tokenizer.json"]
    assert (directory / "tokenizer.json").read_text() == "mine"
    assert sorted(path.name for path in made.iterdir()) == names

"""The commands `layers` and `verify`."""

import json
import os
from pathlib import Path

import pytest
from conftest import DATA, ORACLE

from bge_rerank_plugins import published
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.published import PublishedScore
from bge_rerank_plugins.ranking import sigmoid


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    lines = [{"query": f"panda {i}", "passages": [f"bear {j} of Sichuan" for j in range(12)]} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_layers_prints_a_row_for_every_layer_and_draws_them(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "layers.png"
    assert main(["layers", str(DATA / "layerwise"), "--data", data, "--plot", str(plot)]) == 0
    *lines, legend = capsys.readouterr().out.splitlines()
    assert legend == "tau and overlap: how far the order is that of the top layer, 11"
    assert [line.split()[0] for line in lines] == ["layer", *map(str, range(3, 12))]
    assert lines[-1].split()[1:3] == ["1.000", "1.000"]
    assert max(map(len, lines)) <= 80
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_layers_that_order_nothing_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"query": "panda", "passages": ["bear", "bear"]}\n')
    assert main(["layers", str(DATA / "layerwise"), "--data", str(tmp_path / "data.jsonl")]) == 0
    *_, last, _, note = capsys.readouterr().out.splitlines()
    assert last.split()[:3] == ["11", "-", "1.000"]
    assert note.startswith("-: all scores of that layer, or of the top one, are equal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", str(DATA / "encoder"), "--data", "DATA"], "not a layerwise checkpoint"),
        (["layers", str(DATA / "layerwise"), "--data", "/no/such/file"], "/no/such/file"),
        (["layers", str(DATA / "layerwise"), "--data", os.devnull], f"{os.devnull}: no lines"),
        (
            ["layers", str(DATA / "layerwise"), "--data", "/no/such/file", "--plot", "/no/such/x.png"],
            "no such directory",
        ),
        (["layers", str(DATA / "layerwise"), "--data", "/no/such/file", "--plot", str(DATA)], "that is a directory"),
        (
            ["layers", str(DATA / "layerwise"), "--data", "/no/such/file", "--plot", "x.foo"],
            "--plot x.foo: .foo is none of",
        ),
        (["verify", "BAAI/bge-reranker-base"], "no published scores are known, only for BAAI/bge-reranker-v2-m3"),
        (["verify", "BAAI/bge-reranker-v2-m3", "--local-files-only"], "nothing was verified, the model cannot be had"),
        (["verify", "/no/such/dir", "--card", "BAAI/bge-reranker-v2-m3"], "no such directory"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], message: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([data if argument == "DATA" else argument for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_verify_compares_each_score_and_fails_on_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny checkpoint with the oracle's scores as the card's: the real weights cannot be had everywhere."""
    case = ORACLE["cases"][0]
    card = [PublishedScore(q, p, s, sigmoid(s)) for (q, p), s in zip(ORACLE["pairs"], case["scores"], strict=True)]
    arguments = ["verify", str(DATA / "encoder"), "--card", "a-card"]
    monkeypatch.setitem(published.PUBLISHED, "a-card", tuple(card))
    assert main(arguments) == 0
    assert capsys.readouterr().out.count(" ok\n") == len(card)
    monkeypatch.setitem(
        published.PUBLISHED, "a-card", (*card[:-1], PublishedScore(card[-1].query, "another", 9.0, 1.0))
    )
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out.count(" ok\n") == len(card) - 1
    assert captured.out.count("DIFFERS") == 1
    assert "differ from the published ones by more than 0.05" in captured.err

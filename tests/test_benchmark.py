"""The benchmark's contenders, which live in processes of their own, score as they do in this one."""

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmark import _tried
from benchmark_peers import BFLOAT16, CONTENDERS, INT8, OURS, PeerMissing
from benchmark_process import Contender
from conftest import DATA
from rich.console import Console

from bge_rerank_plugins import Scorer

QUERY, PASSAGES = "what is a panda?", ["a bear", "", "the giant panda of Sichuan " * 4]


def test_a_contender_scores_as_in_this_process_and_says_how_long_it_took() -> None:
    with Scorer(str(DATA / "encoder")) as scorer:
        expected = scorer.score(QUERY, PASSAGES)
    with Contender("encoder", OURS, DATA / "encoder", "float32", "cpu") as contender:
        scores, seconds = contender.score(QUERY, PASSAGES)
        again, _ = contender.score(QUERY, PASSAGES)
    assert scores == again == pytest.approx(expected, abs=1e-5)
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    ("name", "dtype", "device", "reason"),
    [
        (INT8, torch.float32, "cuda", "int8 is for CPUs"),
        (BFLOAT16, torch.bfloat16, "cpu", "the whole run is in bfloat16"),
    ],
)
@pytest.mark.parametrize("family", ["encoder", "decoder", "layerwise"])
def test_a_contender_in_another_precision_is_another_and_not_for_every_run(
    family: str, name: str, dtype: torch.dtype, device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bge_rerank_plugins.core.device.cpu_has_bfloat16", lambda: True)  # or emulates it
    ours, other = (CONTENDERS[family][one](DATA / family, torch.float32, "cpu") for one in (OURS, name))
    assert ours(QUERY, PASSAGES) != other(QUERY, PASSAGES) == pytest.approx(ours(QUERY, PASSAGES), abs=0.5)
    with pytest.raises(PeerMissing, match=reason):
        CONTENDERS[family][name](DATA / family, dtype, device)


def test_bfloat16_does_not_compete_where_a_processor_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bge_rerank_plugins.core.device.cpu_has_bfloat16", lambda: False)
    with pytest.raises(PeerMissing, match="no bfloat16 arithmetic"):
        CONTENDERS["encoder"][BFLOAT16](DATA / "encoder", torch.float32, "cpu")


def test_what_goes_wrong_in_a_contenders_process_is_raised_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')

    def score() -> None:
        with Contender("encoder", OURS, tmp_path, "float32", "cpu") as contender:
            contender.score(QUERY, PASSAGES)

    with pytest.raises(ValueError, match="NoSuchModel"):
        score()
    missing = pickle.loads(pickle.dumps(PeerMissing("pip install it")))
    assert isinstance(missing, PeerMissing)
    assert str(missing) == "pip install it"


def test_a_peer_that_fails_is_named_and_left_out_and_this_package_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with Contender("encoder", OURS, tmp_path, "float32", "cpu") as broken:
        score = partial(broken.score, QUERY, PASSAGES)
        assert _tried("a peer", score, Console(width=1000)) is None
        printed = capsys.readouterr().out
        with pytest.raises(ValueError, match="NoSuchModel"):
            _tried(OURS, score, Console(width=1000))
    assert printed.startswith("failed: a peer (")
    assert "NoSuchModel" in printed

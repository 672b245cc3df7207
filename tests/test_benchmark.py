"""The benchmark's contenders, which live in processes of their own, score as they do in this one."""

import argparse
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmark import Result, _options, _show, _tried, _workload_names, _workloads
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "CrossEncoder"], "--peer 'CrossEncoder': none of 'this package', "),
        (["--family", "decoder", "--peer", "CrossEncoder, defaults"], "none of 'this package', "),
        (["--runs", "0"], "--runs 0: at least 1"),
        (["--json", "no/such/folder/results.json"], "--json no/such/folder/results.json: cannot be written"),
        (["--plot", "results.abc"], "--plot results.abc: .abc is none of"),
        (
            ["--workload", "20 short", "--workload", "100 docs"],
            "--workload '100 docs': none of '20 short', '100 docstrings'",
        ),
        (["--device", "nonsense"], "device='nonsense': not one of cpu, cuda, "),
        (["--device", "cuda:99"], "device='cuda:99': not on this machine"),
        (["--device", "cuda:x"], "device='cuda:x': not one of cpu, cuda, "),
        (["--load", "--device", "nonsense"], "device='nonsense': not one of cpu, cuda, "),
        (["--tokenizer", "/no/such.json"], "--tokenizer /no/such.json: no such file"),
        (["--family", "decoder", "--tokenizer", "pyproject.toml"], "--tokenizer pyproject.toml: for cross-encoders"),
        (["--load", "--plot", "results.png"], "--plot is not for --load"),
        (["--load", "--family", "decoder"], "--family is not for --load"),
    ],
)
def test_what_the_benchmark_cannot_do_is_said_before_it_measures(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["encoder", "decoder"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_names_of_workloads_are_known_before_there_is_a_checkpoint(family: str, device: str) -> None:
    options = argparse.Namespace(family=family, device=device)
    workloads = _workloads(options, [f"document {number}" for number in range(300)], DATA / "encoder")
    assert [workload.name for workload in workloads] == _workload_names(options)


def test_a_peer_that_is_missing_is_named_with_all_of_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise PeerMissing("pip install 'bge-rerank-plugins[onnx-export]'")

    assert _tried("a peer", missing, Console(width=1000)) is None
    assert capsys.readouterr().out == "skipped: a peer (pip install 'bge-rerank-plugins[onnx-export]')\n"


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


def test_the_table_has_room_for_names_at_80_columns_and_no_share_where_no_ceiling_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def result(contender: str, seconds: float, ceiling: float | None) -> Result:
        return Result("100 docstrings", contender, 100, 14190, [seconds], 2.54, ceiling, 3e-6)

    rows = [result(OURS, 6.279, 0.4536), result(INT8, 3.222, None), result("FlagEmbedding, defaults", 137.886, 0.4536)]
    _show(Console(width=80), rows)
    printed = capsys.readouterr().out
    ours, int8 = (line.split() for line in printed.splitlines() if line.startswith(" this"))
    assert ours == ["this", "package", "6.279", "6.279", "15.9", "2260", "89%"]
    assert int8 == ["this", "package,", "int8", "3.222", "3.222", "31.0", "4404", "-", "0.513", "x", "3e-06"]
    assert " FlagEmbedding, " in printed
    assert "137.9" in printed

"""`bge-rerank eval`, from its arguments to its exit status, on a tiny checkpoint."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA
from hub import Hub, put_into_cache

from bge_rerank_plugins.arguments import add_fields
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.evaluation import EvaluationSettings

ENCODER, LAYERWISE = str(DATA / "encoder"), str(DATA / "layerwise")
WORDS = ["panda", "bear", "bamboo", "Sichuan", "forest", "river", "stone", "mountain", "rice", "tea", "silk", "road"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    beir = tmp_path / "words"
    (beir / "qrels").mkdir(parents=True)
    passages = [f"{one} and {two}" for one in WORDS for two in WORDS if one != two]
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"p{i}", "title": "", "text": text}) + "\n" for i, text in enumerate(passages))
    )
    (beir / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"where is the {word}?"}) + "\n" for i, word in enumerate(WORDS))
    )
    (beir / "qrels" / "test.tsv").write_text("".join(f"q{i}\tp{11 * i + i % 5}\t1\n" for i in range(len(WORDS))))
    return beir


def scored(output: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (output / "scores.jsonl").read_text().splitlines()]


def test_models_and_layers_stand_in_one_table_and_one_plot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["eval", str(folder), "--models", f"{ENCODER}, {LAYERWISE}", "--cutoff-layers", "4,11", "--top-k", "5"]

    assert main([*arguments, "--output", str(output), "--plot", str(tmp_path / "plot.png")]) == 0

    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert lines[0] == "words: 12 queries, 132 passages; BM25 found 60 candidates."
    assert lines[1].split() == ["nDCG@10", "MRR@10", "MAP", "R@10", "hit@10", "p", "ms", "pairs/s"]
    assert [line.split()[0] for line in lines[2:6]] == ["BM25", "encoder", "layerwise@4", "layerwise@11"]
    assert max(map(len, lines)) <= 80
    assert len(scored(output)) == len(set(scored(output))) == 36
    assert sorted(path.name for path in output.rglob("*")) == sorted(
        ["scores.jsonl", "results.json", "per_query.tsv", "plot.png", "runs"]
        + [f"{name}.trec" for name in ("BM25", "encoder", "layerwise@4", "layerwise@11")]
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    assert main([*arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[1:6] == lines[1:6]
    assert len(scored(output)) == 36, "nothing is scored again"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_evaluation_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # Long passages, so that there is time to kill it in the middle.
    texts = [f"{word} " * 400 for word in WORDS for _ in range(11)]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    )
    arguments = ["eval", str(folder), "--models", ENCODER, "--top-k", "11", "--output", str(output)]
    with subprocess.Popen([sys.executable, "-m", "bge_rerank_plugins", *arguments], cwd=DATA.parents[1]) as process:
        while not (output / "scores.jsonl").exists() or len(scored_whole(output)) < 2:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.kill()
    before = scored_whole(output)
    assert 2 <= len(before) < len(WORDS), "it was killed in the middle"

    assert main(arguments) == 0

    after = scored_whole(output)
    assert after[: len(before)] == before, "with the times of then"
    assert len(after) == len({json.loads(line)["key"] for line in after}) == len(WORDS)


def scored_whole(output: Path) -> list[bytes]:
    """The lines that are complete."""
    return (output / "scores.jsonl").read_bytes().split(b"\n")[:-1]


def test_a_rerank_set_ranks_all_of_each_querys_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.jsonl"
    record = {"query": "panda", "positive": ["the panda"], "negative": [f"bear {i}" for i in range(150)]}
    path.write_text(f"{json.dumps(record)}\n{json.dumps({**record, 'query': 'zebra'})}\n")

    assert main(["eval", str(path), "--models", ENCODER, "--measures", "AP"]) == 0

    out = capsys.readouterr().out
    assert "own: 2 queries, 151 passages; BM25 found 302 candidates." in out
    assert "The candidates hold 100.0% of the relevant passages" in out


def test_a_given_run_is_reranked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "other.trec"
    run.write_text("".join(f"q{i} Q0 p{11 * i + j} {j} {9 - j} x\n" for i in range(12) for j in range(5)))
    files = ["--corpus", "corpus.jsonl", "--queries", "queries.jsonl", "--qrels", "qrels/test.tsv"]
    files = [part if part.startswith("--") else str(folder / part) for part in files]

    assert main(["eval", *files, "--run", str(run), "--models", ENCODER, "--top-k", "3"]) == 0

    out = capsys.readouterr().out
    assert "test: 12 queries, 132 passages; other.trec found 36 candidates." in out
    assert re.search(r"^other.trec +\d", out, re.MULTILINE)


def test_an_encoder_can_find_the_candidates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bge_rerank_plugins.models import embedded_base

    base = str(embedded_base())
    assert main(["eval", str(folder), "--models", ENCODER, "--first-stage", base, "--sample", "2", "--top-k", "3"]) == 0

    assert "words: 2 queries, 132 passages; model found 6 candidates." in capsys.readouterr().out


def test_an_encoder_comes_from_where_the_options_say(folder: Path, tmp_path: Path) -> None:
    """It was looked for on the hub also with `--local-files-only`, in another cache and without the token."""
    from bge_rerank_plugins.models import embedded_base

    put_into_cache(tmp_path / "cache", "some-org/mini", embedded_base())
    arguments = ["eval", str(folder), "--models", ENCODER, "--first-stage", "some-org/mini", "--sample", "2"]
    local = [*arguments, "--cache-dir", str(tmp_path / "cache"), "--local-files-only", "--token", "first"]
    code = (
        f"from bge_rerank_plugins.cli import main\nassert main({local}) == 0\nmain({[*arguments, '--token', 'second']})"
    )
    with Hub() as hub:
        ran = hub.run(code, tmp_path / "home")

    assert "mini found 200 candidates." in ran.stdout, ran.stderr
    assert {token for path, token in hub.asked if "some-org" in path} == {"Bearer second"}, hub.asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("corpus.jsonl", b'{"_id": "p0", "text": "x"}\n{"_id'), "corpus.jsonl:2: not JSON"),
        (("qrels/test.tsv", b"q0\tp0\t1\nq0\tnone\t1\n"), "test.tsv:2: passage 'none' is not in the corpus"),
        (("corpus.jsonl.gz", b"\x1f\x8b\x08\x00"), "corpus.jsonl.gz:1: damaged gzip file"),
    ],
)
def test_corrupt_input_is_one_line_and_status_2_and_nothing_is_overwritten(
    folder: Path, tmp_path: Path, change: tuple[str, bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in ("results.json", "scores.jsonl", "per_query.tsv", "plot.png"):
        (output / name).write_text("mine")
    name, content = change
    (folder / name).write_bytes(content)
    if name.endswith(".gz"):
        (folder / name[:-3]).unlink()

    assert main(["eval", str(folder), "--models", ENCODER, "--output", str(output)]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path.read_text() for path in output.iterdir()} == {"mine"}


def test_a_precision_that_this_machine_does_not_have_is_found_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bge_rerank_plugins.core.device.can_multiply_int8", lambda: False)
    assert main(["eval", str(folder), "--models", ENCODER, "--dtype", "int8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "", "candidates were looked for"
    assert "dtype='int8': this torch does not multiply such numbers" in captured.err


def test_an_output_without_matplotlib_is_refused_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["eval", str(folder), "--models", ENCODER, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'pip install "bge-rerank-plugins[eval]"' in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "corpus is missing: give a data set, or its corpus, queries and qrels"),
        (["nowhere"], "nowhere: there is no such file or folder; standard-library needs none"),
        (["nowhere", "--models", "/nowhere"], "nowhere: there is no such file"),
        (["FOLDER", "--split", "dev"], "dev.tsv: No such file or directory"),
        (["FOLDER", "--measures", "beauty"], "measures='beauty': ir_measures does not know it"),
        (["FOLDER", "--models", ","], "--models=',': name at least one model"),
        (["FOLDER", "--models", f"{ENCODER},{ENCODER}"], f"--models: {ENCODER} is named twice"),
        (
            ["FOLDER", "--models", LAYERWISE, "--cutoff-layers", "2"],
            "cutoff_layer=2: this checkpoint scores at layers 3 to",
        ),
        (["FOLDER", "--top-k", "0"], "top_k=0: Input should be greater"),
        (["FOLDER", "--first-stage", "/nowhere"], "first_stage='/nowhere': not 'bm25', and no encoder can be loaded"),
        (["FOLDER", "--first-stage", ""], "first_stage='': String should have at least 1 character"),
        (["FOLDER", "--plot", "/nowhere/plot.png"], "--plot /nowhere/plot.png: cannot be written"),
        (["FOLDER", "--plot", "plot.foo"], "--plot plot.foo: .foo is none of"),
        (["FOLDER", "--output", ""], "--output '': that is no directory"),
        (["FOLDER", "--output", __file__], f"--output {__file__}: that is no directory"),
        (["standard-library", "--qrels", "own"], "--qrels own: goes with a corpus; standard-library has its own"),
        (
            ["standard-library", "--split", "dev"],
            "--split dev: goes with a folder in BEIR's layout; standard-library is",
        ),
        (["FOLDER", "--split", "dev", "--qrels", "own"], "--split dev: --qrels own takes the place of"),
        (["FOLDER", "--run", "own", "--first-stage", "bm25"], "--first-stage bm25: --run own has the candidates"),
        (["FOLDER", "--first-stage-prompt", "query: "], "--first-stage-prompt query: : goes with an encoder"),
        (
            ["standard-library", "--sample", "1", "--top-k", "2", "--ignore-identical-ids"],
            "--ignore-identical-ids True: goes with a corpus",
        ),
        (["FOLDER", "--device", "hpu:9"], "device='hpu:9': "),
        (["FOLDER", "--cutoff-layers", "4"], "--cutoff-layers 4: none of the models is layerwise"),
        (
            ["FOLDER", "--models", LAYERWISE, "--cutoff-layers", "4,5", "--cutoff-layer", "6"],
            "--cutoff-layer 6: --cutoff-layers says which",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [] if "--models" in arguments else ["--models", ENCODER]
    assert main(["eval", *(str(folder) if a == "FOLDER" else a for a in arguments), *models]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no such directory"),
        ({"architectures": ["T5Model"]}, "names the architecture T5Model, which is not supported"),
        ({"num_labels": 3}, "3 labels"),
    ],
    ids=["no directory", "architecture", "labels"],
)
def test_a_model_that_cannot_be_used_is_found_before_the_first_one_is_scored(
    config: dict[str, object] | None,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = tmp_path / "second"
    if config is not None:
        shutil.copytree(ENCODER, second)
        published = json.loads((second / "config.json").read_text())
        (second / "config.json").write_text(json.dumps(published | config))
    output = tmp_path / "out"

    assert main(["eval", str(folder), "--models", f"{ENCODER},{second}", "--output", str(output)]) == 2

    captured = capsys.readouterr()
    assert f"model='{second}'" in captured.err
    assert message in captured.err
    assert captured.out == ""
    assert not output.exists()


def test_a_first_stage_and_a_reranker_of_one_name_are_told_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "encoder"
    run.write_text("q0 Q0 p0 1 9 x\n")

    assert main(["eval", str(folder), "--run", str(run), "--models", ENCODER]) == 0

    assert f"{run} found 1 candidates" in capsys.readouterr().out


def test_a_reranker_may_be_called_like_the_first_stage(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was "named twice"."""
    shutil.copytree(ENCODER, tmp_path / "BM25")
    monkeypatch.chdir(tmp_path)

    for place in (str(tmp_path / "BM25"), "BM25"):
        assert main(["eval", str(folder), "--models", place, "--top-k", "2", "--output", "out"]) == 0

        lines = capsys.readouterr().out.splitlines()
        assert "first stage BM25 found 24 candidates." in lines[0]
        assert [re.split(r" {2,}", line)[0] for line in lines[2:4]] == ["first stage BM25", "BM25"]
    assert sorted(path.name for path in Path("out", "runs").iterdir()) == ["BM25.trec", "first-stage-BM25.trec"]


@pytest.mark.parametrize("place", [".", "..", "../model"])
def test_a_directory_is_called_by_its_own_name(
    place: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of "." was empty, and so was a column of the run."""
    shutil.copytree(ENCODER, tmp_path / "model")
    (tmp_path / "model" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "model" / ("inner" if place == ".." else ""))
    output = tmp_path / "out"

    assert main(["eval", str(folder), "--models", place, "--top-k", "2", "--output", str(output)]) == 0

    assert re.search(r"^model +\d", capsys.readouterr().out, re.MULTILINE)
    lines = (output / "runs" / "model.trec").read_text().splitlines()
    assert {len(line.split()) for line in lines} == {6}


def test_help_needs_neither_torch_nor_what_measures() -> None:
    code = (
        "import sys; from bge_rerank_plugins.cli import main\n"
        "try: main(['eval', '--help'])\n"
        "except SystemExit: print({'torch', 'ir_measures', 'scipy', 'numpy', 'bm25s', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert out.endswith("set()\n")


@pytest.mark.parametrize("flag", ["run", "qrels"])
def test_a_rerank_set_has_its_own_candidates_and_judgements(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"query": "panda", "positive": ["bear"], "negative": []}\n')

    assert main(["eval", str(path), "--models", ENCODER, f"--{flag}", "other"]) == 2

    assert f"--{flag} other: goes with a corpus; {path} " in capsys.readouterr().err


def test_identical_ids_are_left_out_of_a_run_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "other.trec"
    run.write_text("p0 Q0 p0 1 9 x\np0 Q0 p1 2 8 x\n")
    (folder / "queries.jsonl").write_text('{"_id": "p0", "text": "panda"}\n')
    (folder / "qrels" / "test.tsv").write_text("p0\tp1\t1\n")
    arguments = ["eval", str(folder), "--run", str(run), "--models", ENCODER, "--measures", "P@1"]

    assert main([*arguments, "--ignore-identical-ids"]) == 0

    out = capsys.readouterr().out
    assert "other.trec found 1 candidates" in out
    assert re.search(r"^other.trec +1\.000", out, re.MULTILINE)


def test_several_measures_are_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag of a list took one."""
    assert main(["eval", str(folder), "--models", ENCODER, "--top-k", "5", "--measures", "nDCG@3,RR@5"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["nDCG@3", "MRR@5"]


def test_a_measure_may_have_commas_of_its_own() -> None:
    """It was cut in the middle."""
    parser = argparse.ArgumentParser()
    add_fields(parser, EvaluationSettings, ["measures"])
    given = parser.parse_args(["--measures", "RBP(p=0.8,rel=1)@10,nDCG@3,P(rel=2)@5"]).measures
    assert given == ["RBP(p=0.8,rel=1)@10", "nDCG@3", "P(rel=2)@5"]
    assert parser.parse_args(["--measures", "RBP(p=0.8,rel=1)@10"]).measures == "RBP(p=0.8,rel=1)@10"

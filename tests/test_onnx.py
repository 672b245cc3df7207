"""Cross-encoders on ONNX Runtime: the same token ids and scores as on torch, in the published layout."""

import asyncio
import copy
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, oracle_cases, printed_by
from hub import Hub
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from strategies import texts

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.cli import main
from bge_rerank_plugins.export import QUANTIZED, export_onnx
from bge_rerank_plugins.langchain import BGERerank
from bge_rerank_plugins.llama_index import BGERerank as LlamaBGERerank
from bge_rerank_plugins.onnx import GRAPH, OnnxScorer, _batches, _providers

ENCODER = str(DATA / "encoder")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("exported") / "encoder"
    report = export_onnx(RerankSettings(model=ENCODER), directory, int8=True)
    assert report.difference < 1e-4
    assert report.correlation is not None
    assert report.correlation > 0.8  # of a random model, whose scores are all alike; the command prints the figure
    return str(directory)


def test_all_files_are_of_the_commit_that_was_found_first(exported: str, tmp_path: Path) -> None:
    later = Path(shutil.copytree(exported, tmp_path / "later"))
    (later / "tokenizer.json").write_text("{}")
    options = {"cache_dir": str(tmp_path / "cache"), "device": "cpu"}
    code = (
        "from bge_rerank_plugins.onnx import OnnxScorer\n"
        f"print(OnnxScorer('some-org/model', **{options}).score('panda', ['a bear']))"
    )
    asked = []
    for _ in range(2):
        with Hub({"some-org/model": [Path(exported), later]}) as hub:
            ran = hub.run(code, tmp_path / "home")
        asked.append({path for path, _ in hub.asked if path.startswith("/some-org/")})
        assert ran.returncode == 0, ran.stderr
        with OnnxScorer(exported, device="cpu") as scorer:
            assert json.loads(ran.stdout) == pytest.approx(scorer.score("panda", ["a bear"]), abs=1e-5)

    found_by = {"/some-org/model/resolve/main/config.json"}
    assert {path for path in asked[0] if "/main/" in path} == found_by
    assert asked[1] == found_by


LOADS = """
import os
import threading
from bge_rerank_plugins import onnx
load, held, done = onnx._load, threading.Event(), threading.Event()
def slow(*arguments):
    held.set()
    interrupt()
    return load(*arguments)
onnx._load = slow
scorer = onnx.OnnxScorer({!r}, device="cpu")
def asked():
    try:
        print(len(scorer.score("a", ["b"])), flush=True)
    except RuntimeError as error:
        print(error, flush=True)
"""


def test_a_scorer_may_be_closed_by_a_signals_handler_while_it_loads(exported: str) -> None:
    """The handler runs in the thread that loads, and waited for itself."""
    ends = "def interrupt():\n    scorer.close()\nasked()\nprint(scorer._graph)"
    assert printed_by(LOADS.format(exported) + ends).splitlines() == ["this OnnxScorer is closed", "None"]


def test_a_child_that_was_forked_while_a_graph_was_being_loaded_is_told(exported: str) -> None:
    """It waited for the lock of a thread that it has not."""
    forks = """
def interrupt():
    done.wait()
thread = threading.Thread(target=scorer.warmup)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    asked()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
done.set()
thread.join()
asked()
"""
    told, scored = printed_by(LOADS.format(exported) + forks).splitlines()
    assert told.startswith("this process was forked while a thread was loading the model")
    assert scored == "1"


@pytest.fixture(scope="module")
def graph(exported: str) -> OnnxScorer:
    return OnnxScorer(exported, device="cpu")


@pytest.mark.parametrize("case", oracle_cases("encoder"))
def test_the_oracle_holds_through_the_graph(
    case: dict[str, Any], oracle_pairs: list[tuple[str, str]], exported: str
) -> None:
    with OnnxScorer(exported, device="cpu", max_length=case["max_length"]) as scorer:
        assert scorer.score_pairs(oracle_pairs) == pytest.approx(case["scores"], abs=1e-4)


@given(query=texts, passages=st.lists(texts, max_size=6))
@hypothesis_settings(max_examples=20, deadline=None)
def test_any_text_scores_as_on_torch(graph: OnnxScorer, query: str, passages: list[str]) -> None:
    with Scorer(ENCODER) as scorer:
        assert graph.score(query, passages) == pytest.approx(scorer.score(query, passages), abs=1e-4)


def test_passages_that_are_alike_once_cut_are_a_tie(exported: str) -> None:
    """In int8 what shares a batch sets the steps of its states: they came out in another order than they were given."""
    alike = ["a bear " * 99 + str(i) for i in range(7)]
    others = ["a bear that eats bamboo " * 99, *("panda " * i for i in range(9))]
    with OnnxScorer(exported, file=QUANTIZED, device="cpu", max_length=64, max_batch_tokens=256) as scorer:
        assert len(set(scorer.score("panda", [*alike, *others])[: len(alike)])) == 1


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_other_architectures_score_as_on_torch(kind: str, classifier_dirs: dict[str, str], tmp_path: Path) -> None:
    export_onnx(RerankSettings(model=classifier_dirs[kind], max_length=40), tmp_path / "made")
    passages = ["", "a bear", "the giant panda " * 30]
    options = {"max_length": 40, "query_instruction": "q: ", "normalize": True}
    with Scorer(classifier_dirs[kind], **options) as torch, OnnxScorer(str(tmp_path / "made"), **options) as graph:
        assert graph.score("panda", passages) == pytest.approx(torch.score("panda", passages), abs=1e-4)


def test_texts_are_cut_on_the_side_that_the_tokenizer_says(exported: str, tmp_path: Path) -> None:
    passages = ["a bear that eats bamboo, and lives in the hills of Sichuan, far away from the sea"]
    scores = {}
    for side in ("right", "left"):
        directory = Path(shutil.copytree(exported, tmp_path / side))
        said = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(said | {"truncation_side": side}))
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(ENCODER) / name, directory)
        with Scorer(str(directory), max_length=20) as torch_scorer:
            scores[side] = torch_scorer.score("panda", passages)
        with OnnxScorer(str(directory), device="cpu", max_length=20) as scorer:
            assert scorer.score("panda", passages) == pytest.approx(scores[side], abs=1e-4)
    assert scores["left"] != pytest.approx(scores["right"], abs=1e-3)


def test_the_side_to_cut_on_is_that_of_the_tokenizers_file_where_nothing_else_is_said(
    exported: str, tmp_path: Path
) -> None:
    """As transformers has it, and so the scorer on torch."""
    directory = Path(shutil.copytree(exported, tmp_path / "model"))
    said = json.loads((directory / "tokenizer.json").read_text())
    cut = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(said | {"truncation": cut}))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("truncation_side", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(ENCODER) / name, directory)
    passages = ["a bear that eats bamboo, and lives in the hills of Sichuan, far away from the sea"]
    with (
        Scorer(str(directory), max_length=20) as torch_scorer,
        OnnxScorer(str(directory), device="cpu", max_length=20) as scorer,
    ):
        assert scorer.score("panda", passages) == pytest.approx(torch_scorer.score("panda", passages), abs=1e-4)
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": None}))
    with pytest.raises(ValueError, match="truncation_side=None"):
        OnnxScorer(str(directory), device="cpu").score("a", ["b"])


def test_all_forms_of_asking_agree(graph: OnnxScorer) -> None:
    passages = [f"{'panda ' * (i % 13)}{i}" for i in range(40)]
    scores = graph.score("a bear", passages)
    pairs = [("a bear", passage) for passage in passages]
    assert graph.score_pairs(pairs) == pytest.approx(scores, abs=1e-5)
    assert graph.score_batch([("a bear", passages), ("x", [])]) == [pytest.approx(scores, abs=1e-5), []]
    assert asyncio.run(graph.ascore("a bear", passages)) == pytest.approx(scores, abs=1e-5)
    ranking = graph.rank("a bear", passages, top_n=3)
    assert [ranked.score for ranked in ranking] == sorted(scores, reverse=True)[:3]
    assert asyncio.run(graph.arank("a bear", passages, top_n=3)) == ranking
    assert all(type(score) is float for score in scores)


def test_scores_do_not_depend_on_the_budget_nor_on_threads(exported: str) -> None:
    passages = [f"{'panda ' * (i % 29)}{i}" for i in range(50)]
    with OnnxScorer(exported, max_batch_tokens=1) as single, OnnxScorer(exported, max_batch_tokens=500) as several:
        want = single.score("a bear", passages)
        with ThreadPoolExecutor(8) as threads:
            for got in threads.map(lambda _: several.score("a bear", passages), range(16)):
                assert got == pytest.approx(want, abs=1e-5)


@given(lengths=st.lists(st.integers(1, 600), max_size=60), budget=st.integers(1, 2000))
def test_batches_hold_every_pair_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


def test_both_adapters_take_it(graph: OnnxScorer) -> None:
    passages = ["datetime", "the giant panda", "Sichuan"]
    best = passages[graph.rank("a bear", passages)[0].index]
    documents = BGERerank(scorer=graph, top_n=1).compress_documents([Document(text) for text in passages], "a bear")
    assert [document.page_content for document in documents] == [best]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in passages]
    (node,) = LlamaBGERerank(scorer=graph, top_n=1).postprocess_nodes(nodes, query_str="a bear")
    assert node.node.get_content() == best


def test_empty_input_loads_nothing() -> None:
    scorer = OnnxScorer("/no/such/model")
    assert scorer.score("a", []) == []
    assert scorer.score_pairs([]) == []
    assert scorer.score_batch([("a", [])]) == [[]]


def test_settings_travel_and_graphs_stay(graph: OnnxScorer) -> None:
    want = graph.score("a", ["b"])
    for copied in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        assert copied._graph is None
        assert copied.score("a", ["b"]) == want


def test_closed_is_closed(exported: str) -> None:
    scorer = OnnxScorer(exported)
    scorer.warmup()
    scorer.close()
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.score("a", ["b"])


def test_the_quantized_graph_is_another_file(exported: str) -> None:
    with OnnxScorer(exported, file=QUANTIZED) as small:
        assert all(math.isfinite(score) for score in small.score("a", ["b", "c"]))
    assert (Path(exported) / QUANTIZED).stat().st_size < (Path(exported) / GRAPH).stat().st_size


def test_weights_beside_the_graph_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: str) -> None:
    from bge_rerank_plugins import export

    monkeypatch.setattr(export, "LARGEST_FILE", 0)
    export_onnx(RerankSettings(model=ENCODER), tmp_path / "big")
    assert len(list((tmp_path / "big" / "onnx").iterdir())) == 2
    with OnnxScorer(exported) as one, OnnxScorer(str(tmp_path / "big")) as two:
        assert one.score("a", ["b", "c"]) == two.score("a", ["b", "c"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / GRAPH).unlink(), "it has no onnx/model.onnx"),
        (lambda d: (d / "tokenizer.json").unlink(), "it has no tokenizer.json"),
        (lambda d: (d / GRAPH).write_bytes(b"no graph"), "onnx/model.onnx cannot be loaded"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gemma"}'), "model_type='gemma' is not supported"),
        (lambda d: (d / "config.json").write_text("{"), "its config.json cannot be read: Expecting"),
        (lambda d: (d / "config.json").write_text("[]"), "its config.json is no object"),
        (lambda d: configured(d, max_position_embeddings=None), "config.json names no max_position_embeddings"),
        (
            lambda d: configured(d, max_position_embeddings="x"),
            "config.json cannot be used: max_position_embeddings='x'",
        ),
        (lambda d: configured(d, vocab_size="x"), "config.json cannot be used: vocab_size='x'"),
        (lambda d: configured(d, model_type=[]), r"config.json cannot be used: model_type=\[\]"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "its tokenizer.json cannot be loaded: EOF while parsing"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), "its tokenizer_config.json is no object"),
        (
            lambda d: (d / "tokenizer_config.json").write_text("{"),
            "its tokenizer_config.json cannot be read: Expecting",
        ),
    ],
)
def test_a_model_that_cannot_be_run_says_why(change: object, message: str, exported: str, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "broken")
    change(tmp_path / "broken")  # type: ignore[operator]
    with pytest.raises(ValueError, match=re.escape(f"model={str(tmp_path / 'broken')!r}: ") + ".*" + message):
        OnnxScorer(str(tmp_path / "broken")).score("a", ["b"])


def configured(directory: Path, **values: object) -> None:
    """Changes values in config.json; None takes one out."""
    config = json.loads((directory / "config.json").read_text()) | values
    left = {name: value for name, value in config.items() if name not in values or value is not None}
    (directory / "config.json").write_text(json.dumps(left))


def test_impossible_options_are_named(exported: str) -> None:
    with pytest.raises(ValueError, match="max_length=9999: the positions of"):
        OnnxScorer(exported, max_length=9999).score("a", ["b"])
    with pytest.raises(ValueError, match="no such directory"):
        OnnxScorer("/no/such/model").score("a", ["b"])
    with pytest.raises(ValueError, match=r"passages\[1\]=None"):
        OnnxScorer(exported).score("a", ["b", None])  # type: ignore[list-item]
    for device in ("mps", "cuda:1", ["cpu"]):
        with pytest.raises(ValueError, match="this ONNX Runtime has CPUExecutionProvider"):
            _providers(device, ["CPUExecutionProvider"])


def test_cuda_is_taken_where_it_is() -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert _providers(None, available) == (
        "cuda",
        [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"],
    )
    assert _providers("cuda:1", available)[1][0] == ("CUDAExecutionProvider", {"device_id": 1})
    assert _providers("cpu", available) == ("cpu", ["CPUExecutionProvider"])


def test_it_needs_neither_torch_nor_transformers(exported: str) -> None:
    program = f"""
import sys
from bge_rerank_plugins.onnx import OnnxScorer
assert len(OnnxScorer({exported!r}).score("a", ["b"])) == 1
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_exports_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export-onnx", ENCODER, str(tmp_path / "made"), "--int8"]) == 0
    printed = capsys.readouterr().out
    assert "onnx/model.onnx" in printed
    assert "rank correlation" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


@pytest.mark.parametrize(("model", "message"), [("decoder", "only cross-encoders"), ("encoder", "something already")])
def test_a_refused_export_leaves_what_was_there(
    model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made").mkdir()
    if model == "encoder":
        (tmp_path / "made" / "precious").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    assert main(["export-onnx", str(DATA / model), str(tmp_path / "made")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before

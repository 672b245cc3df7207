"""A scorer in the shape of sentence-transformers' `CrossEncoder`: its evaluators and mteb take it and see its scores."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
import torch
from conftest import DATA
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.cross_encoder import ScorerCrossEncoder

ENCODER = str(DATA / "encoder")
QUERY = "what is panda?"
PASSAGES = ["hi", "The giant panda is a bear species endemic to China.", "大熊猫是中国特有的熊类动物。", "hi"]
PAIRS = [(QUERY, passage) for passage in PASSAGES]
SAMPLES = [
    {"query": QUERY, "positive": PASSAGES[1:3], "negative": ["hi", "a red fox", "bamboo"]},
    {"query": "what eats bamboo?", "positive": ["The panda."], "negative": ["A stone.", "Rice."]},
    {"query": "where?", "positive": ["Sichuan"], "negative": ["yesterday", "nobody", "why not"]},
]


@pytest.fixture(scope="module")
def scorer() -> Any:
    with Scorer(ENCODER, dtype="float32", device="cpu") as scorer:
        yield scorer


@pytest.fixture(scope="module")
def model(scorer: Scorer) -> ScorerCrossEncoder:
    return scorer.as_cross_encoder()


@pytest.fixture(scope="module")
def theirs() -> CrossEncoder:
    return CrossEncoder(ENCODER, device="cpu", max_length=512)


def test_predict_returns_what_a_cross_encoder_does(model: ScorerCrossEncoder, theirs: CrossEncoder) -> None:
    """Types and shapes, and with the same activation function the values."""
    raw = torch.nn.Identity()
    assert model.predict(PAIRS) == pytest.approx(theirs.predict(PAIRS, activation_fn=raw), abs=1e-4)
    assert model.predict(PAIRS).dtype == np.float32
    sigmoid = torch.nn.Sigmoid()
    assert model.predict(PAIRS, activation_fn=sigmoid) == pytest.approx(theirs.predict(PAIRS), abs=1e-4)
    for options in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}):
        for pairs in (PAIRS, PAIRS[:1], PAIRS[0], [list(pair) for pair in PAIRS]):
            ours, expected = model.predict(pairs, **options), theirs.predict(pairs, **options)
            assert type(ours) is type(expected)
            assert np.shape(ours) == np.shape(expected)
    assert model.predict([]).shape == (0,)


def test_rank_returns_what_a_cross_encoder_does(model: ScorerCrossEncoder, theirs: CrossEncoder) -> None:
    ours = model.rank(QUERY, PASSAGES, return_documents=True)
    expected = theirs.rank(QUERY, PASSAGES, return_documents=True, activation_fn=torch.nn.Identity())

    assert [found["text"] for found in ours] == [found["text"] for found in expected]
    assert [found["score"] for found in ours] == pytest.approx([float(found["score"]) for found in expected], abs=1e-4)
    places = [found["corpus_id"] for found in ours]
    assert places.index(0) < places.index(3), "equal scores keep their order"
    assert model.rank(QUERY, PASSAGES, top_k=2) == [{k: f[k] for k in ("corpus_id", "score")} for f in ours[:2]]
    assert model.rank(QUERY, []) == []
    assert model.rank(QUERY, iter(PASSAGES), return_documents=True) == ours


def test_pairs_that_are_none_are_refused(model: ScorerCrossEncoder) -> None:
    with pytest.raises(ValueError, match=r"give pairs, or both inputs1 and inputs2"):
        model.predict()
    with pytest.raises(ValueError, match=r"pairs\[0\]"):
        model.predict([("only",)])
    for texts in (["ab", "cd", "ef"], ["ab"], "ab", [None]):  # letters were scored for pairs
        with pytest.raises(ValueError, match=r"pairs\[0\].*expected \(query, passage\)"):
            model.predict(texts)
    with pytest.raises(ValueError, match=r"passages='abc': expected a list of strings"):
        model.rank(QUERY, "abc")
    with pytest.raises(ValueError, match=r"top_k=-1: expected a whole number"):
        model.rank(QUERY, PASSAGES, top_k=-1)


def test_rows_of_tables_are_no_pairs_of_their_columns_names(model: ScorerCrossEncoder) -> None:
    row = {"query": QUERY, "passage": "hi"}
    table = pd.DataFrame([row, row])
    with pytest.raises(ValueError, match=r"pairs=.*expected a list of \(query, passage\)"):
        model.predict(table)  # type: ignore[arg-type]
    for inputs in ([row, row], row, Dataset.from_list([row, row]), [{QUERY, "hi"}]):
        with pytest.raises(ValueError, match=r"pairs\[0\]=.*expected \(query, passage\)"):
            model.predict(inputs)  # type: ignore[arg-type]
    columns = pd.DataFrame([[QUERY, "hi"]] * 2, columns=pd.MultiIndex.from_tuples([("a", "b"), ("c", "d")]))
    for inputs in (columns, np.array("x")):
        for ask in (model.predict, model.scorer.score_pairs):
            with pytest.raises(ValueError, match=r"pairs=.*expected a list of \(query, passage\)"):
                ask(inputs)  # type: ignore[arg-type]
    with sa.create_engine("sqlite://").connect() as connection:
        found = connection.execute(sa.text("select :query, 'hi' union all select :query, 'hi'"), {"query": QUERY})
        assert len(model.scorer.score_pairs(found)) == 2  # type: ignore[arg-type]
    assert model.predict(table.to_numpy()) == pytest.approx(model.predict([(QUERY, "hi")] * 2), abs=1e-5)


def test_the_reranking_evaluator_sees_the_same_as_with_their_own_model(
    model: ScorerCrossEncoder, theirs: CrossEncoder, tmp_path: Path
) -> None:
    evaluator = CrossEncoderRerankingEvaluator(SAMPLES, name="tiny")

    found = evaluator(model, output_path=str(tmp_path))

    assert found == pytest.approx(evaluator(theirs))
    assert 0 < found["tiny_map"] < 1
    assert model.model_card_data.metrics["tiny_map"] == found["tiny_map"]


def test_the_nano_beir_evaluator_takes_it(
    model: ScorerCrossEncoder, theirs: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny set in the form that it loads from the hub."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderNanoBEIREvaluator, nano_beir

    corpus = sorted({text for sample in SAMPLES for key in ("positive", "negative") for text in sample[key]})
    parts = {
        "corpus": [{"_id": str(i), "text": text} for i, text in enumerate(corpus)],
        "queries": [{"_id": f"q{i}", "text": sample["query"]} for i, sample in enumerate(SAMPLES)],
        "qrels": [
            {"query-id": f"q{i}", "corpus-id": str(corpus.index(text))}
            for i, sample in enumerate(SAMPLES)
            for text in sample["positive"]
        ],
        "bm25": [{"query-id": f"q{i}", "corpus-ids": [str(j) for j in range(len(corpus))]} for i in range(3)],
    }

    def from_memory(path: str, name: str, split: str) -> Dataset:
        return Dataset.from_list(parts[name])

    monkeypatch.setattr("datasets.load_dataset", from_memory)
    evaluator = CrossEncoderNanoBEIREvaluator(["msmarco"], rerank_k=5, show_progress_bar=False)

    assert nano_beir is not None
    assert evaluator(model) == pytest.approx(evaluator(theirs))


# mteb


def _task(kind: str) -> Any:
    """A task of mteb in memory: three queries, each with its passages ranked in a wrong order."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    corpus = {
        f"d{i}": f"{word} of {place}"
        for i, (word, place) in enumerate((w, p) for w in ("panda", "stone") for p in "ABC")
    }
    queries = {f"q{i}": f"panda of {place}?" for i, place in enumerate("ABC")}

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Tiny{kind}",
            description="Three queries.",
            type=kind,
            main_score="map_at_1000" if kind == "Reranking" else "ndcg_at_10",
            dataset={"path": "none", "revision": "none"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            modalities=["text"],
            category="t2t",
        )

        def load_data(self, **kwargs: Any) -> None:
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(
                        corpus=Dataset.from_list([{"id": i, "title": "", "text": text} for i, text in corpus.items()]),
                        queries=Dataset.from_list([{"id": i, "text": text} for i, text in queries.items()]),
                        relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(3)},
                        top_ranked={query: list(corpus)[::-1] for query in queries},
                    )
                }
            }
            self.data_loaded = True

    Tiny.__name__ = f"Tiny{kind}"
    return Tiny(), corpus, queries


@pytest.mark.parametrize("kind", ["Reranking", "Retrieval"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mteb's own
def test_mteb_runs_its_tasks_on_it(kind: str, model: ScorerCrossEncoder, scorer: Scorer) -> None:
    mteb = pytest.importorskip("mteb", reason="mteb needs Python 3.11 or later")
    task, corpus, queries = _task(kind)
    assert isinstance(model, mteb.CrossEncoderProtocol)

    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False)

    places = []
    for i, text in enumerate(queries.values()):
        ranked = [f"d{found.index}" for found in scorer.rank(text, list(corpus.values()))]
        places.append(ranked.index(f"d{i}"))
    found = result.task_results[0].get_score()
    worth = [1 / (1 + p) for p in places] if kind == "Reranking" else [1 / math.log2(2 + p) for p in places]
    assert found == pytest.approx(sum(worth) / 3, abs=1e-4)
    assert result.model_name == "local/encoder"


def test_mteb_hears_the_models_name_revision_and_layer() -> None:
    pytest.importorskip("mteb", reason="mteb needs Python 3.11 or later")
    scorer = Scorer("BAAI/bge-reranker-v2-minicpm-layerwise", cutoff_layer=28, revision="abc")

    meta = scorer.as_cross_encoder().mteb_model_meta

    assert (meta.name, meta.revision) == ("BAAI/bge-reranker-v2-minicpm-layerwise-layer-28", "abc")
    assert meta.model_type == ["cross-encoder"]
    assert meta.is_cross_encoder
    assert meta.experiment_name is None, "where published results are"


def test_mteb_hears_of_options_by_values_that_can_be_read() -> None:
    pytest.importorskip("mteb", reason="mteb needs Python 3.11 or later")
    scorer = Scorer(
        "org/name", max_length=512, dtype="bfloat16", normalize=True, peft_path="org/adapter", cache_dir="c"
    )

    name = scorer.as_cross_encoder().mteb_model_meta.experiment_name

    assert re.fullmatch("dtype_bfloat16__max_length_512__normalize_True__peft_path_[0-9a-f]{12}", name)


class Backwards(Scorer):
    """The worst first."""

    def score(self, query: str, passages: Any) -> list[float]:
        return [-score for score in super().score(query, passages)]


def _trained(folder: Path, adapter: Path) -> None:
    """A LoRA adapter on a cross-encoder, another one each time."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    options = LoraConfig(r=4, init_lora_weights=False, target_modules=["query", "value"])
    get_peft_model(model, options).save_pretrained(adapter)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mteb's own
def test_mteb_keeps_the_results_of_every_scorer_apart(tmp_path: Path) -> None:
    """It takes what its cache has of a model, and heard neither of options nor of other files in a folder of the same name."""
    mteb = pytest.importorskip("mteb", reason="mteb needs Python 3.11 or later")
    from safetensors.torch import load_file, save_file

    cache = mteb.ResultCache(tmp_path / "cache")
    one, other, adapter = tmp_path / "one" / "model", tmp_path / "other" / "model", tmp_path / "adapter"
    shutil.copytree(DATA / "encoder", one)
    shutil.copytree(DATA / "decoder", other)

    def figure(scorer: Scorer, cache: Any) -> tuple[float, bool]:
        """What mteb says of a scorer, and whether it was scored for that."""
        with scorer:
            result = mteb.evaluate(
                scorer.as_cross_encoder(), _task("Reranking")[0], cache=cache, show_progress_bar=False
            )
            return result.task_results[0].get_score(), scorer.stats()["pairs"] > 0

    def negate_weights() -> None:
        weights = load_file(one / "model.safetensors")
        save_file({name: -weight for name, weight in weights.items()}, one / "model.safetensors", {"format": "pt"})

    runs: list[tuple[type[Scorer], Path, dict[str, Any], Callable[[], None]]] = [
        (Scorer, one, {}, lambda: None),
        (Scorer, one, {"max_length": 8}, lambda: None),
        (Scorer, one, {"query_instruction": "a/b: "}, lambda: None),
        (Scorer, one, {"query_instruction": "a:b/ "}, lambda: None),
        (Scorer, one, {"peft_path": str(adapter)}, lambda: _trained(one, adapter)),
        (Scorer, one, {"peft_path": str(adapter)}, lambda: _trained(one, adapter)),
        (Scorer, one, {}, negate_weights),
        (Backwards, one, {}, lambda: None),
        (Scorer, other, {}, lambda: None),
        (Scorer, other, {"prompt": "Is it? " * 100}, lambda: None),
        (Scorer, other, {"prompt": "Is it? " * 100 + "Yes?"}, lambda: None),
    ]
    figures = set()
    for kind, model, options, prepare in runs:
        prepare()
        options = {"dtype": "float32", "device": "cpu"} | options
        worth, _ = figure(kind(str(model), **options), None)
        assert figure(kind(str(model), **options), cache) == (worth, True)
        assert figure(kind(str(model), **options, max_batch_tokens=999), cache) == (worth, False)
        figures.add(worth)
    assert len(figures) > 4

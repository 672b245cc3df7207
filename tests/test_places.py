"""What is wrong with one pair names it by its place in what the caller gave, however many were on their way together."""

import asyncio
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
from conftest import DATA, with_a_token_more
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.export import export_onnx
from bge_rerank_plugins.onnx import GRAPH, OnnxScorer

ENCODER = DATA / "encoder"
WORD = "Q"
"""Its last token has weights that are not numbers."""

PASSAGES = [f"a bear of {number}" for number in range(40)]
OTHERS = ["a", "b", "c"]


class Inherited(Scorer):
    """One whose other methods follow its own `score`."""

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        return super().score(query, passages)


def without_numbers(folder: Path) -> str:
    """A copy of the encoder that cannot score passages with `WORD`."""
    shutil.copytree(ENCODER, folder)
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(WORD, add_special_tokens=False).ids[-1]
    weights = load_file(folder / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def graph_without_numbers(folder: Path) -> str:
    """The same as a graph."""
    export_onnx(RerankSettings(model=str(ENCODER)), folder)
    graph = onnx.load(folder / GRAPH)
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(WORD, add_special_tokens=False).ids[-1]
    (words,) = (part for part in graph.graph.initializer if part.name.endswith("word_embeddings.weight"))
    weights = numpy_helper.to_array(words).copy()
    weights[token] = float("nan")
    words.CopyFrom(numpy_helper.from_array(weights, words.name))
    onnx.save(graph, folder / GRAPH)
    return str(folder)


def graph_with_a_token_more(folder: Path) -> str:
    export_onnx(RerankSettings(model=str(ENCODER)), folder / "exported")
    return str(with_a_token_more(folder / "exported", folder / "more"))


NO_NUMBER = (WORD, "the (model|graph)'s score is nan")
NO_TOKEN = ("<weird>", "'<weird>' cannot be scored")
MAKERS: dict[str, tuple[Callable[[Path], str], Callable[[str], Any], tuple[str, str]]] = {
    "not a number": (without_numbers, Scorer, NO_NUMBER),
    "not a number, in windows": (without_numbers, lambda model: Scorer(model, long_passages="split"), NO_NUMBER),
    "not a number, by a subclass": (without_numbers, lambda model: Inherited(model), NO_NUMBER),
    "an unknown token": (lambda folder: str(with_a_token_more(ENCODER, folder)), Scorer, NO_TOKEN),
    "not a number, by a graph": (graph_without_numbers, OnnxScorer, NO_NUMBER),
    "an unknown token, by a graph": (graph_with_a_token_more, OnnxScorer, NO_TOKEN),
}


@pytest.fixture(scope="module", params=MAKERS)
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, str]]:
    """A scorer, a word that it cannot score, and what it says then."""
    make, scorer_of, (word, why) = MAKERS[request.param]
    with scorer_of(make(tmp_path_factory.mktemp("broken") / "model")) as scorer:
        yield scorer, word, why


def passages_with(word: str, place: int) -> list[str]:
    """Some of them longer than a pair can be, so that they may come in windows."""
    return [
        f"{passage} {word}" if index == place else passage * (150 if index % 5 == 0 else 1)
        for index, passage in enumerate(PASSAGES)
    ]


async def ascored(scorer: Any, query: str, passages: Sequence[str]) -> list[float]:
    scores: list[float] = await scorer.ascore(query, passages)
    return scores


@pytest.mark.parametrize("place", [0, 7, 31, 32, 38])
def test_a_passage_is_named_by_its_place(broken: tuple[Any, str, str], place: int) -> None:
    """Passages are handed over 32 at a time, and were counted from the first of these."""
    scorer, word, why = broken
    passages = passages_with(word, place)
    for ask in (scorer.score, lambda *request: asyncio.run(ascored(scorer, *request)), scorer.rank):
        with pytest.raises(ValueError, match=f"^pair {place}: {why}"):
            ask("panda", passages)
    assert len(scorer.score("panda", PASSAGES)) == len(PASSAGES)


def test_a_pair_is_named_by_its_place(broken: tuple[Any, str, str]) -> None:
    scorer, word, why = broken
    pairs = [("other", passage) for passage in OTHERS] + [("panda", passage) for passage in passages_with(word, 37)]
    forms = [scorer.score_pairs]
    if isinstance(scorer, Scorer):
        forms.append(lambda pairs: list(scorer.score_stream(pairs)))
    for ask in forms:
        with pytest.raises(ValueError, match=f"^pair 40: {why}"):
            ask(pairs)


def test_a_passage_of_several_requests_is_named_by_both_places(broken: tuple[Any, str, str]) -> None:
    scorer, word, why = broken
    requests = [("other", OTHERS), ("none", []), ("panda", passages_with(word, 33)), ("other", OTHERS)]
    forms = [scorer.score_batch]
    if isinstance(scorer, Scorer):
        forms.append(lambda requests: asyncio.run(ascored_batch(scorer, requests)))
    for ask in forms:
        with pytest.raises(ValueError, match=rf"^requests\[2\]: passages\[33\]: {why}"):
            ask(requests)
        with pytest.raises(ValueError, match=rf"^requests\[0\]: passages\[1\]: {why}"):
            ask([("panda", ["a", word]), ("panda", ["a"])])


async def ascored_batch(scorer: Scorer, requests: list[tuple[str, list[str]]]) -> list[list[float]]:
    return await scorer.ascore_batch(requests)


@pytest.mark.parametrize("place", [0, 31, 32, 45])
@pytest.mark.parametrize("split", ["truncate", "split"])
def test_a_stream_yields_what_comes_before_a_pair_that_cannot_be_tokenised(
    place: int, split: Literal["truncate", "split"], tmp_path: Path
) -> None:
    with Scorer(str(with_a_token_more(ENCODER, tmp_path / "model")), long_passages=split) as scorer:
        passages = passages_with("bear", -1) * 2
        expected = scorer.score("panda", passages)[:place]
        passages[place] = "a <weird> bear"
        scores = []

        def draw() -> None:
            for score in scorer.score_stream(("panda", passage) for passage in passages):
                scores.append(score)  # noqa: PERF402 - one by one, to have those before the error

        with pytest.raises(ValueError, match=rf"^pair {place}: '<weird>' cannot be scored"):
            draw()
    assert scores == pytest.approx(expected, abs=1e-4)


def test_the_error_travels_between_processes(broken: tuple[Any, str, str]) -> None:
    scorer, word, why = broken
    with pytest.raises(ValueError, match=f"^pair 1: {why}") as caught:
        scorer.score("panda", ["a", word])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

"""`OnnxScorer`: cross-encoders on ONNX Runtime, for machines where torch is too much to install or to start.

Takes the published layout (`onnx/model.onnx` beside `config.json` and `tokenizer.json`) or what `bge-rerank export-onnx` writes.
A graph has no packs, so pairs are sorted by length and padded in batches under a token budget. Imports neither torch nor
transformers, so that it also runs where this package was installed without its dependencies.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from tokenizers import Tokenizer

from .core.hub import commit_of, model_file, needed_file
from .core.pairs import PairEncoder, layout_as_said, layout_of
from .core.sequences import PairError, TokenSequence, counted_from, longest_pair
from .core.words import Words, check_agreement
from .lease import FORKED
from .ranking import RankedPassage, check_cut, rank_scores, sigmoid
from .settings import RerankSettings
from .texts import checked_requests, checked_texts, naming_requests, requests_of_pairs, scores_by_request
from .turns import in_thread

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

DEFAULT_BUDGET = {"cpu": 2048, "cuda": 32768}
"""Tokens of a batch, padding included, by kind of device."""

GRAPH = "onnx/model.onnx"

_TYPES = {
    "model_type": str,
    "max_position_embeddings": int,
    "pad_token_id": int,
    "type_vocab_size": int,
    "vocab_size": int,
}
"""What is looked at in config.json."""


class OnnxScorer:
    """Scores passages with a cross-encoder on ONNX Runtime. Both adapters take one as `scorer=`.

    The graph is loaded at first use. Safe to call from any number of threads and tasks at once. Needs
    `pip install "bge-rerank-plugins[onnx]"`, which brings torch with the package; without it
    `pip install onnxruntime tokenizers pydantic` and the package with `--no-deps`.

    Args:
        model: Hub id or local directory that holds the graph, config.json and tokenizer.json.
        file: The graph in it, such as "onnx/model_quantized.onnx".
        device: "cpu", "cuda" or "cuda:N"; by default CUDA where ONNX Runtime has it.
        max_batch_tokens: Most tokens of a batch, padding included; by default by device.
        max_length, query_max_length, query_instruction, passage_instruction, normalize, revision, cache_dir,
            local_files_only, token: As in `RerankSettings`.

    Raises:
        ValueError: An option with an impossible value, or, at first use, a model that cannot be run.
        ImportError: At first use, ONNX Runtime is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        file: str = GRAPH,
        device: str | None = None,
        max_batch_tokens: int | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        normalize: bool = False,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
    ) -> None:
        self._settings = RerankSettings(
            model=model,
            device=device,
            max_batch_tokens=max_batch_tokens,
            max_length=max_length,
            query_max_length=query_max_length,
            query_instruction=query_instruction,
            passage_instruction=passage_instruction,
            normalize=normalize,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        self._file = file
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a signal's handler may close what its thread loads
        self._graph: _Graph | None = None
        self._closed = False
        self._forked_while_loading = False
        _scorers.add(self)

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """Scores passages against a query.

        Args:
            query: The question.
            passages: The texts to score.

        Returns:
            One score per passage, in their order: raw logits, or values in 0..1 with `normalize`.

        Raises:
            ValueError: Something is not a string; the model cannot be loaded; a score is not a number.
            RuntimeError: The scorer is closed.
        """
        texts = checked_texts(query, passages)
        return self._scores([(query, texts)])[0] if texts else []

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Scores (query, passage) pairs, one score per pair, in their order.

        Raises:
            ValueError: As `score`, naming the pair by its place.
        """
        return [score for scores in self._scores(requests_of_pairs(pairs)) for score in scores]

    def score_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Scores several queries, each with its passages; their pairs share batches.

        Raises:
            ValueError: As `score`, naming the request by its place.
        """
        checked = checked_requests(requests)
        with naming_requests(checked):
            return self._scores(checked)

    def rank(
        self, query: str, passages: Sequence[str], top_n: int | None = None, score_threshold: float | None = None
    ) -> list[RankedPassage]:
        """Orders passages by score, best first; equal scores keep the order of the input. See `Scorer.rank`."""
        check_cut(top_n, score_threshold)
        return rank_scores(self.score(query, passages), top_n, score_threshold)

    async def ascore(self, query: str, passages: Sequence[str]) -> list[float]:
        """`score` in a thread of the event loop's pool."""
        return await in_thread(self.score, query, passages)

    async def arank(
        self, query: str, passages: Sequence[str], top_n: int | None = None, score_threshold: float | None = None
    ) -> list[RankedPassage]:
        """`rank` in a thread of the event loop's pool."""
        return await in_thread(self.rank, query, passages, top_n, score_threshold)

    def warmup(self) -> None:
        """Loads the graph and scores one pair, so that the first request does not wait for it."""
        self._scores([("", [""])])

    def close(self) -> None:
        """Frees the graph. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._graph = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OnnxScorer({self._settings.model!r}, file={self._file!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Settings travel; a loaded graph stays where it is."""
        return {"_settings": self._settings, "_file": self._file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _scores(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        if not any(passages for _, passages in requests):
            return [[] for _ in requests]
        graph = self._loaded()
        sequences: list[TokenSequence] = []
        for query, passages in requests:
            with counted_from(len(sequences)):
                sequences += graph.pairs.encode(query, passages)
        raw = scores_by_request(requests, graph.scores(sequences))
        return [[sigmoid(score) for score in row] for row in raw] if self._settings.normalize else raw

    def _loaded(self) -> _Graph:
        with self._lock:
            if self._forked_while_loading:
                raise RuntimeError(FORKED)
            graph = self._graph
            if graph is None and not self._closed:
                graph = _load(self._settings, self._file)
            if graph is None or self._closed:  # or meanwhile
                raise RuntimeError("this OnnxScorer is closed")
            self._graph = graph
            return graph

    def _forget_fork(self) -> None:
        """In a forked copy of the process: drops the lock if a thread that is not there holds it, to load the graph."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()
            self._forked_while_loading = self._graph is None


_scorers: WeakSet[OnnxScorer] = WeakSet()


def _after_fork() -> None:
    for scorer in list(_scorers):
        scorer._forget_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class _Graph(NamedTuple):
    """A loaded graph, and how text gets into it."""

    session: Any
    pairs: PairEncoder
    padding: int
    budget: int

    def scores(self, sequences: Sequence[TokenSequence]) -> list[float]:
        """Raw scores, in the order of the sequences."""
        import numpy as np

        inputs = {node.name for node in self.session.get_inputs()}
        scores = [math.nan] * len(sequences)
        for batch in _batches([len(sequence) for sequence in sequences], self.budget):
            longest = max(len(sequences[i]) for i in batch)
            columns = {
                "input_ids": [_padded(sequences[i].input_ids, longest, self.padding) for i in batch],
                "attention_mask": [_padded([1] * len(sequences[i]), longest, 0) for i in batch],
                "token_type_ids": [_padded(sequences[i].token_type_ids or [], longest, 0) for i in batch],
            }
            feed = {name: np.array(rows, dtype=np.int64) for name, rows in columns.items() if name in inputs}
            for i, score in zip(batch, self.session.run(None, feed)[0][:, 0].tolist(), strict=True):
                if not math.isfinite(score):
                    raise PairError(i, f"the graph's score is {score}: its weights or its input overflow")
                scores[i] = score
        first: dict[bytes, float] = {}  # what is alike is to be a tie, and a batch sets an int8 graph's steps
        return [first.setdefault(sequence.key, score) for sequence, score in zip(sequences, scores, strict=True)]


def _padded(ids: list[int], longest: int, padding: int) -> list[int]:
    return ids + [padding] * (longest - len(ids))


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of pairs of like length, longest first, so that each batch padded to its longest stays within the budget."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _load(settings: RerankSettings, file: str) -> _Graph:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('OnnxScorer needs ONNX Runtime: pip install "bge-rerank-plugins[onnx]"') from error
    commit = commit_of(needed_file(settings, "config.json"))  # of all files, also where the revision moves meanwhile
    settings = settings.model_copy(update={"revision": commit or settings.revision})
    config = _config(settings)
    layout = layout_of(config.get("model_type"), settings.model, config.get("type_vocab_size"))
    pad = config.get("pad_token_id", 1 if layout.skips_padding else 0)  # the defaults of transformers' classes
    padding = int(pad or 0)
    tokenizer, side, said = _tokenizer(settings)
    layout = layout_as_said(layout, said)
    if config.get("max_position_embeddings") is None:
        raise ValueError(f"model={settings.model!r}: its config.json names no max_position_embeddings")
    positions = config["max_position_embeddings"] - layout.first_position(pad, settings.model)
    max_length = longest_pair(settings.max_length, positions, settings.model)
    words = Words(tokenizer, config.get("vocab_size"), settings.model)
    pairs = PairEncoder(words, layout, padding, settings, max_length, side)
    device, providers = _providers(settings.device, onnxruntime.get_available_providers())
    graph = needed_file(settings, file)
    for suffix in ("_data", ".data"):  # where a graph over 2 GB has its weights
        model_file(settings, file + suffix)
    try:
        session = onnxruntime.InferenceSession(str(graph), providers=providers)
    except Exception as error:  # what ONNX Runtime raises has no public type
        raise ValueError(f"model={settings.model!r}: {file} cannot be loaded: {error}") from error
    shape = session.get_outputs()[0].shape
    if len(shape) != 2 or shape[1] != 1:
        raise ValueError(f"model={settings.model!r}: {file} gives {shape}, a reranker one number for each pair")
    return _Graph(session, pairs, padding, settings.max_batch_tokens or DEFAULT_BUDGET[device])


def _config(settings: RerankSettings) -> dict[str, Any]:
    """config.json, with values of the types that are expected where it has those that are looked at.

    Raises:
        ValueError: It cannot be read or used.
    """
    config = _object(needed_file(settings, "config.json"), settings.model)
    for name, kind in _TYPES.items():
        if not isinstance(value := config.get(name), kind | None):
            raise ValueError(f"model={settings.model!r}: its config.json cannot be used: {name}={value!r}")
    return config


def _tokenizer(settings: RerankSettings) -> tuple[Tokenizer, str, dict[str, Any]]:
    """The tokenizer, its truncation and padding switched off, the side on which it cuts a text, and its tokenizer_config.json.

    Raises:
        ValueError: Its files cannot be read or used, or they disagree.
    """
    file = needed_file(settings, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # what the Rust tokenizer raises has no type of its own
        raise ValueError(f"model={settings.model!r}: its tokenizer.json cannot be loaded: {error}") from error
    side = (tokenizer.truncation or {}).get("direction", "right")  # as transformers has it where nothing else is said
    tokenizer.no_truncation()
    tokenizer.no_padding()
    file_beside = model_file(settings, "tokenizer_config.json")
    said = {} if file_beside is None else _object(file_beside, settings.model)
    check_agreement(settings.model, said, tokenizer)
    side = said.get("truncation_side", side)
    if side not in ("right", "left"):
        raise ValueError(f"model={settings.model!r}: truncation_side={side!r}: expected 'right' or 'left'")
    return tokenizer, side, said


def _object(file: Path, model: str) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        ValueError: There is none.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"model={model!r}: its {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"model={model!r}: its {file.name} is no object")
    return found


def _providers(device: str | list[str] | None, available: Sequence[str]) -> tuple[str, list[Any]]:
    """The kind of device, and ONNX Runtime's names for it."""
    has_cuda = "CUDAExecutionProvider" in available
    kind, _, index = (device if isinstance(device, str) else "cuda" if has_cuda else "cpu").partition(":")
    if isinstance(device, list) or kind not in DEFAULT_BUDGET or (kind == "cuda" and not has_cuda):
        raise ValueError(
            f"device={device!r}: this ONNX Runtime has {', '.join(available)}; name 'cpu', 'cuda' or 'cuda:N'"
        )
    if kind == "cpu":
        return kind, ["CPUExecutionProvider"]
    return kind, [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]

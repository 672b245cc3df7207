"""`Scorer`: the one public scoring object. Validates input, asks the engine for raw scores, maps and ranks them.

Knows nothing of documents, nodes or files, and imports torch only when the first score is asked for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .ranking import RankedPassage, check_cut, rank_scores, sigmoid
from .settings import Dtype, RerankSettings
from .texts import checked_texts, requests_of_pairs

if TYPE_CHECKING:
    from concurrent.futures import Future
    from types import TracebackType

    from typing_extensions import Self

    from .core.engine import Engine
    from .core.families import Family

ENCODE_AT_ONCE = 32
"""Passages that are tokenised before the device gets them, so that it starts while the rest is tokenised."""


class Scorer:
    """Scores how well passages answer a query, with a local BGE reranker.

    The model is loaded at first use, once per process for all scorers and adapters with equal settings. Safe to call from
    any number of threads and tasks at once; their pairs share the device's work.

    Args:
        model: Hub id or local directory. The other options are those of `RerankSettings`, which documents each.

    Raises:
        ValueError: An option with an impossible value; the message names it and what is allowed.

    Examples:
        >>> scorer = Scorer("BAAI/bge-reranker-v2-m3")  # doctest: +SKIP
        >>> scorer.score("what is panda?", ["hi", "The giant panda is a bear species endemic to China."])  # doctest: +SKIP
        [-8.1875, 5.26171875]
    """

    _settings: RerankSettings
    _lock: threading.Lock
    _engine: Engine | None
    _finalizer: Any
    _closed: bool

    def __init__(
        self,
        model: str,
        *,
        device: str | list[str] | None = None,
        dtype: Dtype = "auto",
        max_length: int | None = None,
        query_max_length: int | None = None,
        prompt: str | None = None,
        cutoff_layer: int | None = None,
        query_instruction: str | None = None,
        passage_instruction: str | None = None,
        normalize: bool = False,
        max_batch_tokens: int | None = None,
        peft_path: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        show_progress: bool = False,
    ) -> None:
        self._settings = RerankSettings(
            model=model,
            device=device,
            dtype=dtype,
            max_length=max_length,
            query_max_length=query_max_length,
            prompt=prompt,
            cutoff_layer=cutoff_layer,
            query_instruction=query_instruction,
            passage_instruction=passage_instruction,
            normalize=normalize,
            max_batch_tokens=max_batch_tokens,
            peft_path=peft_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            show_progress=show_progress,
        )
        self._start()

    @classmethod
    def from_settings(cls, settings: RerankSettings) -> Self:
        """A scorer with the options of `settings`, or of an adapter, which has them as fields."""
        return cls(**{name: getattr(settings, name) for name in RerankSettings.model_fields})

    def with_settings(self, settings: RerankSettings) -> Scorer:
        """A scorer with other options, which keeps the loaded model where they allow it."""
        scorer = Scorer.from_settings(settings)
        if self._engine is not None and self._engine.serves(scorer._settings):
            scorer._acquired()
        return scorer

    @property
    def settings(self) -> RerankSettings:
        """The options of this scorer; a copy, since a loaded model does not follow later changes."""
        return self._settings.model_copy()

    def has_settings_of(self, settings: RerankSettings) -> bool:
        """Whether `settings`, or an adapter's fields, are those of this scorer."""
        return all(getattr(settings, name) == getattr(self._settings, name) for name in RerankSettings.model_fields)

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """Scores passages against a query.

        Args:
            query: The question.
            passages: The texts to score.

        Returns:
            One score per passage, in their order: raw logits, or values in 0..1 with `normalize`.

        Raises:
            ValueError: Something is not a string; the model cannot be loaded; a score is not a number.
            RuntimeError: The model failed, or the scorer is closed.
        """
        texts = checked_texts(query, passages)
        if not texts:
            return []
        return self._normalized(self._raw_scores([(query, texts)])[0])

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Scores (query, passage) pairs, the way FlagEmbedding's `compute_score` takes them.

        Pairs that follow each other with the same query are scored as one request, which is faster.

        Returns:
            One score per pair, in their order.
        """
        requests = requests_of_pairs(pairs)
        if not requests:
            return []
        return self._normalized([score for scores in self._raw_scores(requests) for score in scores])

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedPassage]:
        """Orders passages by score, best first; equal scores keep the order of the input.

        Args:
            query: The question.
            passages: The texts to rank.
            top_n: How many to return; None for all.
            score_threshold: Leave out what scores less; applied before `top_n`.

        Returns:
            Index and score of each, best first.
        """
        check_cut(top_n, score_threshold)
        return rank_scores(self.score(query, passages), top_n, score_threshold)

    def score_layers(self, query: str, passages: Sequence[str], cutoff_layers: Sequence[int]) -> dict[int, list[float]]:
        """Scores passages after several layers of a layerwise model in one pass.

        Args:
            query: The question.
            passages: The texts to score.
            cutoff_layers: Layers to score after. Layers above the scorer's `cutoff_layer` are loaded when first asked for.

        Returns:
            For each layer one score per passage, in their order.

        Raises:
            ValueError: Not a layerwise model, or a layer without a scoring head; the message names the range.
        """
        texts = checked_texts(query, passages)
        if not texts:
            return {layer: [] for layer in cutoff_layers}
        layers = self._checked_layers(cutoff_layers)
        rows = self._raw_scores([(query, texts)], layers)[0]
        return {layer: self._normalized([row[i] for row in rows]) for i, layer in enumerate(layers)}

    async def ascore(self, query: str, passages: Sequence[str]) -> list[float]:
        """`score` without blocking the event loop; when the task is cancelled, pairs not yet scored are dropped."""
        texts = checked_texts(query, passages)
        if not texts:
            return []
        engine, family = await self._aloaded()
        loop = asyncio.get_running_loop()
        submitted: list[asyncio.Future[list[float]]] = []
        try:
            for chunk in _chunks(texts):
                sequences = await loop.run_in_executor(engine.tokenizer_thread, family.encode, query, chunk)
                submitted.append(asyncio.wrap_future(engine.submit(sequences)))
            with _progress(len(texts), self._settings.show_progress) as advance:
                return self._normalized([score for future in submitted for score in advance(await future)])
        finally:
            for future in submitted:
                future.cancel()

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[RankedPassage]:
        """`rank` without blocking the event loop."""
        check_cut(top_n, score_threshold)
        return rank_scores(await self.ascore(query, passages), top_n, score_threshold)

    def warmup(self) -> None:
        """Loads the model and scores one pair, so that the first request does not wait for it."""
        self._raw_scores([("", [""])])

    def close(self) -> None:
        """Gives the model back; the last scorer of several with equal settings frees its memory. Safe to call twice."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
            if self._finalizer is not None:
                self._finalizer.detach()
        if engine is not None:
            from .core.engine import release

            release(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Scorer({self._settings!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Settings travel; a loaded model stays where it is."""
        return {"settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings = state["settings"]
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._engine = None
        self._finalizer = None
        self._closed = False

    def _acquired(self) -> Engine:
        """The engine, started at first use."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this Scorer is closed")
            if self._engine is None or not self._engine.usable:
                from .core.engine import acquire, release_when_collected

                if self._finalizer is not None:
                    self._finalizer()
                self._engine = acquire(self._settings)
                self._finalizer = release_when_collected(self, self._engine)
            return self._engine

    def _loaded(self) -> tuple[Engine, Family]:
        """The engine and its family, once the model is there. A load that failed is tried again next time."""
        engine = self._acquired()
        try:
            return engine, engine.loaded.result()
        except Exception:
            self._give_up(engine)
            raise

    async def _aloaded(self) -> tuple[Engine, Family]:
        """`_loaded` without blocking: the first call imports torch, which takes seconds."""
        loop = asyncio.get_running_loop()
        engine = await loop.run_in_executor(None, self._acquired) if self._engine is None else self._acquired()
        try:
            # Shielded: whoever stops waiting must not cancel the load for everybody else.
            return engine, await asyncio.shield(asyncio.wrap_future(engine.loaded))
        except Exception:
            await loop.run_in_executor(None, self._give_up, engine)
            raise

    def _give_up(self, engine: Engine) -> None:
        from .core.engine import release

        with self._lock:
            if self._engine is not engine:
                return
            self._engine = None
            self._finalizer.detach()
        release(engine)

    def _checked_layers(self, cutoff_layers: Sequence[int]) -> tuple[int, ...]:
        _, family = self._loaded()
        if family.layers is None:
            raise ValueError(
                f"cutoff_layers={list(cutoff_layers)}: {self._settings.model!r} is no layerwise checkpoint"
            )
        if not cutoff_layers:
            raise ValueError("cutoff_layers=[]: name at least one layer")
        from .core.layerwise import check_layers

        check_layers(cutoff_layers, family.layers)
        return tuple(dict.fromkeys(cutoff_layers))

    def _raw_scores(
        self, requests: Sequence[tuple[str, Sequence[str]]], cutoff_layers: tuple[int, ...] = ()
    ) -> list[list[Any]]:
        """Raw scores of each request's passages; tokenising runs ahead of the device."""
        engine, family = self._loaded()
        submitted: list[list[Future[list[Any]]]] = []
        try:
            for query, passages in requests:
                submitted.append(
                    [engine.submit(family.encode(query, chunk), cutoff_layers) for chunk in _chunks(passages)]
                )
            with _progress(sum(len(p) for _, p in requests), self._settings.show_progress) as advance:
                return [[score for chunk in chunks for score in advance(chunk.result())] for chunks in submitted]
        finally:
            for chunks in submitted:
                for chunk in chunks:
                    chunk.cancel()

    def _normalized(self, scores: list[float]) -> list[float]:
        return [sigmoid(score) for score in scores] if self._settings.normalize else scores


def _chunks(passages: Sequence[str]) -> Iterable[Sequence[str]]:
    return (passages[start : start + ENCODE_AT_ONCE] for start in range(0, len(passages), ENCODE_AT_ONCE))


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[list[float]], list[float]]]:
    """A progress bar on standard error; what is given passes a list of scores through and counts it."""
    if not shown:
        yield lambda scores: scores
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="pair", desc="Reranking") as bar:

        def advance(scores: list[float]) -> list[float]:
            bar.update(len(scores))
            return scores

        yield advance

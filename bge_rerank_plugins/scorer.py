"""`Scorer`: the one public scoring object. Validates input, asks the engine for raw scores, maps and ranks them.

Knows nothing of documents, nodes or files, and imports torch only when the first score is asked for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from .call import ENCODE_AT_ONCE, Call, progress_bar
from .lease import Lease
from .overriding import follow_score
from .ranking import RankedPassage, check_cut, rank_scores, sigmoid
from .settings import Dtype, RerankSettings
from .signals import asking
from .texts import (
    checked_layers,
    checked_requests,
    checked_texts,
    naming_requests,
    requests_of_pairs,
    scores_by_request,
    stream_of_requests,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from .core.families import Family
    from .cross_encoder import ScorerCrossEncoder

_CURES = {
    "truncate": "long_passages='split' scores them whole",
    "split": "a smaller query_max_length leaves them room",  # all others were split
}

logger = logging.getLogger("bge_rerank_plugins")


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

    def __init_subclass__(cls, **options: Any) -> None:
        """A subclass that overrides `score` means all that scores passages of queries, but for what else it overrides."""
        super().__init_subclass__(**options)
        follow_score(cls, Scorer)

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
        long_passages: Literal["truncate", "split"] = "truncate",
        max_batch_tokens: int | None = None,
        max_queued_tokens: int | None = None,
        when_full: Literal["wait", "error"] = "wait",
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
            long_passages=long_passages,
            max_batch_tokens=max_batch_tokens,
            max_queued_tokens=max_queued_tokens,
            when_full=when_full,
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
        engine = self._lease.engine
        if engine is not None and engine.serves(scorer._settings):
            scorer._lease.acquired()
        return scorer

    @property
    def settings(self) -> RerankSettings:
        """The options of this scorer; a copy, since a loaded model does not follow later changes."""
        return self._settings.model_copy()

    def has_settings_of(self, settings: RerankSettings) -> bool:
        """Whether `settings`, or an adapter's fields, are those of this scorer once checked, as a `model_copy` is not."""
        given = {name: getattr(settings, name) for name in RerankSettings.model_fields}
        return given == dict(self._settings) or RerankSettings(**given) == self._settings

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """Scores passages against a query.

        Args:
            query: The question.
            passages: The texts to score.

        Returns:
            One score per passage, in their order: raw logits, or values in 0..1 with `normalize`.

        Raises:
            ValueError: Something is not a string; the model cannot be loaded; a score is not a number.
            RuntimeError: The model failed, or the scorer is closed; with `when_full="error"`, as `core.engine.QueueFullError`,
                too much waits already.
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
        asked = checked_layers(cutoff_layers)
        if not texts:
            return {layer: [] for layer in asked}
        layers = self._layers(asked)
        rows = self._raw_scores([(query, texts)], layers)[0]
        return {layer: self._normalized([row[i] for row in rows]) for i, layer in enumerate(layers)}

    async def ascore(self, query: str, passages: Sequence[str]) -> list[float]:
        """`score` without blocking the event loop; when the task is cancelled, pairs not yet scored are dropped."""
        texts = checked_texts(query, passages)
        if not texts:
            return []
        return self._normalized((await self._araw_scores([(query, texts)]))[0])

    def score_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Scores several queries, each with its passages, at once; their pairs share packs.

        Args:
            requests: (query, passages) of each.

        Returns:
            For each request one score per passage, in their order.

        Raises:
            ValueError: As `score`, naming the request by its place.
        """
        checked = checked_requests(requests)
        if not any(passages for _, passages in checked):
            return [[] for _ in checked]
        with naming_requests(checked):
            return [self._normalized(scores) for scores in self._raw_scores(checked)]

    async def ascore_batch(self, requests: Iterable[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """`score_batch` without blocking the event loop."""
        checked = checked_requests(requests)
        if not any(passages for _, passages in checked):
            return [[] for _ in checked]
        with naming_requests(checked):
            return [self._normalized(scores) for scores in await self._araw_scores(checked)]

    def score_stream(self, pairs: Iterable[tuple[str, str]]) -> Iterator[float]:
        """Scores any number of (query, passage) pairs in bounded memory.

        Pairs are drawn from the iterator, and tokenised, some thousands ahead of the scores that are yielded. Scores of the
        pairs before one that is no pair of strings or cannot be tokenised, or at which the iterator fails, are yielded before the
        error is raised.

        Args:
            pairs: The pairs; those that follow each other with the same query are scored together.

        Yields:
            One score per pair, in their order.
        """
        refused: list[Exception] = []

        def requests() -> Iterator[tuple[str, Sequence[str]]]:
            try:
                yield from stream_of_requests(pairs, ENCODE_AT_ONCE)
            except Exception as error:  # whatever the caller's iterator raises
                refused.append(error)

        waiting = requests()
        first = next(waiting, None)
        if first is not None:  # nothing to score needs no model
            with progress_bar(None, self._settings.show_progress) as advance:
                for chunk in self._scored_chunks(chain([first], waiting), math.inf):
                    yield from self._normalized(advance(chunk))
        if refused:
            raise refused[0]

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

    def as_cross_encoder(self) -> ScorerCrossEncoder:
        """This scorer with the `predict` and `rank` of sentence-transformers' `CrossEncoder`, for its evaluators and for mteb."""
        from .cross_encoder import ScorerCrossEncoder

        return ScorerCrossEncoder(self)

    def stats(self) -> dict[str, float]:
        """Counters of the engine behind this scorer, which others with equal settings share; all 0 before the first use.

        Returns:
            requests (calls), pairs, tokens, packs, mean_fill (of the token budget), out_of_memory (packs tried again),
            truncated (passages cut), queued_tokens (waiting now), device_seconds.
        """
        from .core.stats import EngineStats

        engine = self._lease.engine
        with asking():
            return (EngineStats() if engine is None else engine.stats()).shown()

    def warmup(self) -> None:
        """Loads the model and scores one pair, so that the first request does not wait for it."""
        self._raw_scores([("", [""])])

    def close(self) -> None:
        """Gives the model back; the last scorer of several with equal settings frees its memory. Safe to call twice."""
        self._lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Scorer({self._settings!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Settings travel, and what a subclass has; a loaded model stays where it is."""
        return {name: value for name, value in vars(self).items() if name not in ("_lease", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _start(self) -> None:
        self._lease = Lease(self._settings)
        self._warned = False

    def _layers(self, cutoff_layers: list[int]) -> tuple[int, ...]:
        _, family = self._lease.loaded()
        if family.layers is None:
            raise ValueError(f"cutoff_layers={cutoff_layers}: {self._settings.model!r} is no layerwise checkpoint")
        from .core.layerwise import check_layers

        check_layers(cutoff_layers, family.layers, "cutoff_layers")
        return tuple(dict.fromkeys(cutoff_layers))

    def _raw_scores(
        self, requests: Sequence[tuple[str, Sequence[str]]], cutoff_layers: tuple[int, ...] = ()
    ) -> list[list[Any]]:
        """Raw scores of each request's passages."""
        pairs = sum(len(passages) for _, passages in requests)
        with progress_bar(pairs, self._settings.show_progress) as advance:
            chunks = self._scored_chunks(requests, pairs, cutoff_layers)
            return scores_by_request(requests, [score for chunk in chunks for score in advance(chunk)])

    async def _araw_scores(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[list[Any]]:
        """`_raw_scores` without blocking the event loop."""
        pairs = sum(len(passages) for _, passages in requests)
        with progress_bar(pairs, self._settings.show_progress) as advance:
            chunks = self._ascored_chunks(requests, pairs)
            return scores_by_request(requests, [score async for chunk in chunks for score in advance(chunk)])

    def _scored_chunks(
        self, requests: Iterable[tuple[str, Sequence[str]]], pairs: float, cutoff_layers: tuple[int, ...] = ()
    ) -> Iterator[list[Any]]:
        """Raw scores chunk by chunk, in order."""
        engine, family = self._lease.loaded()
        call = Call(engine, family, pairs, split=self._settings.long_passages == "split", cutoff_layers=cutoff_layers)
        try:
            yield from call.scored(requests)
        finally:
            self._end(call, family)

    async def _ascored_chunks(
        self, requests: Iterable[tuple[str, Sequence[str]]], pairs: float
    ) -> AsyncIterator[list[Any]]:
        """`_scored_chunks` without blocking the event loop."""
        engine, family = await self._lease.aloaded()
        call = Call(engine, family, pairs, split=self._settings.long_passages == "split")
        try:
            async for chunk in call.ascored(requests, self._lease.turns(engine)):
                yield chunk
        finally:
            self._end(call, family)

    def _end(self, call: Call, family: Family) -> None:
        """Drops what a call that broke off left, and says once per scorer if passages were cut."""
        call.cancel()
        if call.truncated and not self._warned:
            self._warned = True
            with asking():  # a worker may have something to log, too
                logger.warning(
                    "%s: passages were cut to fit max_length=%d tokens together with the query, %d in this call; "
                    "%s (said once per scorer)",
                    self._settings.model,
                    family.max_length,
                    call.truncated,
                    _CURES[self._settings.long_passages],
                )

    def _normalized(self, scores: list[float]) -> list[float]:
        return [sigmoid(score) for score in scores] if self._settings.normalize else scores

"""What both adapters share: the options of a reranker, a scorer that follows them, and the cut to `top_n`.

Knows nothing of either framework, and nothing of torch.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence, Set, Sized
from copy import copy
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator
from typing_extensions import Self

from .ranking import RankedPassage, check_cut, rank_scores
from .scorer import Scorer
from .settings import RerankSettings
from .texts import checked_requests, checked_texts
from .turns import in_thread

logger = logging.getLogger("bge_rerank_plugins")


@runtime_checkable
class SupportsScore(Protocol):
    """Anything that scores passages: `Scorer`, a client of a rerank server, a scorer of your own.

    An async method `ascore` of the same form is used by the async forms of the adapters; without one, `score` runs in a thread.
    """

    def score(self, query: str, passages: list[str], /) -> Sequence[float]:
        """One score per passage, in their order."""
        ...


class _Holders(WeakSet["_Hold"]):
    """Who shares a scorer.

    Attributes:
        scorer: The scorer, once one of them has used it.
    """

    scorer: Scorer | None = None


class _Hold:
    """An adapter's hold on its scorer, which the adapter's copies share, each until it is closed or given other options.

    No part of what an adapter is: any two are equal, and none is pickled.
    """

    def __init__(self, holders: _Holders | None = None) -> None:
        self._holders = _Holders() if holders is None else holders
        self._holders.add(self)

    def scorer_for(self, settings: RerankSettings) -> Scorer:
        """The scorer of the holders, or another one, with the loaded model if that will do, where it has other options."""
        scorer = self._holders.scorer
        if scorer is None:
            self._holders.scorer = scorer = Scorer.from_settings(settings)
        elif not scorer.has_settings_of(settings):
            scorer = scorer.with_settings(settings)
            self._leave()
            self._holders.scorer = scorer
        return scorer

    def close(self) -> None:
        """Closes the scorer, unless others hold it."""
        left = self._leave()
        if left.scorer is not None and not left:
            left.scorer.close()

    def _leave(self) -> _Holders:
        left, self._holders = self._holders, _Holders()
        left.discard(self)
        self._holders.add(self)
        return left

    def __copy__(self) -> _Hold:
        return _Hold(self._holders)

    def __deepcopy__(self, _: dict[int, Any]) -> _Hold:
        return _Hold(self._holders)

    def __reduce__(self) -> tuple[type[_Hold], tuple[()]]:
        return _Hold, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hold)

    __hash__ = object.__hash__


class ScorerSettings(RerankSettings):
    """Options of something that scores: those of the reranker, or a scorer in place of them.

    Either `model` or `scorer` must be given. Options may be assigned after use; the next call follows them.
    """

    # Fields are validated one by one, not the whole at the end, so that an assignment that is refused changes nothing.
    model: str = Field(default="", description=RerankSettings.model_fields["model"].description)
    scorer: Any = Field(
        default=None,
        exclude=True,
        repr=False,
        validate_default=True,
        description="Object with `score(query, passages)` to use in place of a local model; not serialised.",
    )

    _hold: _Hold = PrivateAttr(default_factory=_Hold)

    @field_validator("model")
    @classmethod
    def _model_or_scorer(cls, model: str, info: ValidationInfo) -> str:
        # At construction the scorer comes later, and is checked then.
        if not model and "scorer" in info.data and info.data["scorer"] is None:
            raise ValueError("model='': name a model, or give a scorer")
        return model

    @field_validator("scorer")
    @classmethod
    def _scorer_or_model(cls, scorer: Any, info: ValidationInfo) -> Any:
        if scorer is None and info.data.get("model") == "":
            raise ValueError("model='': name a model, or give a scorer")
        if scorer is not None:
            if not _can_score(scorer):
                raise ValueError(f"scorer={scorer!r:.80}: expected an object with a method score(query, passages)")
            _warn_of_unused(info.data)
        return scorer

    @field_validator("*")
    @classmethod
    def _option_is_used(cls, value: Any, info: ValidationInfo) -> Any:
        # At construction the scorer comes later, and warns then.
        if info.data.get("scorer") is not None:
            _warn_of_unused({str(info.field_name): value})
        return value

    @property
    def model_name(self) -> str:
        """The model's name, or that of the scorer's class, for traces."""
        return self.model or type(self.scorer).__name__

    def warmup(self) -> None:
        """Loads the model and scores one pair, so that the first request does not wait for it, or fails for want of it.

        A `scorer` that was given is asked to, if it can.
        """
        scorer: Any = self._active_scorer()
        if callable(getattr(scorer, "warmup", None)):
            scorer.warmup()

    def close(self) -> None:
        """Gives the model back; the last user of several with equal settings frees its memory. It loads again at next use.

        A `scorer` that was given belongs to who gave it, and stays open.
        """
        self._hold.close()

    def __copy__(self) -> Self:
        """A copy shares the loaded model, for as long as either is used; closing one leaves the other open."""
        copied = super().__copy__()
        copied._hold = copy(self._hold)
        return copied

    def copy(self, **options: Any) -> Self:
        """The older name of `model_copy` in pydantic; such a copy shares the loaded model in the same way."""
        copied = super().copy(**options)  # type: ignore[deprecated,unused-ignore]
        copied._hold = copy(self._hold)
        return copied

    def _active_scorer(self) -> SupportsScore:
        """The scorer given, or one for the settings as they are now."""
        if self.scorer is not None:
            return self.scorer  # type: ignore[no-any-return]
        return self._hold.scorer_for(self)


class AdapterSettings(ScorerSettings):
    """Options of an adapter: those of the reranker, and what to keep of its ranking."""

    top_n: int | None = Field(default=None, description="How many to return; by default all.")
    score_threshold: float | None = Field(
        default=None, description="Leave out what scores less; applied before `top_n`."
    )

    @field_validator("top_n", mode="before")
    @classmethod
    def _top_n_is_count(cls, top_n: Any) -> Any:
        check_cut(top_n, None)
        return top_n

    @field_validator("score_threshold", mode="before")
    @classmethod
    def _threshold_is_number(cls, score_threshold: Any) -> Any:
        check_cut(None, score_threshold)
        return score_threshold

    def _rank(self, query: str, passages: list[str], top_n: int | None) -> list[RankedPassage]:
        check_cut(top_n, self.score_threshold)
        texts = checked_texts(query, passages)
        if not texts or top_n == 0:
            return []
        scores = self._active_scorer().score(query, texts)
        return rank_scores(checked_scores(scores, texts), top_n, self.score_threshold)

    async def _arank(self, query: str, passages: list[str], top_n: int | None) -> list[RankedPassage]:
        check_cut(top_n, self.score_threshold)
        texts = checked_texts(query, passages)
        if not texts or top_n == 0:
            return []
        scorer = self._active_scorer()
        ascore = getattr(scorer, "ascore", None)
        if callable(ascore):
            scores = ascore(query, texts)
            scores = await scores if inspect.isawaitable(scores) else scores
        else:
            scores = await in_thread(scorer.score, query, texts)
        return rank_scores(checked_scores(scores, texts), top_n, self.score_threshold)

    def _rank_batch(self, requests: Sequence[tuple[str, list[str]]]) -> list[list[RankedPassage]]:
        """`_rank` for several queries, whose pairs share packs."""
        check_cut(self.top_n, self.score_threshold)
        checked = checked_requests(requests)
        if self.top_n == 0 or not any(texts for _, texts in checked):
            return [[] for _ in checked]
        scorer = self._active_scorer()
        if hasattr(scorer, "score_batch"):
            batch = scorer.score_batch(checked)
            if isinstance(batch, Mapping) or not isinstance(batch, Sized) or len(batch) != len(checked):
                raise ValueError(f"the scorer returned {batch!r:.80}: expected {len(checked)} lists of scores")
        else:
            batch = [scorer.score(query, texts) if texts else [] for query, texts in checked]
        return [
            rank_scores(checked_scores(scores, texts), self.top_n, self.score_threshold)
            for scores, (_, texts) in zip(batch, checked, strict=True)
        ]


def _warn_of_unused(options: Mapping[str, Any]) -> None:
    """Says which of these options, given beside a `scorer`, change nothing."""
    fields = {name: field for name, field in RerankSettings.model_fields.items() if name != "model"}
    unused = [name for name, value in options.items() if name in fields and value != fields[name].default]
    if unused:
        logger.warning("%s: for a local model alone, and not used where a scorer is given", ", ".join(unused))


def _can_score(scorer: Any) -> bool:
    """Whether it has a method that takes a query and passages."""
    if isinstance(scorer, type) or not isinstance(scorer, SupportsScore):
        return False
    try:
        inspect.signature(scorer.score).bind("query", ["passage"])
    except TypeError:
        return False
    except ValueError:  # it is not written in Python, and cannot be asked
        return callable(scorer.score)
    return True


def checked_scores(scores: Sequence[float], passages: Sequence[object]) -> list[float]:
    """Scores as Python floats. A scorer that is not ours may return anything."""
    try:
        if isinstance(scores, (str, bytes, Mapping, Set)):
            raise TypeError(f"{type(scores).__name__} is no list of numbers")
        checked = [float(score) for score in scores]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the scorer returned {scores!r:.80}: expected a list of numbers") from error
    if len(checked) != len(passages):
        raise ValueError(f"the scorer returned {len(checked)} scores for {len(passages)} passages")
    for index, score in enumerate(checked):
        if not math.isfinite(score):
            raise ValueError(f"the scorer's score of passage {index} is {score}")
    return checked

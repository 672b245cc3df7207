"""Measures and significance, both by libraries that others trust: ir_measures and scipy. No metric of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any

from .inputs import JudgedSet, Run

if TYPE_CHECKING:
    from ir_measures import Measure

RESAMPLES = 9999
_CURE = 'pip install "bge-rerank-plugins[eval]"'


@dataclass(frozen=True)
class Quality:
    """What a run is worth.

    Attributes:
        mean: By measure, over all judged queries, those that found nothing or have nothing relevant among them.
        per_query: By measure, then by query.
    """

    mean: Mapping[str, float]
    per_query: Mapping[str, Mapping[str, float]]


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """Measures from their names in ir_measures, such as nDCG@10.

    Raises:
        ValueError: A name that ir_measures does not know.
        ImportError: ir_measures is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError(f"an evaluation needs ir_measures: {_CURE}") from error

    libraries: Any = ir_measures.DefaultPipeline
    known: Mapping[str, Any] = ir_measures.measures.registry

    def read(name: str) -> Measure:
        base, _, cutoff = name.partition("@")
        # Of a number, the parser of ir_measures asks for what Python's has no more from 3.14 on.
        simple = base in known and cutoff.isdecimal()
        measure: Measure = known[base] @ int(cutoff) if simple else ir_measures.parse_measure(name)
        return measure

    def parse(name: str) -> Measure:
        try:
            measure = read(name)
            can_be_computed = libraries.supports(measure)
        except (NameError, ValueError, SyntaxError, AssertionError) as error:
            raise ValueError(
                f"measures={name!r}: ir_measures does not know it; it has nDCG@10, RR@10, AP, R@10, P@10, Success@10 and others"
            ) from error
        if measure.params.get("cutoff", 1) < 1:
            raise ValueError(f"measures={name!r}: it looks at no passage; take @1 or more")
        if not can_be_computed:
            raise ValueError(f"measures={name!r}: nothing that ir_measures finds on this machine computes it")
        return measure

    return [parse(name) for name in names]


def trec_scores(run: Run) -> dict[str, dict[str, float]]:
    """A run with scores that count down from the number of results.

    Tools for evaluation order by score and each breaks ties in its own way; where no scores are equal, all read the same order.
    """
    return {
        query: {passage: float(len(passages) - place) for place, passage in enumerate(passages)}
        for query, passages in run.items()
    }


def measure(measures: Sequence[Measure], data: JudgedSet, run: Run) -> Quality:
    """What ir_measures says of a run.

    Raises:
        ValueError: It fails, as for ERR where queries are not numbered.
    """
    import ir_measures

    qrels = {query: _as_taken(judged) for query, judged in data.qrels.items()}
    found_something = {query: scores for query, scores in trec_scores(run).items() if scores}  # Judged divides by none
    try:
        results: Any = ir_measures.calc(list(measures), qrels, found_something)
    except (CalledProcessError, ZeroDivisionError) as error:
        raise ValueError(
            f"measures={','.join(map(str, measures))!r}: ir_measures cannot compute them: {error}"
        ) from error
    per_query: dict[str, dict[str, float]] = {str(measure): {} for measure in measures}
    for found in results.per_query:
        per_query[str(found.measure)][found.query_id] = float(found.value)
    mean: dict[str, float] = {}
    for measure in measures:
        values = per_query[str(measure)]
        left_out = [
            query for query in data.queries if query not in values
        ]  # by some of its providers, where nothing is judged
        values.update(dict.fromkeys(left_out, 0.0))
        by_all = fmean(values.values()) if left_out and values else float(results.aggregated[measure])
        mean[str(measure)] = by_all
    return Quality(mean, per_query)


def _as_taken(judged: Mapping[str, int]) -> dict[str, int]:
    """A query's judgements: where all are negative nothing is relevant, and pytrec_eval writes past its memory from -2 on."""
    return dict.fromkeys(judged, 0) if max(judged.values(), default=0) < 0 else dict(judged)


def recall_of_candidates(data: JudgedSet, run: Run) -> float:
    """The share of the relevant passages that are among the candidates: reranking finds no more.

    The mean over the queries that have a relevant passage; 1 where none has, since nothing is missing.
    """
    from ir_measures import R

    longest = max(map(len, run.values()), default=0)
    (found,) = measure([R @ max(1, longest)], data, run).per_query.values()
    return fmean([found[query] for query in data.answerable] or [1.0])


def p_value(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Fisher's paired randomisation test, two-sided, by scipy: how often chance alone makes means differ so much.

    Args:
        first: A measure's value by query.
        second: The same queries' values of another system.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        import numpy as np
        from scipy.stats import permutation_test
    except ImportError as error:
        raise ImportError(f"significance needs scipy: {_CURE}") from error

    differences = np.array([first[query] - second[query] for query in sorted(first)])
    if len(differences) < 2:
        return 1.0  # one query proves nothing

    def mean(values: Any, axis: int) -> Any:
        return np.mean(values, axis=axis)

    result = permutation_test(
        (differences,), mean, permutation_type="samples", n_resamples=RESAMPLES, batch=500, rng=0, vectorized=True
    )
    return float(result.pvalue)

"""Reranks the candidates of every query with one system after the other, and compares what comes out.

Knows nothing of files of data, of models or of the terminal.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from .. import __version__
from ..adapter import SupportsScore, checked_scores
from ..files import write_whole
from ..identity import asked_options, digest, local_files
from ..jsonl import InputError
from ..ranking import rank_scores
from ..scorer import Scorer
from ..texts import check_text
from .inputs import JudgedSet, Run, checked_run
from .measures import Quality, measure, p_value, parse_measures, recall_of_candidates, trec_scores
from .settings import MEASURES
from .store import ScoreStore, check_same_data

LONGEST_TAG = 200
"""Bytes of a system's name in the name of its run, for which file systems have 255."""


@dataclass(frozen=True)
class System:
    """One ranking of the candidates and what it is worth.

    Attributes:
        name: The reranker, or the first stage.
        run: Its ranking of each query's candidates.
        quality: Its measures.
        p_value: Of its difference from the first stage in the first measure; None for the first stage itself.
        pairs: How many pairs were scored.
        seconds: How long each query took, one after the other; none for the first stage, which is not timed.
    """

    name: str
    run: Run
    quality: Quality
    p_value: float | None = None
    pairs: int = 0
    seconds: tuple[float, ...] = ()

    @property
    def milliseconds(self) -> float | None:
        """The median time of a query."""
        return 1000 * median(self.seconds) if self.seconds else None

    @property
    def pairs_per_second(self) -> float | None:
        """All pairs over all time."""
        return self.pairs / sum(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Report:
    """Rankings of the same candidates, the first stage's first.

    Attributes:
        data: What was asked and judged.
        measures: Names of the measures; the first one is tested.
        systems: The first stage, then the rerankers in their order.
        recall: The share of the relevant passages that are among the candidates, mean over the queries that have any:
            reranking finds no more.
    """

    data: JudgedSet
    measures: tuple[str, ...]
    systems: tuple[System, ...]
    recall: float

    @property
    def best(self) -> System:
        """The reranker that is best in the first measure; the first stage if there is none."""
        return max(self.systems[1:] or self.systems, key=lambda system: system.quality.mean[self.measures[0]])

    def p_value(self, first: System, second: System, measure_name: str | None = None) -> float:
        """How often chance alone makes two systems differ so much: a paired randomisation test over the queries."""
        name = measure_name or self.measures[0]
        return p_value(first.quality.per_query[name], second.quality.per_query[name])


def evaluate(
    data: JudgedSet,
    candidates: Run,
    scorers: Mapping[str, SupportsScore] | Iterable[tuple[str, SupportsScore]],
    *,
    measures: str | Sequence[str] = MEASURES,
    first_stage: str = "first stage",
    output: str | Path | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Report:
    """Reranks candidates with each scorer and measures before and after.

    Every query is scored alone and timed, so that the time is what a user waits; the model is loaded and used once before.
    Equal scores keep the candidates' order. A query without candidates is not scored, and counts 0.

    Args:
        data: Queries, passages and judgements; those of other queries are left out.
        candidates: For each query the passages to rerank, best first; all of them are. Those of other queries are left out.
        scorers: By name. An iterable may make each one when its turn comes, and close it then.
        measures: Names in ir_measures; the first one is tested for significance.
        first_stage: What to call the candidates' own order.
        output: Folder for scores.jsonl, which lets a killed evaluation go on where it was, results.json, per_query.tsv and
            a TREC run of each system; None writes nothing. A scorer that is not just a `Scorer` is known again by its name.
        advance: Called after every query.

    Returns:
        The first stage and every scorer.

    Raises:
        ValueError: A query that is not judged, candidates or judgements that are none, an unknown measure; a scorer that
            fails, named with its query; results of other data in `output`.
        ImportError: The extra `eval` is not installed.

    Examples:
        >>> data = read_beir("scifact")  # doctest: +SKIP
        >>> report = evaluate(data, bm25_run(data, 100), {"m3": Scorer("BAAI/bge-reranker-v2-m3")})  # doctest: +SKIP
    """
    parsed = parse_measures([measures] if isinstance(measures, str) else measures)
    if not parsed or not data.queries:
        raise InputError("measures: name at least one" if not parsed else f"{data.name}: there is no query")
    names = tuple(map(str, parsed))
    data, candidates = data.judged(), checked_run(candidates, data)
    data_digest = digest(data.name, dict(data.queries), {query: dict(judged) for query, judged in data.qrels.items()})
    folder = None if output is None else Path(output)
    if folder is not None:
        for each in {*data.queries, *chain.from_iterable(candidates.values())}:
            if len(each.split()) != 1:
                raise InputError(
                    f"output={str(output)!r}: a TREC run holds no id that is empty or has blanks: {each!r}"
                )
        check_same_data(folder / "results.json", data_digest)
        folder.mkdir(parents=True, exist_ok=True)
    store = ScoreStore(None if folder is None else folder / "scores.jsonl")
    base = System(first_stage, candidates, measure(parsed, data, candidates))
    systems = [base]
    for name, scorer in scorers.items() if isinstance(scorers, Mapping) else scorers:
        check_text(name, "scorers: the name")
        if set(name) & set("\t\r\n"):
            raise InputError(f"scorers: the name {name!r}: a table of results holds no tab and no line break")
        if not callable(getattr(scorer, "score", None)):
            raise InputError(f"scorers: {name!r} is {scorer!r:.80}, which has no method score(query, passages)")
        if any(system.name == name for system in systems):
            raise InputError(f"scorers: {name!r} is named twice")
        run, pairs, seconds = _rerank(name, scorer, data, candidates, store, advance)
        quality = measure(parsed, data, run)
        significance = p_value(quality.per_query[names[0]], base.quality.per_query[names[0]])
        systems.append(System(name, run, quality, significance, pairs, seconds))
    report = Report(data, names, tuple(systems), recall_of_candidates(data, candidates))
    if folder is not None:
        _write(report, folder, data_digest)
    return report


def _rerank(
    name: str,
    scorer: SupportsScore,
    data: JudgedSet,
    candidates: Run,
    store: ScoreStore,
    advance: Callable[[], object],
) -> tuple[Run, int, tuple[float, ...]]:
    """The candidates in a scorer's order, how many there were, and the time of each query."""
    identity = _identity(name, scorer)
    run: Run = {}
    seconds: list[float] = []
    warm = False
    for query, text in data.queries.items():
        found = candidates.get(query, [])
        if not found:
            run[query] = []
            advance()
            continue
        passages = [data.passages[passage] for passage in found]
        key = digest(identity, text, passages)
        record = store.get(key)
        if record is None:
            try:
                if not warm:
                    scorer.score(text, passages[:1])
                    warm = True
                start = time.perf_counter()
                scores = checked_scores(scorer.score(text, passages), passages)
                elapsed = time.perf_counter() - start
            except Exception as error:  # whatever a scorer of somebody's own raises
                why = error if isinstance(error, (ValueError, RuntimeError)) else repr(error)
                raise InputError(f"{name}, query {query!r}: {why}") from error
            record = store.put(key, system=name, query=query, scores=scores, seconds=elapsed)
        run[query] = [found[ranked.index] for ranked in rank_scores(record["scores"])]
        seconds.append(record["seconds"])
        advance()
    return run, sum(map(len, run.values())), tuple(seconds)


def _identity(name: str, scorer: SupportsScore) -> Any:
    """What scores and time depend on besides the texts."""
    if not isinstance(scorer, Scorer):
        return name
    own = [__version__, asked_options(scorer.settings), local_files(scorer.settings)]
    kind = type(scorer)
    return own if kind is Scorer else [*own, kind.__module__, kind.__qualname__, name]  # it may score as it likes


def _write(report: Report, folder: Path, data_digest: str) -> None:
    """The files of an evaluation."""
    results = {
        "data": {
            "name": report.data.name,
            "digest": data_digest,
            "queries": len(report.data.queries),
            "queries_without_relevant": report.data.queries_without_relevant,
            "passages": len(report.data.passages),
        },
        "recall_of_candidates": report.recall,
        "systems": [
            {
                "name": system.name,
                "measures": dict(system.quality.mean),
                "p_value_against_first_stage": system.p_value,
                "p_value_against_best": None if system is report.best else report.p_value(system, report.best),
                "pairs": system.pairs,
                "milliseconds_per_query": system.milliseconds,
                "pairs_per_second": system.pairs_per_second,
            }
            for system in report.systems
        ],
    }
    write_whole(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    rows = ["\t".join(("query", "system", *report.measures))]
    for system in report.systems:
        values = system.quality.per_query
        rows += [
            "\t".join((query, system.name, *(f"{values[name][query]:.6g}" for name in report.measures)))
            for query in report.data.queries
        ]
    write_whole(folder / "per_query.tsv", "\n".join(rows) + "\n")
    (folder / "runs").mkdir(exist_ok=True)
    tags: set[str] = set()
    for system in report.systems:
        tag = "".join(letter if letter.isalnum() or letter in "-._@" else "-" for letter in system.name)
        while len(os.fsencode(tag)) > LONGEST_TAG:
            tag = tag[1:]  # of a path the end tells most
        while tag.lower() in tags:  # of another system, whose name differs in such letters
            tag += "-2"
        tags.add(tag.lower())
        lines = [
            f"{query} Q0 {passage} {place} {score:.0f} {tag}\n"
            for query, scores in trec_scores(system.run).items()
            for place, (passage, score) in enumerate(scores.items(), start=1)
        ]
        write_whole(folder / "runs" / f"{tag}.trec", "".join(lines))

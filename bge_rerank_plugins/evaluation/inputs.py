"""Reads judged queries and runs from files. Whatever is wrong with one is told with its name and line.

Knows BEIR's layout, TREC's columns and MTEB's rerank sets; nothing of retrieval, models or measures.
"""

from __future__ import annotations

import gzip
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from ..jsonl import InputError, check_text, check_texts, json_kind, read_lines
from ..texts import in_order

LARGEST_RELEVANCE = 10**9 - 1
"""What pytrec_eval takes memory for every grade below."""

Run = dict[str, list[str]]
"""For each query the ids of what was found, best first."""


@dataclass(frozen=True)
class JudgedSet:
    """Queries, passages and what is known of their relevance.

    Attributes:
        name: What it is called in reports.
        queries: Text by id; only queries that are judged.
        passages: Text by id.
        qrels: For each query the relevance of the passages judged; 0 is irrelevant. A query may have none that is relevant.
        pools: For each query the only passages that may be ranked, or None where all may be.
    """

    name: str
    queries: Mapping[str, str]
    passages: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    pools: Mapping[str, Sequence[str]] | None = None

    def sampled(self, count: int | None) -> JudgedSet:
        """The set with so many of its queries, drawn at random, the same ones every time; None for all."""
        if count is not None and count < 1:
            raise ValueError(f"count={count}: take at least 1 query, or None for all")
        if count is None or count >= len(self.queries):
            return self
        kept = set(random.Random(0).sample(sorted(self.queries), count))
        return replace(
            self,
            queries={query: text for query, text in self.queries.items() if query in kept},
            qrels={query: judged for query, judged in self.qrels.items() if query in kept},
        )

    def judged(self) -> JudgedSet:
        """The set with the judgements of its queries alone, as Python's own whole numbers.

        Raises:
            InputError: A query has no judgements, or something is no whole number.
        """
        qrels: dict[str, dict[str, int]] = {}
        for query in self.queries:
            if not isinstance(query, str):
                raise InputError(f"queries: the id {query!r}: expected a string")
            if query not in self.qrels:
                raise InputError(f"qrels: query {query!r} is not judged; leave it out of queries, or judge it {{}}")
            judged = self.qrels[query]
            if not isinstance(judged, Mapping):
                raise InputError(
                    f"qrels: {judged!r:.80} for query {query!r}: expected the relevance of passages by their ids"
                )
            for passage, relevance in judged.items():
                where = f"of passage {passage!r} for query {query!r}"
                if not isinstance(passage, str):
                    raise InputError(f"qrels: the id {where}: expected a string")
                if not isinstance(relevance, Integral) or abs(relevance) > LARGEST_RELEVANCE:
                    raise InputError(
                        f"qrels: relevance {relevance!r} {where}: expected a whole number up to {LARGEST_RELEVANCE}"
                    )
            qrels[query] = {passage: int(relevance) for passage, relevance in judged.items()}
        return replace(self, qrels=qrels)

    def check_pools(self) -> None:
        """Raises InputError for a query without the passages that it may rank, and for such that are not there."""
        if self.pools is None:
            return
        for query in self.queries:
            if query not in self.pools or not in_order(self.pools[query]):
                raise InputError(f"pools: query {query!r} has none, or no list")
            for passage in self.pools[query]:
                if passage not in self.passages:
                    raise InputError(f"pools: passage {passage!r} of query {query!r} is not among the passages")

    @property
    def answerable(self) -> list[str]:
        """The queries that a passage is relevant for."""
        return [query for query in self.queries if any(value > 0 for value in self.qrels[query].values())]

    @property
    def queries_without_relevant(self) -> int:
        """How many queries no passage is relevant for; they count as 0 in every measure, as in trec_eval."""
        return len(self.queries) - len(self.answerable)


def read_beir(folder: str | Path, split: str = "test", qrels: str | Path | None = None) -> JudgedSet:
    """Reads a folder in BEIR's layout; each of its files may be plain or end in .gz.

    Args:
        folder: Holds corpus.jsonl, queries.jsonl and qrels/*.tsv.
        split: Which qrels: the file's name without its ending.
        qrels: A file of judgements to use instead.

    Raises:
        InputError: A file is missing or malformed; the message names it and the line.
    """
    folder = Path(folder)
    if qrels is None:
        qrels = _plain_or_gz(folder / "qrels" / f"{split}.tsv")
    corpus, queries = (_plain_or_gz(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    return replace(read_files(corpus, queries, qrels), name=folder.resolve().name)


def read_files(corpus: str | Path, queries: str | Path, qrels: str | Path) -> JudgedSet:
    """Reads passages and queries as JSON lines (`_id`, `text`, and `title` for passages), and judgements.

    Args:
        corpus: A passage's text is its title, a space and its text, as in BEIR.
        queries: Queries that are not judged are left out.
        qrels: Lines of TREC's four columns (query, iteration, passage, relevance), or of BEIR's three (query, passage,
            relevance) with or without the title line.

    Raises:
        InputError: A malformed line, an id that is given twice, a judgement of what is in neither file.
    """
    passages = _texts_by_id(corpus, "title", "text")
    asked = _texts_by_id(queries, "text")
    judged = _read_qrels(qrels, asked, passages)
    return JudgedSet(
        name=Path(qrels).stem,
        queries={query: text for query, text in asked.items() if query in judged},
        passages=passages,
        qrels=judged,
    )


def read_rerank_set(path: str | Path) -> JudgedSet:
    """Reads JSON lines of `query`, `positive` and `negative`, the form of MTEB's reranking sets.

    Each query has only its own texts to rank. A text given twice for a query counts once, and as positive if it is so in one
    place. A query's id is the number of its line.

    Raises:
        InputError: A malformed line.
    """
    queries: dict[str, str] = {}
    passages: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    pools: dict[str, list[str]] = {}
    ids: dict[str, str] = {}

    def check(record: dict[str, Any]) -> None:
        check_text(record, "query")
        for key in ("positive", "negative"):
            if isinstance(record.get(key), str):
                record[key] = [record[key]]
            check_texts(record, key)

    for line in read_lines(lines_of(path), str(path), check):
        query = line.place.rpartition(":")[2]
        queries[query] = line.record["query"]
        qrels[query] = {}
        for text, relevance in [
            (text, relevance) for relevance, key in enumerate(("negative", "positive")) for text in line.record[key]
        ]:
            passage = ids.setdefault(text, f"p{len(ids) + 1}")
            passages[passage] = text
            qrels[query][passage] = relevance
        pools[query] = list(qrels[query])
    return JudgedSet(Path(path).name.partition(".")[0], queries, passages, qrels, pools)


def read_run(path: str | Path, data: JudgedSet) -> Run:
    """Reads TREC's six columns: query, Q0, passage, rank, score, tag.

    The score orders, the highest first; equal scores keep the order of the lines. Lines of queries that are not judged are
    left out; a judged query that the file does not name has found nothing.

    Raises:
        InputError: A malformed line, a passage that is not in the corpus or is named twice for a query, a file that names
            none of the queries.
    """
    found: dict[str, dict[str, float]] = {query: {} for query in data.queries}
    for place, columns in _rows(path, (6,), "query Q0 passage rank score tag"):
        query, passage, score = columns[0], columns[2], _number(columns[4], place)
        if query not in found:
            continue
        if passage not in data.passages:
            raise InputError(f"{place}: passage {passage!r} is not in the corpus")
        if passage in found[query]:
            raise InputError(f"{place}: passage {passage!r} is named twice for query {query!r}")
        found[query][passage] = score
    if data.queries and not any(found.values()):
        raise InputError(f"{path}: names none of the {len(data.queries)} judged queries")
    return {query: sorted(scores, key=lambda passage: -scores[passage]) for query, scores in found.items()}


def checked_run(run: Mapping[str, Iterable[str]], data: JudgedSet) -> Run:
    """The run of a set's queries, as lists.

    Raises:
        InputError: What has no order, a passage that is not in the set, or one that is named twice for a query.
    """
    checked: Run = {}
    for query in data.queries:
        found = run.get(query, [])
        if not in_order(found):
            raise InputError(
                f"candidates: {found!r:.80} for query {query!r}: expected a list of passages' ids, best first"
            )
        checked[query] = list(found)
        if any(not isinstance(passage, str) for passage in checked[query]):
            raise InputError(f"candidates: {found!r:.80} for query {query!r}: expected ids, each a string")
        for passage, count in Counter(checked[query]).items():
            if passage not in data.passages:
                raise InputError(f"candidates: passage {passage!r} of query {query!r} is not among the passages")
            if count > 1:
                raise InputError(f"candidates: passage {passage!r} is named twice for query {query!r}")
    return checked


def lines_of(path: str | Path) -> Iterator[bytes]:
    """The lines of a file, plain or .gz.

    Raises:
        InputError: The compressed file is damaged or ends too early; the message names the line that could not be read.
    """
    path = Path(path)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: damaged gzip file: {error}") from error


def _plain_or_gz(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    if path.exists() or not packed.exists():
        return path
    return packed


def _texts_by_id(path: str | Path, *keys: str) -> dict[str, str]:
    """Texts by `_id`; what is absent or empty among the keys is left out, but the last must be there."""

    def check(record: dict[str, Any]) -> None:
        check_text(record, "_id")
        check_text(record, keys[-1])
        for key in keys[:-1]:
            if not isinstance(record.get(key), (str, type(None))):
                raise ValueError(f'"{key}" is {json_kind(record[key])}, expected a string')
        if record["_id"] in texts:
            raise ValueError(f"the id {record['_id']!r} is given twice")

    texts: dict[str, str] = {}
    for line in read_lines(lines_of(path), str(path), check):
        texts[line.record["_id"]] = " ".join(filter(None, (line.record.get(key) for key in keys))).strip()
    return texts


def _read_qrels(path: str | Path, queries: Mapping[str, str], passages: Mapping[str, str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    rows = _rows(path, (3, 4), "query passage relevance, or query iteration passage relevance")
    for number, (place, columns) in enumerate(rows):
        query, passage, relevance = columns[0], columns[-2], columns[-1]
        is_of_words = query not in queries and passage not in passages and not re.match(r"[+-]?\.?\d", relevance)
        if number == 0 and len(columns) == 3 and is_of_words:
            continue  # BEIR's title line
        if not _is_whole(relevance):
            raise InputError(f"{place}: relevance {relevance!r}: expected a whole number")
        if query not in queries:
            raise InputError(f"{place}: query {query!r} is not among the queries")
        if passage not in passages:
            raise InputError(f"{place}: passage {passage!r} is not in the corpus")
        judged = qrels.setdefault(query, {})
        if passage in judged:
            raise InputError(f"{place}: passage {passage!r} is judged twice for query {query!r}")
        judged[passage] = int(relevance)
    if not qrels:
        raise InputError(f"{path}: holds no judgement")
    return qrels


def _rows(path: str | Path, counts: tuple[int, ...], expected: str) -> Iterator[tuple[str, list[str]]]:
    """Columns of each line that is not blank, with its place: by tabs where a line has them, else by spaces."""
    for number, raw in enumerate(lines_of(path), start=1):
        place = f"{path}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
        if not text:
            continue
        columns = text.split("\t") if "\t" in text else text.split()
        if len(columns) not in counts:
            raise InputError(f"{place}: {len(columns)} columns, expected {expected}")
        yield place, columns


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d{1,9}", text, re.ASCII) is not None  # up to LARGEST_RELEVANCE


def _number(text: str, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise InputError(f"{place}: score {text!r}: expected a number")
    return number

"""The demo: search the documentation of the reader's own standard library with BM25, rerank the best, show both.

Light to import; the extra `demo` is needed only by `run`. Knows the adapters and nothing of what is behind them.
"""

from __future__ import annotations

import platform
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from typing_extensions import ParamSpec

from .settings import RerankSettings

if TYPE_CHECKING:
    from rich.console import Console

    from .docstrings import Docstring
    from .scorer import Scorer

PUBLISHED_MODEL = "BAAI/bge-reranker-v2-m3"
"""The model for real work."""

QUERIES = (
    "make a temporary directory that is deleted when I am done",
    "list the files in a folder",
    "compare two directories",
    "parse a string into a datetime object",
)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_CURE = 'pip install "bge-rerank-plugins[demo]"'
_NARROWEST = 60
"""Columns of a terminal that both rankings need; on fewer, only the reranked one is shown."""


class Candidate(NamedTuple):
    """A docstring with its score for a query.

    Attributes:
        place: Its place in BM25's ranking, from 0.
        docstring: What was found.
        score: BM25's score, or the reranker's.
    """

    place: int
    docstring: Docstring
    score: float

    @property
    def text(self) -> str:
        """What is searched and scored."""
        return searched_text(self.docstring)


Rerank = Callable[[str, Sequence[Candidate]], list[Candidate]]
"""A query and candidates to the best of them, best first, with the reranker's scores."""


def run(queries: Sequence[str], settings: RerankSettings, framework: str, *, candidates: int, top_n: int) -> None:
    """Searches for each query and prints BM25's ranking beside the reranked one.

    Args:
        queries: What to search for.
        settings: The reranker.
        framework: A key of `FRAMEWORKS`.
        candidates: How many of BM25's best are reranked.
        top_n: How many are shown.

    Raises:
        ImportError: The extra `demo`, or that of the framework, is not installed; the message says how to install it.
    """
    console = _console()
    from . import Scorer
    from .docstrings import standard_library

    docstrings, reading = _timed(standard_library)
    index, indexing = _timed(Index, docstrings)
    console.print(
        f"The documentation of this Python's standard library ({platform.python_version()}): {len(docstrings):,} docstrings, "
        f"read in {reading}, indexed for BM25 in {indexing}."
    )
    with Scorer.from_settings(settings) as scorer:
        rerank, loading = _timed(_loaded, scorer, framework, top_n, docstrings[0])
        console.print(
            f"Model {settings.model} loaded in {loading}; "
            f"BM25's best {candidates} are reranked through the adapter for {FRAMEWORKS[framework].title}."
        )
        for query in queries:
            console.print()
            console.print(f"Query: {query}", style="bold")
            found, searching = _timed(index.search, query, candidates)
            if not found:
                console.print("BM25 found nothing: no docstring shares a word with this query.")
                continue
            reranked, reranking = _timed(rerank, query, found)
            _print_rankings(console, found[:top_n], reranked)
            console.print(f"BM25 found {len(found)} in {searching}, reranked in {reranking}.")
            console.print(_summary(reranked[0].docstring, 2 * max(console.width, _NARROWEST)))
    console.print()
    if settings.model == "embedded":
        console.print(
            "The embedded model is a small one, for demos and tests. For real use, take "
            f"{PUBLISHED_MODEL}: bge-rerank demo --model {PUBLISHED_MODEL}"
        )


class Index:
    """BM25 over docstrings.

    Args:
        docstrings: The corpus.
    """

    def __init__(self, docstrings: Sequence[Docstring]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError(f"the demo needs bm25s: {_CURE}") from error

        self._docstrings = docstrings
        self._tokenize: Callable[[list[str]], Any] = partial(bm25s.tokenize, stopwords="en", show_progress=False)
        self._bm25: Any = bm25s.BM25()
        self._bm25.index(self._tokenize([searched_text(found) for found in docstrings]), show_progress=False)

    def search(self, query: str, limit: int) -> list[Candidate]:
        """The `limit` best docstrings for a query, best first; those that share no word with it are left out."""
        limit = min(limit, len(self._docstrings))
        (rows,), (scores,) = self._bm25.retrieve(self._tokenize([query]), k=limit, show_progress=False)
        found = [(self._docstrings[row], float(score)) for row, score in zip(rows, scores, strict=True) if score > 0]
        return [Candidate(place, docstring, score) for place, (docstring, score) in enumerate(found)]


def searched_text(docstring: Docstring) -> str:
    """A docstring as a passage."""
    return f"{docstring.name}\n{docstring.text}"


def langchain_rerank(scorer: Scorer, top_n: int) -> Rerank:
    """Reranks with the adapter for LangChain."""
    try:
        from langchain_core.documents import Document
    except ImportError as error:
        raise ImportError(f"the demo needs langchain-core: {_CURE}") from error
    from .langchain import BGERerank

    reranker = BGERerank(scorer=scorer, top_n=top_n)

    def rerank(query: str, candidates: Sequence[Candidate]) -> list[Candidate]:
        documents = [Document(page_content=found.text, metadata={"place": found.place}) for found in candidates]
        best = [document.metadata for document in reranker.compress_documents(documents, query)]
        return [candidates[found["place"]]._replace(score=found["relevance_score"]) for found in best]

    return rerank


def llama_index_rerank(scorer: Scorer, top_n: int) -> Rerank:
    """Reranks with the adapter for LlamaIndex."""
    try:
        from llama_index.core.schema import NodeWithScore, TextNode
    except ImportError as error:
        cure = _CURE.replace("demo", "demo,llama-index")
        raise ImportError(f"--framework llama-index needs llama-index-core: {cure}") from error
    from .llama_index import BGERerank

    reranker = BGERerank(scorer=scorer, top_n=top_n)

    def rerank(query: str, candidates: Sequence[Candidate]) -> list[Candidate]:
        nodes = [
            NodeWithScore(node=TextNode(id_=str(found.place), text=found.text), score=found.score)
            for found in candidates
        ]
        best = reranker.postprocess_nodes(nodes, query_str=query)
        return [candidates[int(found.node.node_id)]._replace(score=found.get_score()) for found in best]

    return rerank


class Framework(NamedTuple):
    """A framework that has an adapter.

    Attributes:
        title: Its name.
        adapter: A scorer and `top_n` to a function that reranks.
    """

    title: str
    adapter: Callable[[Scorer, int], Rerank]


FRAMEWORKS = {
    "langchain": Framework("LangChain", langchain_rerank),
    "llama-index": Framework("LlamaIndex", llama_index_rerank),
}


def _timed(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> tuple[_T, str]:
    """The result of some work, and how long it took in words."""
    start = time.perf_counter()
    result = work(*args, **kwargs)
    seconds = time.perf_counter() - start
    return (
        result,
        f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds:.2f} s",
    )


def _loaded(scorer: Scorer, framework: str, top_n: int, docstring: Docstring) -> Rerank:
    """The adapter's reranking with everything loaded, so that what is timed later is the reranking alone."""
    scorer.warmup()
    rerank = FRAMEWORKS[framework].adapter(scorer, top_n)
    rerank("", [Candidate(0, docstring, 0.0)])
    return rerank


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f"the demo needs rich: {_CURE}") from error

    class Lines(Console):
        def on_broken_pipe(self) -> None:
            raise  # again what was caught; rich would end the process with status 1

    return Lines(highlight=False, markup=False, emoji=False)


def _print_rankings(console: Console, found: Sequence[Candidate], reranked: Sequence[Candidate]) -> None:
    """Both rankings side by side, where there is room. `was`: the place that BM25 gave."""
    from rich import box
    from rich.table import Table

    titles = ["", "BM25", "score", "reranked", "score ", "was"]
    if console.width < _NARROWEST:
        titles = ["", "reranked", "score ", "was"]
    numbers = {"": 2, "score": 5, "score ": 6, "was": 3}
    gaps = 2 * (len(titles) - 1)
    room = console.width - gaps - sum(numbers.get(title, 0) for title in titles)
    name_width = max(8, room // sum(title not in numbers for title in titles))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in titles:
        if title in numbers:
            table.add_column(title.strip(), width=numbers[title], justify="right", no_wrap=True)
        else:
            table.add_column(title, width=name_width, no_wrap=True)
    for rank, (before, after) in enumerate(zip(found, reranked, strict=False), start=1):
        cells = {
            "": str(rank),
            "BM25": _cut(before.docstring.name, name_width),
            "score": f"{before.score:.1f}",
            "reranked": _cut(after.docstring.name, name_width),
            "score ": f"{after.score:.2f}",
            "was": str(after.place + 1),
        }
        table.add_row(*(cells[title] for title in titles))
    console.print(table)


def _cut(name: str, width: int) -> str:
    """A dotted name without its first parts, which tell least, where it is too long."""
    if len(name) <= width:
        return name
    kept = name[2 - width :]
    return f"..{kept.partition('.')[2] or kept}"


def _summary(docstring: Docstring, width: int) -> str:
    paragraph = docstring.text.partition("\n\n")[0]
    return textwrap.shorten(f"Best: {docstring.name}: {paragraph}", width, placeholder=" ...")

"""BGE rerankers as LangChain components: a document compressor, and a cross-encoder for `CrossEncoderReranker`.

Takes the text out of documents, asks the scorer, writes scores into copies. Knows nothing of torch or of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from pydantic import Field
from typing_extensions import TypedDict

from .adapter import AdapterSettings, ScorerSettings, checked_scores
from .overriding import overrides
from .texts import by_place, in_order, requests_of_pairs

try:
    from langchain_core.callbacks import AsyncCallbackManager, CallbackManager, Callbacks
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables import Runnable, RunnableLambda
    from langchain_core.runnables.config import ensure_config
except ImportError as error:
    raise ImportError(
        f'the LangChain adapter needs langchain-core ({error}): pip install "bge-rerank-plugins[langchain]"'
    ) from error

if TYPE_CHECKING:
    from .ranking import RankedPassage

__all__ = ["BGECrossEncoder", "BGERerank"]


class RerankInput(TypedDict):
    """What `BGERerank.as_runnable` takes: a dictionary, or a state with these attributes."""

    documents: Sequence[Document]
    query: str


class BGERerank(AdapterSettings, BaseDocumentCompressor):
    """Reranks documents with a BGE reranker, best first, inside any LangChain retriever or chain.

    All options of `RerankSettings` are fields of this class. The model is loaded at first use, once per process for all
    adapters with equal settings; safe to call from any number of threads and tasks.

    Args:
        model: Hub id or local directory of a BGE reranker.
        scorer: Object with `score(query, passages)` to use in place of `model`.
        top_n: How many documents to return; None for all.
        score_threshold: Leave out documents that score less; applied before `top_n`.
        relevance_score_key: Metadata key that the score is written to.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.

    Examples:
        >>> from langchain_classic.retrievers import ContextualCompressionRetriever  # doctest: +SKIP
        >>> reranker = BGERerank(model="BAAI/bge-reranker-v2-m3", top_n=3)  # doctest: +SKIP
        >>> retriever = ContextualCompressionRetriever(
        ...     base_compressor=reranker, base_retriever=store.as_retriever(search_kwargs={"k": 50})
        ... )  # doctest: +SKIP
        >>> retriever.invoke("what is panda?")[0].metadata["relevance_score"]  # doctest: +SKIP
        5.26171875
    """

    top_n: int | None = Field(default=3, description="How many documents to return; None for all.")
    relevance_score_key: str = Field(
        default="relevance_score", min_length=1, description="Metadata key that the score is written to."
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """As in LangChain's other compressors, a subclass that overrides the blocking method alone means the async one, too."""
        super().__pydantic_init_subclass__(**options)
        if overrides(cls, "compress_documents", BGERerank) and not overrides(cls, "acompress_documents", BGERerank):
            cls.acompress_documents = BaseDocumentCompressor.acompress_documents  # type: ignore[method-assign,assignment]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Reranks documents.

        Args:
            documents: The documents to rerank; they are not modified.
            query: The question.
            callbacks: Where to report the run. By default those of the chain that this is called in.

        Returns:
            Copies of the best documents, best first, equal scores in the order of the input. Ids, metadata and classes are
            kept; the score is in the metadata, as a Python float.

        Raises:
            ValueError: The query is not a string, something is not a `Document`, or the model cannot be loaded.

        Examples:
            >>> reranker.compress_documents([Document("hi"), Document("Pandas eat bamboo.")], "pandas")  # doctest: +SKIP
            [Document(metadata={'relevance_score': 3.1}, page_content='Pandas eat bamboo.'), ...]
        """
        given = _listed(documents)
        with self._traced(given, query, callbacks) as compressed:
            compressed += self._compressed(given, query)
        return compressed

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """`compress_documents` without blocking the event loop.

        Args:
            documents: The documents to rerank; they are not modified.
            query: The question.
            callbacks: Where to report the run. By default those of the chain that this is called in.

        Returns:
            Copies of the best documents, best first, with their scores in the metadata.

        Raises:
            ValueError: The query is not a string, something is not a `Document`, or the model cannot be loaded.
        """
        given = _listed(documents)
        manager = AsyncCallbackManager.configure(inheritable_callbacks=_ambient(callbacks))
        run = await manager.on_chain_start(None, _inputs(given, query), name=type(self).__name__)
        try:
            compressed = await self._acompressed(given, query)
        except BaseException as error:  # a cancelled task, too, must not leave its run open
            await run.on_chain_error(error)
            raise
        await run.on_chain_end({"documents": compressed})
        return compressed

    def compress_documents_batch(
        self, requests: Sequence[tuple[Sequence[Document], str]], callbacks: Callbacks | None = None
    ) -> list[list[Document]]:
        """Reranks for several queries at once; their documents share the device's work, which is faster than one by one.

        Args:
            requests: (documents, query) of each, in the order of `compress_documents`.
            callbacks: Where to report the runs, one for each request. By default those of the chain that this is called in.

        Returns:
            For each request what `compress_documents` returns.

        Raises:
            ValueError: As `compress_documents`, naming the request by its place.
        """
        given = by_place(requests, "(documents, query)", lambda documents, query: (_listed(documents), query))
        if overrides(type(self), "compress_documents", BGERerank):
            compress = partial(self.compress_documents, callbacks=callbacks)
            return by_place(given, "", lambda documents, query: list(compress(documents, query)))
        texts = by_place(given, "", lambda documents, query: (query, _texts(documents, Document)))
        with ExitStack() as runs:
            compressed = [runs.enter_context(self._traced(documents, query, callbacks)) for documents, query in given]
            for (documents, _), into, ranked in zip(given, compressed, self._rank_batch(texts), strict=True):
                into += self._copies(documents, ranked)
        return compressed

    def as_runnable(self) -> Runnable[RerankInput, list[Document]]:
        """This reranker as a step of a chain, from {"documents": ..., "query": ...} to the reranked documents.

        A state with these attributes, as LangGraph's may be, will do, too.

        `batch` and `abatch` run its inputs concurrently, and the pairs of concurrent calls share packs.

        Examples:
            >>> chain = {"documents": retriever, "query": RunnablePassthrough()} | reranker.as_runnable()  # doctest: +SKIP
            >>> chain.invoke("what is panda?")  # doctest: +SKIP
            [Document(...), ...]
        """
        step = RunnableLambda(self._invoke, afunc=self._ainvoke, name=type(self).__name__)
        return step.with_types(input_type=RerankInput, output_type=list[Document])

    def _invoke(self, given: RerankInput) -> list[Document]:
        if overrides(type(self), "compress_documents", BGERerank):
            return list(self.compress_documents(*_step_input(given)))
        return self._compressed(*_step_input(given))  # the step's own run is the one to be traced

    async def _ainvoke(self, given: RerankInput) -> list[Document]:
        if overrides(type(self), "acompress_documents", BGERerank):
            return list(await self.acompress_documents(*_step_input(given)))
        return await self._acompressed(*_step_input(given))

    def rerank(
        self, documents: Sequence[Document | str], query: str, *, top_n: int | EllipsisType | None = ...
    ) -> list[dict[str, Any]]:
        """Ranks documents or strings and returns positions and scores, in the form of `CohereRerank.rerank`.

        Args:
            documents: The documents or strings to rank.
            query: The question.
            top_n: How many to return; None for all. By default the field `top_n`.

        Returns:
            `{"index": position in documents, "relevance_score": score}` for each, best first.

        Raises:
            ValueError: `top_n` is negative, the query is not a string, or something is neither document nor string.

        Examples:
            >>> reranker.rerank(["hi", "Pandas eat bamboo."], "what do pandas eat?", top_n=1)  # doctest: +SKIP
            [{'index': 1, 'relevance_score': 3.1}]
        """
        return _results(self._rank(query, _texts(_listed(documents), Document, str), self._top_n_or(top_n)))

    async def arerank(
        self, documents: Sequence[Document | str], query: str, *, top_n: int | EllipsisType | None = ...
    ) -> list[dict[str, Any]]:
        """`rerank` without blocking the event loop.

        Args:
            documents: The documents or strings to rank.
            query: The question.
            top_n: How many to return; None for all. By default the field `top_n`.

        Returns:
            `{"index": position in documents, "relevance_score": score}` for each, best first.

        Raises:
            ValueError: `top_n` is negative, the query is not a string, or something is neither document nor string.
        """
        return _results(await self._arank(query, _texts(_listed(documents), Document, str), self._top_n_or(top_n)))

    def _top_n_or(self, top_n: int | EllipsisType | None) -> int | None:
        return self.top_n if isinstance(top_n, EllipsisType) else top_n

    @contextmanager
    def _traced(self, documents: list[Document], query: str, callbacks: Callbacks) -> Iterator[list[Document]]:
        """A run, whatever happens in it; the list given is to be filled with what is returned."""
        manager = CallbackManager.configure(inheritable_callbacks=_ambient(callbacks))
        run = manager.on_chain_start(None, _inputs(documents, query), name=type(self).__name__)
        compressed: list[Document] = []
        try:
            yield compressed
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end({"documents": compressed})

    def _compressed(self, documents: list[Document], query: str) -> list[Document]:
        return self._copies(documents, self._rank(query, _texts(documents, Document), self.top_n))

    async def _acompressed(self, documents: list[Document], query: str) -> list[Document]:
        return self._copies(documents, await self._arank(query, _texts(documents, Document), self.top_n))

    def _copies(self, documents: Sequence[Document], ranked: Sequence[RankedPassage]) -> list[Document]:
        # A copy, not a new Document, which would lose the id and the class.
        return [
            documents[index].model_copy(
                update={"metadata": {**_copy_of(documents[index].metadata), self.relevance_score_key: score}}
            )
            for index, score in ranked
        ]


class BGECrossEncoder(ScorerSettings, BaseCrossEncoder):
    """A BGE reranker as a LangChain cross-encoder, for `CrossEncoderReranker` and whatever else takes one.

    All options of `RerankSettings` are fields of this class.

    Args:
        model: Hub id or local directory of a BGE reranker.
        scorer: Object with `score(query, passages)` to use in place of `model`.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.

    Examples:
        >>> from langchain_classic.retrievers.document_compressors import CrossEncoderReranker  # doctest: +SKIP
        >>> reranker = CrossEncoderReranker(
        ...     model=BGECrossEncoder(model="BAAI/bge-reranker-v2-m3"), top_n=3
        ... )  # doctest: +SKIP
    """

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Scores (query, passage) pairs.

        Args:
            text_pairs: The pairs to score.

        Returns:
            One score per pair, in their order, as Python floats.

        Raises:
            ValueError: A pair is not two strings, or the model cannot be loaded.

        Examples:
            >>> BGECrossEncoder(model="BAAI/bge-reranker-v2-m3").score([("what is panda?", "hi")])  # doctest: +SKIP
            [-8.1875]
        """
        requests = requests_of_pairs(text_pairs)
        scorer = self._active_scorer()
        if hasattr(scorer, "score_pairs"):
            pairs = [(query, passage) for query, passages in requests for passage in passages]
            return checked_scores(scorer.score_pairs(pairs), pairs)
        return [score for query, texts in requests for score in checked_scores(scorer.score(query, texts), texts)]


def _ambient(callbacks: Callbacks) -> Callbacks:
    """Callbacks given, or those of the chain around, so that the run nests there in either case."""
    return ensure_config().get("callbacks") if callbacks is None else callbacks


def _inputs(documents: Sequence[Document], query: str) -> dict[str, Any]:
    return {"query": query, "documents": documents}


def _listed(documents: Iterable[Any]) -> list[Any]:
    """The documents as a list, whatever they come in: they are gone through more than once."""
    # A document is iterable, and not meant to be.
    if isinstance(documents, Document) or not in_order(documents):
        raise ValueError(f"documents={documents!r:.80}: expected a list")
    return list(documents)


def _copy_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy that shares no list or dictionary, within such, with a document that a store may still hold, and all else."""
    try:
        return dict(_copied(metadata, {}))
    except RecursionError:  # nested as nobody nests
        return dict(metadata)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """One value of a copy.

    Args:
        value: Metadata, or something in it.
        copies: By `id` of the original, since one may be there twice, or hold itself.
    """
    if type(value) not in (dict, list) or id(value) in copies:
        return copies.get(id(value), value)
    copy: Any = type(value)()
    copies[id(value)] = copy
    if isinstance(value, dict):
        copy.update((name, _copied(each, copies)) for name, each in value.items())
    else:
        copy.extend(_copied(each, copies) for each in value)
    return copy


def _step_input(given: Any) -> tuple[list[Any], str]:
    """What a step of a chain is given.

    Raises:
        ValueError: It has no documents, or no query.
    """
    names = ("documents", "query")
    held = (
        given if isinstance(given, Mapping) else {name: getattr(given, name) for name in names if hasattr(given, name)}
    )
    if any(name not in held for name in names):
        raise ValueError(f'input={given!r:.80}: expected {{"documents": ..., "query": ...}}')
    return _listed(held["documents"]), held["query"]


def _texts(documents: list[Any], *accepted: type) -> list[str]:
    for index, document in enumerate(documents):
        if not isinstance(document, accepted):
            expected = " or a ".join(kind.__name__ for kind in accepted)
            raise ValueError(
                f"documents[{index}]={document!r:.80}: expected a {expected}, got {type(document).__name__}"
            )
    return [document if isinstance(document, str) else document.page_content for document in documents]


def _results(ranked: Sequence[RankedPassage]) -> list[dict[str, Any]]:
    return [{"index": index, "relevance_score": score} for index, score in ranked]

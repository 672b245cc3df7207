"""BGE rerankers as a LlamaIndex node postprocessor.

Takes the text out of nodes, asks the scorer, returns new `NodeWithScore` objects. Knows nothing of torch or of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, field_validator, model_validator

from .adapter import AdapterSettings
from .overriding import overrides
from .texts import by_place

try:
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise ImportError(
        f'the LlamaIndex adapter needs llama-index-core ({error}): pip install "bge-rerank-plugins[llama-index]"'
    ) from error

if TYPE_CHECKING:
    from .ranking import RankedPassage

__all__ = ["BGERerank"]

RETRIEVAL_SCORE = "retrieval_score"

dispatcher = get_dispatcher(__name__)


class BGERerank(AdapterSettings, BaseNodePostprocessor):
    """Reranks nodes with a BGE reranker, best first, inside any LlamaIndex query engine.

    All options of `RerankSettings` are fields of this class. The model is loaded at first use, once per process for all
    adapters with equal settings; safe to call from any number of threads and tasks. The nodes that come in are never
    modified. A node without text (an image, say) is scored as an empty passage, or as its metadata where `metadata_mode`
    includes some.

    Args:
        model: Hub id or local directory of a BGE reranker.
        scorer: Object with `score(query, passages)` to use in place of `model`; not serialised.
        top_n: How many nodes to return; None for all.
        score_threshold: Leave out nodes that score less; applied before `top_n`.
        keep_retrieval_score: Put the score that a node came with into its metadata, as "retrieval_score". That key is hidden
            from the embedding model and the LLM. Metadata are part of LlamaIndex's `hash` of a text node, which so changes.
        metadata_mode: Which metadata are scored along with a node's text.
        callback_manager: Where events are reported.

    Raises:
        pydantic.ValidationError: A `ValueError` that names the option, the value and what is allowed.

    Examples:
        >>> reranker = BGERerank(model="BAAI/bge-reranker-v2-m3", top_n=2)  # doctest: +SKIP
        >>> engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[reranker])  # doctest: +SKIP
        >>> engine.query("what is panda?").source_nodes[0].score  # doctest: +SKIP
        5.26171875
    """

    top_n: int | None = Field(default=2, description="How many nodes to return; None for all.")
    keep_retrieval_score: bool = Field(
        default=False, description="Put the score that a node came with into its metadata, as 'retrieval_score'."
    )
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED, description="Which metadata are scored along with a node's text."
    )

    @field_validator("callback_manager", mode="before")
    @classmethod
    def _callback_manager_or_default(cls, callback_manager: CallbackManager | None) -> CallbackManager:
        return CallbackManager() if callback_manager is None else callback_manager

    @classmethod
    def class_name(cls) -> str:
        """Name of this class in serialised form."""
        return "BGERerank"

    @model_validator(mode="before")
    @classmethod
    def _without_class_name(cls, given: Any) -> Any:
        """LlamaIndex writes the name of the class among the fields, and reads them back without it in `from_dict` alone."""
        if isinstance(given, dict):
            return {name: value for name, value in given.items() if name != "class_name"}
        return given

    # Not LlamaIndex's own, which removes what cannot be pickled from the living object, the scorer along with it, and calls
    # a subclass' `__init__` with fields.
    def __getstate__(self) -> dict[str, Any]:
        """Settings travel; the loaded model and the callback manager stay where they are."""
        state = BaseModel.__getstate__(self)
        fields = {name: value for name, value in state["__dict__"].items() if name != "callback_manager"}
        return {**state, "__dict__": fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        BaseModel.__setstate__(
            self, {**state, "__dict__": {**state["__dict__"], "callback_manager": CallbackManager()}}
        )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """As in LlamaIndex's own, a subclass that overrides the blocking method alone means the async one, too."""
        super().__pydantic_init_subclass__(**options)
        if overrides(cls, "_postprocess_nodes", BGERerank) and not overrides(cls, "_apostprocess_nodes", BGERerank):
            cls._apostprocess_nodes = BaseNodePostprocessor._apostprocess_nodes  # type: ignore[method-assign]

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes, bundle = _given(nodes, query_bundle)
        with self._reported(nodes, bundle) as returned:
            returned += self._copies(nodes, self._rank(_query(bundle), self._texts(nodes), self.top_n))
        return returned

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes, bundle = _given(nodes, query_bundle)
        with self._reported(nodes, bundle) as returned:
            returned += self._copies(nodes, await self._arank(_query(bundle), self._texts(nodes), self.top_n))
        return returned

    @dispatcher.span
    def postprocess_nodes_batch(
        self, requests: Sequence[tuple[list[NodeWithScore], QueryBundle | str]]
    ) -> list[list[NodeWithScore]]:
        """Reranks for several queries at once; their nodes share the device's work, which is faster than one by one.

        Args:
            requests: (nodes, query) of each.

        Returns:
            For each request what `postprocess_nodes` returns.

        Raises:
            ValueError: As `postprocess_nodes`, naming the request by its place.
        """
        bundles = by_place(requests, "(nodes, query)", _given)
        if overrides(type(self), "_postprocess_nodes", BGERerank):
            return by_place(bundles, "", lambda nodes, bundle: self.postprocess_nodes(nodes, bundle))
        texts = by_place(bundles, "", lambda nodes, bundle: (_query(bundle), self._texts(nodes)))
        with ExitStack() as reports:
            returned = []
            for nodes, bundle in bundles:
                # Each in a context of its own: LlamaIndex nests an event in the one that the context has open.
                context, reported = copy_context(), self._reported(nodes, bundle)
                returned.append(context.run(reported.__enter__))
                reports.push(partial(context.run, reported.__exit__))  # type: ignore[call-arg]  # the stack gives them
            for (nodes, _), into, ranked in zip(bundles, returned, self._rank_batch(texts), strict=True):
                into += self._copies(nodes, ranked)
        return returned

    @contextmanager
    def _reported(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> Iterator[list[NodeWithScore]]:
        """Reports start and end, whatever happens between them; the list given is to be filled with what is returned."""
        top_n = len(nodes) if self.top_n is None else self.top_n
        returned: list[NodeWithScore] = []
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=top_n, model_name=self.model_name))
        try:
            with self.callback_manager.event(
                CBEventType.RERANKING,
                payload={
                    EventPayload.NODES: nodes,
                    EventPayload.MODEL_NAME: self.model_name,
                    EventPayload.QUERY_STR: query_bundle.query_str if query_bundle is not None else None,
                    EventPayload.TOP_K: top_n,
                },
            ) as event:
                yield returned
                event.on_end(payload={EventPayload.NODES: returned})
        finally:
            dispatcher.event(ReRankEndEvent(nodes=returned))

    def _texts(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        return [_scored_node(node.node).get_content(metadata_mode=self.metadata_mode) or "" for node in nodes]

    def _copies(self, nodes: Sequence[NodeWithScore], ranked: Sequence[RankedPassage]) -> list[NodeWithScore]:
        return [
            (_with_retrieval_score(nodes[index]) if self.keep_retrieval_score else nodes[index]).model_copy(
                update={"score": score}
            )
            for index, score in ranked
        ]


def _given(
    nodes: Iterable[NodeWithScore], query_bundle: QueryBundle | str | None
) -> tuple[list[NodeWithScore], QueryBundle | None]:
    """The nodes as a list, whatever they come in, and the query in LlamaIndex's form."""
    if isinstance(nodes, (str, BaseModel)) or not isinstance(nodes, Iterable):
        raise ValueError(f"nodes={nodes!r:.80}: expected a list")
    listed = list(nodes)
    for index, node in enumerate(listed):
        if not isinstance(node, NodeWithScore):
            raise ValueError(f"nodes[{index}]={node!r:.80}: expected a NodeWithScore, got {type(node).__name__}")
    if query_bundle is not None and not isinstance(query_bundle, (str, QueryBundle)):
        raise ValueError(f"query_bundle={query_bundle!r:.80}: expected a QueryBundle or a string")
    return listed, QueryBundle(query_bundle) if isinstance(query_bundle, str) else query_bundle


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise ValueError("query_bundle=None: reranking needs a query; give query_bundle or query_str")
    return query_bundle.query_str


def _scored_node(node: BaseNode) -> BaseNode:
    """The node without a score that `keep_retrieval_score` once put there, which `MetadataMode.ALL` would show."""
    if RETRIEVAL_SCORE not in node.metadata or RETRIEVAL_SCORE not in node.excluded_embed_metadata_keys:
        return node
    metadata = {key: value for key, value in node.metadata.items() if key != RETRIEVAL_SCORE}
    return node.model_copy(update={"metadata": metadata})


def _with_retrieval_score(node: NodeWithScore) -> NodeWithScore:
    """The same on a copied node, so that neither the caller's node nor the texts made of this one change."""
    inner = node.node
    score = None if node.score is None else float(node.score)  # others leave numpy's numbers there, which JSON has not
    update: dict[str, Any] = {"metadata": {**inner.metadata, RETRIEVAL_SCORE: score}}
    for field in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys"):
        keys = getattr(inner, field)
        update[field] = keys if RETRIEVAL_SCORE in keys else [*keys, RETRIEVAL_SCORE]
    return node.model_copy(update={"node": inner.model_copy(update=update)})

"""Which layer of a layerwise model to use: agreement with the top layer, and time, at every cutoff.

Knows nothing of files or of how layers are computed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .pictures import legend_above, new_figure, save_picture
from .ranking import rank_scores
from .scorer import Scorer

TOP = 10
TIMED_REQUESTS = 3
"""Requests that are timed at every cutoff; all of them are ranked."""


@dataclass(frozen=True)
class LayerReport:
    """A cutoff layer beside the top one.

    Attributes:
        layer: The cutoff layer.
        tau: Kendall's tau-b between its ranking and the top layer's, mean over the queries; NaN if it orders nothing.
        overlap: Share of the top layer's best ten that are among its best ten, mean over the queries.
        milliseconds: Time per pair.
    """

    layer: int
    tau: float
    overlap: float
    milliseconds: float


def compare_layers(scorer: Scorer, requests: Sequence[tuple[str, Sequence[str]]], layers: range) -> list[LayerReport]:
    """Ranks every request at every layer in one pass, then times some of them at each layer alone.

    Args:
        scorer: A scorer of a layerwise model.
        requests: Queries, each with its passages; those with fewer than two passages have no order and are left out.
        layers: The layers that the model scores at.

    Returns:
        One report per layer, in their order.

    Raises:
        ValueError: No request with two passages; not a layerwise model.
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise ImportError('comparing layers needs scipy: pip install "bge-rerank-plugins[plot]"') from error

    ranked = [(query, passages) for query, passages in requests if len(passages) > 1]
    if not ranked:
        raise ValueError("no query has two passages or more, so there is no order to compare")
    scores = [scorer.score_layers(query, passages, layers) for query, passages in ranked]
    top = layers[-1]

    def tau(layer: int) -> float:
        values = [float(kendalltau(each[layer], each[top]).statistic) for each in scores]
        return statistics.fmean([value for value in values if not math.isnan(value)] or [math.nan])

    return [
        LayerReport(
            layer=layer,
            tau=tau(layer),
            overlap=statistics.fmean(_overlap(each[layer], each[top]) for each in scores),
            milliseconds=_milliseconds(scorer, ranked[:TIMED_REQUESTS], layer),
        )
        for layer in layers
    ]


def plot_layers(reports: Sequence[LayerReport], path: str) -> None:
    """Draws agreement and time over the layers into a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("plot")
    layers = [report.layer for report in reports]
    agreement = figure.subplots()
    agreement.plot(layers, [report.tau for report in reports], "o-", color="tab:blue", label="Kendall tau")
    agreement.plot(layers, [report.overlap for report in reports], "s-", color="tab:green", label=f"top-{TOP} overlap")
    agreement.set(xlabel="cutoff layer", ylabel="agreement with the top layer", ylim=(None, 1.02))
    agreement.grid(alpha=0.3)
    cost = agreement.twinx()
    cost.plot(layers, [report.milliseconds for report in reports], "--", color="tab:red", label="time per pair")
    cost.set(ylabel="milliseconds per pair", ylim=(0, None))
    legend_above(figure, [agreement, cost])
    save_picture(figure, path)


def _overlap(scores: list[float], top_scores: list[float]) -> float:
    best, top_best = ({passage.index for passage in rank_scores(each, TOP)} for each in (scores, top_scores))
    return len(best & top_best) / len(top_best)


def _milliseconds(scorer: Scorer, requests: Sequence[tuple[str, Sequence[str]]], layer: int) -> float:
    start = time.perf_counter()
    for query, passages in requests:
        scorer.score_layers(query, passages, [layer])
    return 1000 * (time.perf_counter() - start) / sum(len(passages) for _, passages in requests)

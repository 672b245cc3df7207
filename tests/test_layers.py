"""Choosing a layer: agreement with the top one, and time."""

from pathlib import Path

import pytest
from conftest import DATA

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.layers import LayerReport, compare_layers, plot_layers
from bge_rerank_plugins.ranking import rank_scores

REQUESTS = [
    ("what is panda?", [f"panda number {i} of Sichuan {'bear ' * (i % 4)}" for i in range(15)]),
    ("how do I parse a date", ["datetime.strptime", "a bear", "", "strings"]),
    ("one passage has no order", ["alone"]),
]
LAYERS = range(3, 12)


@pytest.fixture(scope="module")
def reports() -> list[LayerReport]:
    with Scorer(str(DATA / "layerwise")) as scorer:
        return compare_layers(scorer, REQUESTS, LAYERS)


def test_every_layer_is_reported_and_the_top_one_agrees_with_itself(reports: list[LayerReport]) -> None:
    assert [report.layer for report in reports] == list(LAYERS)
    assert (reports[-1].tau, reports[-1].overlap) == (1.0, 1.0)
    assert all(report.milliseconds > 0 for report in reports)
    assert all(-1 <= report.tau <= 1 and 0 <= report.overlap <= 1 for report in reports)
    assert min(report.tau for report in reports) < 0.9  # random layers disagree


def test_agreement_is_kendalls_tau_and_the_overlap_of_the_best_ten(reports: list[LayerReport]) -> None:
    from scipy.stats import kendalltau

    with Scorer(str(DATA / "layerwise")) as scorer:
        ranked = [request for request in REQUESTS if len(request[1]) > 1]
        scores = [scorer.score_layers(query, passages, [5, 11]) for query, passages in ranked]
    taus = [kendalltau(each[5], each[11]).statistic for each in scores]
    assert reports[2].tau == pytest.approx(sum(taus) / len(taus))
    overlaps = []
    for each in scores:
        best, top = ({p.index for p in rank_scores(each[layer], 10)} for layer in (5, 11))
        overlaps.append(len(best & top) / len(top))
    assert reports[2].overlap == pytest.approx(sum(overlaps) / len(overlaps))


def test_requests_without_an_order_are_an_error() -> None:
    with Scorer(str(DATA / "layerwise")) as scorer, pytest.raises(ValueError, match="no order to compare"):
        compare_layers(scorer, [("a", ["b"])], LAYERS)


def test_a_model_without_layers_is_an_error(encoder_dir: str) -> None:
    with Scorer(encoder_dir) as scorer, pytest.raises(ValueError, match="no layerwise checkpoint"):
        compare_layers(scorer, REQUESTS, LAYERS)


def test_the_plot_is_a_picture(reports: list[LayerReport], tmp_path: Path) -> None:
    plot_layers(reports, str(tmp_path / "layers.png"))
    plot_layers(reports, str(tmp_path / "layers"))
    plot_layers(reports, str(tmp_path / "layers.SVG"))
    assert b"<svg" in (tmp_path / "layers.SVG").read_bytes()
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "layers").read_bytes().startswith(b"\x89PNG"), "a file has the name that was given"

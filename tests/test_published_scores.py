"""The scores on the model cards: computed from real weights where they can be had, and the machinery of the check anywhere."""

from typing import Any

import pytest
from conftest import DATA, ORACLE

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.published import PUBLISHED, TOLERANCE, PublishedScore, published_scores, verify
from bge_rerank_plugins.ranking import sigmoid


@pytest.mark.network
@pytest.mark.parametrize("model", PUBLISHED)
def test_real_weights_give_the_published_scores(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with Scorer(model) as scorer:
        checks = verify(scorer, PUBLISHED[model])
    assert [check for check in checks if not check.holds] == []


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_table_is_in_itself_right(model: str) -> None:
    """A card prints each score raw and through the sigmoid; a slip of the pen in one shows in the other."""
    for case in PUBLISHED[model]:
        assert sigmoid(case.score) == pytest.approx(case.normalized, rel=1e-9)


def oracle_as_published(family: str, change: float = 0.0) -> list[PublishedScore]:
    case: Any = next(c for c in ORACLE["cases"] if c["family"] == family and c["max_length"] >= 512)
    scores = case["scores"]["11"] if family == "layerwise" else case["scores"]
    return [
        PublishedScore(query, passage, score + change, sigmoid(score + change))
        for (query, passage), score in zip(ORACLE["pairs"], scores, strict=True)
    ]


@pytest.mark.parametrize("family", ["encoder", "decoder", "layerwise"])
def test_the_check_holds_for_the_right_model_of_every_family(family: str) -> None:
    with Scorer(str(DATA / family)) as scorer:
        assert all(check.holds for check in verify(scorer, oracle_as_published(family)))


def test_the_check_fails_for_scores_that_are_off(encoder_dir: str) -> None:
    with Scorer(encoder_dir) as scorer:
        assert not any(check.holds for check in verify(scorer, oracle_as_published("encoder", 2 * TOLERANCE)))


def test_a_model_without_published_scores_names_those_that_have_some() -> None:
    with pytest.raises(ValueError, match=r"'BAAI/bge-reranker-base': no published scores .* BAAI/bge-reranker-v2-m3"):
        published_scores("BAAI/bge-reranker-base")

"""Every case of the oracle: token ids and scores of the published classes, computed one pair at a time."""

from typing import Any

import pytest
import torch
from conftest import DATA, oracle_cases

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.families import Family, family_of
from bge_rerank_plugins.settings import RerankSettings


def family_for(case: dict[str, Any]) -> Family:
    settings = RerankSettings(model=str(DATA / case["family"]), max_length=case["max_length"])
    checkpoint = Checkpoint.from_settings(settings)
    return family_of(checkpoint).load(checkpoint, settings, torch.device("cpu"), torch.float32)


FAMILIES = ("encoder", "decoder", "layerwise")


@pytest.mark.parametrize("case", [case for family in FAMILIES for case in oracle_cases(family)])
def test_token_ids_are_those_of_the_model_card(case: dict[str, Any], oracle_pairs: list[tuple[str, str]]) -> None:
    family = family_for(case)
    assert [family.encode(query, [passage])[0].input_ids for query, passage in oracle_pairs] == case["ids"]


@pytest.mark.parametrize("budget", [1, 300, 100_000])
@pytest.mark.parametrize("case", [*oracle_cases("encoder"), *oracle_cases("decoder")])
def test_scores_are_those_of_the_model_card(
    case: dict[str, Any], budget: int, oracle_pairs: list[tuple[str, str]]
) -> None:
    with Scorer(str(DATA / case["family"]), max_length=case["max_length"], max_batch_tokens=budget) as scorer:
        assert scorer.score_pairs(oracle_pairs) == pytest.approx(case["scores"], abs=1e-4)


@pytest.mark.parametrize("budget", [1, 300, 100_000])
@pytest.mark.parametrize("case", oracle_cases("layerwise"))
def test_layerwise_scores_are_those_of_the_model_card_at_every_cutoff(
    case: dict[str, Any], budget: int, oracle_pairs: list[tuple[str, str]]
) -> None:
    options: dict[str, Any] = {"max_length": case["max_length"], "max_batch_tokens": budget}
    cutoffs = [int(layer) for layer in case["scores"]]
    with Scorer(str(DATA / "layerwise"), **options) as scorer:
        together = [scorer.score_layers(query, [passage], cutoffs) for query, passage in oracle_pairs]
    for layer in cutoffs:
        expected = pytest.approx(case["scores"][str(layer)], abs=1e-4)
        assert [scores[layer][0] for scores in together] == expected
        with Scorer(str(DATA / "layerwise"), cutoff_layer=layer, **options) as scorer:
            assert scorer.score_pairs(oracle_pairs) == expected

"""Token ids of the LLM families, against the model cards' `get_inputs`."""

from typing import Any

import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from reference import PROMPT, PromptReference
from strategies import texts

from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.prompt import Prompt
from bge_rerank_plugins.settings import RerankSettings

FAMILIES = ["decoder", "layerwise"]


def prompt_for(family: str, positions: int = 8192, **options: Any) -> Prompt:
    settings = RerankSettings(model=str(DATA / family), **options)
    return Prompt(Checkpoint.from_settings(settings), settings, positions)


@pytest.mark.parametrize("max_length", [5, 6, 7, 9, 16, 64, 1024])
@pytest.mark.parametrize("family", FAMILIES)
@given(query=texts, passages=st.lists(texts, min_size=1, max_size=4))
def test_ids_are_those_of_the_model_card(family: str, max_length: int, query: str, passages: list[str]) -> None:
    prompt, reference = PROMPTS[family, max_length], REFERENCES[family, max_length]
    sequences = prompt.encode(query, passages)
    assert [s.input_ids for s in sequences] == [reference.ids(query, passage) for passage in passages]


LENGTHS = [5, 6, 7, 9, 16, 64, 1024]
PROMPTS = {(family, length): prompt_for(family, max_length=length) for family in FAMILIES for length in LENGTHS}
REFERENCES = {
    (family, length): PromptReference(str(DATA / family), length) for family in FAMILIES for length in LENGTHS
}


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 40])
def test_truncation_at_every_edge(length: int) -> None:
    """Query and passage just below, at and above each of their limits."""
    for max_length in (5, 8, 9, 12):
        prompt, reference = (
            prompt_for("decoder", max_length=max_length),
            PromptReference(str(DATA / "decoder"), max_length),
        )
        for query, passage in [("x " * length, "y"), ("x", "y " * length), ("x " * length, "y " * length)]:
            (sequence,) = prompt.encode(query, [passage])
            assert sequence.input_ids == reference.ids(query, passage)
            assert len(sequence) <= max_length + prompt.extra_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_passage_that_fits_to_the_last_token_is_not_said_to_be_cut(family: str) -> None:
    passages = ["a " * count for count in range(25)]
    whole, cut = (prompt_for(family, max_length=length, query_max_length=6) for length in (1024, 24))
    lengths = [len(sequence) - cut.extra_tokens for sequence in whole.encode("panda", passages)]
    assert {23, 24, 25} <= set(lengths)
    assert [sequence.truncated for sequence in cut.encode("panda", passages)] == [length > 24 for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_custom_prompt_and_instructions_take_the_place_of_the_cards(family: str) -> None:
    prompt = prompt_for(
        family, max_length=64, prompt="Is B about A?", query_instruction="Frage: ", passage_instruction=""
    )
    reference = PromptReference(str(DATA / family), 64, prompt="Is B about A?", marks=("Frage: ", ""))
    (sequence,) = prompt.encode("what is panda?", ["a bear"])
    assert sequence.input_ids == reference.ids("what is panda?", "a bear")


def test_the_prompt_is_the_one_that_the_models_were_trained_with() -> None:
    from bge_rerank_plugins.core import prompt

    assert prompt.PROMPT == PROMPT


@given(query=texts, passages=st.lists(texts, min_size=1, max_size=4))
def test_all_passages_of_a_request_share_the_whole_query_as_prefix(query: str, passages: list[str]) -> None:
    sequences = PROMPTS["decoder", 16].encode(query, passages)
    first = sequences[0]
    assert first.prefix >= 1
    assert all(s.group == first.group and s.prefix == first.prefix for s in sequences)
    assert all(s.input_ids[: s.prefix] == first.input_ids[: s.prefix] for s in sequences)
    assert all(len(s) > s.prefix for s in sequences)
    (other,) = PROMPTS["decoder", 16].encode(query, ["x"])
    assert other.group != first.group


def test_query_max_length_cuts_the_query_alone() -> None:
    (sequence,) = prompt_for("decoder", max_length=64, query_max_length=6).encode("panda " * 50, ["hi"])
    reference = PromptReference(str(DATA / "decoder"), 64)
    head = [reference.tokenizer.bos_token_id, *reference.tokens("A: " + "panda " * 50)[:6]]
    assert sequence.input_ids[:8] == [*head, *reference.tokens("\n")[:1]]


def test_a_query_longer_than_the_whole_pair_is_refused_also_where_the_checkpoint_gives_the_length() -> None:
    assert prompt_for("decoder", query_max_length=1024).max_length == 1024
    with pytest.raises(ValueError, match="query_max_length=1025: longer than the whole pair, max_length=1024"):
        prompt_for("decoder", query_max_length=1025)


def test_max_length_leaves_room_for_the_prompt_among_the_positions() -> None:
    prompt = prompt_for("decoder", positions=100)
    assert prompt.max_length == 100 - prompt.extra_tokens
    with pytest.raises(ValueError, match=f"max_length=90: .* at most {prompt.max_length}"):
        prompt_for("decoder", positions=100, max_length=90)
    with pytest.raises(ValueError, match="max_length=4: no room"):
        prompt_for("decoder", max_length=4)


def test_a_tokenizer_without_a_first_token_starts_without_one(tmp_path: Any) -> None:
    """Qwen has none; FlagEmbedding then begins with the query."""
    import json
    import shutil

    shutil.copytree(DATA / "decoder", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["bos_token"]
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "special_tokens_map.json").unlink()
    settings = RerankSettings(model=str(tmp_path / "model"))
    (sequence,) = Prompt(Checkpoint.from_settings(settings), settings, 8192).encode("what", ["hi"])
    (with_bos,) = prompt_for("decoder").encode("what", ["hi"])
    assert sequence.input_ids == with_bos.input_ids[1:]

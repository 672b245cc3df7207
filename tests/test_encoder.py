"""The encoder family against plain transformers, for every architecture, on any text, in any company."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import EncoderReference
from safetensors.torch import load_file, save_file
from strategies import texts

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core import linear
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.encoder import Encoder
from bge_rerank_plugins.core.packing import pack_sequences
from bge_rerank_plugins.settings import RerankSettings

ARCHITECTURES = ["xlm-roberta", "roberta", "bert"]


def load(directory: str, precision: torch.dtype = torch.float32, **options: Any) -> Encoder:
    settings = RerankSettings(model=directory, **options)
    return Encoder.load(Checkpoint.from_settings(settings), settings, torch.device("cpu"), precision)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest, classifier_dirs: dict[str, str]) -> tuple[Encoder, EncoderReference]:
    directory = classifier_dirs[request.param]
    return load(directory, max_length=40), EncoderReference(directory, max_length=40)


@given(query=texts, passages=st.lists(texts, min_size=1, max_size=5))
def test_token_ids_and_scores_are_those_of_transformers(
    both: tuple[Encoder, EncoderReference], query: str, passages: list[str]
) -> None:
    encoder, reference = both
    sequences = encoder.encode(query, passages)
    assert [s.input_ids for s in sequences] == [reference.ids(query, passage)[0] for passage in passages]
    with torch.inference_mode():
        scores = encoder.forward(pack_sequences(sequences)).tolist()
    # "<pad>" spelled out in a text is the padding id; the reference then counts positions as the published class does.
    assert scores == pytest.approx([reference.score(query, passage) for passage in passages], abs=1e-4)


@given(data=st.data())
def test_scores_do_not_depend_on_what_shares_the_pack(
    both: tuple[Encoder, EncoderReference], data: st.DataObject
) -> None:
    encoder, _ = both
    sequences = encoder.encode("what is panda", data.draw(st.lists(texts, min_size=2, max_size=6)))
    order = data.draw(st.permutations(range(len(sequences))))
    with torch.inference_mode():
        alone = [encoder.forward(pack_sequences([s])).item() for s in sequences]
        together = encoder.forward(pack_sequences([sequences[i] for i in order])).tolist()
    assert together == pytest.approx([alone[i] for i in order], abs=1e-5)


@pytest.mark.parametrize("implementation", ["_attend_padded", "_attend_segments"])
def test_scores_do_not_depend_on_the_attention_of_the_device(
    implementation: str, both: tuple[Encoder, EncoderReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bge_rerank_plugins.core import attention

    encoder, reference = both
    monkeypatch.setattr(attention, "attention_for", lambda *_: getattr(attention, implementation))
    passages = ["", "a bear", "the giant panda " * 20]
    with torch.inference_mode():
        scores = encoder.forward(pack_sequences(encoder.encode("panda", passages))).tolist()
    assert scores == pytest.approx([reference.score("panda", passage) for passage in passages], abs=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_the_last_layer_without_keys_and_values_is_the_same_function(
    dtype: torch.dtype, tolerance: float, classifier_dirs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bge_rerank_plugins.core import encoder as module

    for path in classifier_dirs.values():
        encoder = load(path, dtype)
        pack = pack_sequences(encoder.encode("panda", ["", "a bear", "the giant panda " * 20]))
        keys: list[int] = []
        last_layer: Any = encoder._last_layer
        last_layer.attention.self.key.register_forward_hook(lambda *_, keys=keys: keys.append(1))
        scores = []
        for by_sequence in (True, False):
            monkeypatch.setattr(module, "by_sequence", lambda hidden, chosen=by_sequence: chosen)
            with torch.inference_mode():
                scores.append(encoder.forward(pack))
            assert bool(keys) != by_sequence, "computed in the other way"
        torch.testing.assert_close(*scores, rtol=0, atol=tolerance)


def test_first_rows_come_in_few_sizes_where_every_size_has_a_program_of_its_own(
    encoder_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(encoder_dir)
    packs = [pack_sequences(family.encode("what is panda?", [f"passage {i}" for i in range(n)])) for n in range(1, 20)]
    with torch.inference_mode():
        expected = [family.forward(pack) for pack in packs]
        monkeypatch.setattr(linear, "pays", lambda _: True)
        seen: list[int] = []
        last_layer: Any = family._last_layer
        last_layer.intermediate.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        found = [family.forward(pack) for pack in packs]
    for scores, others in zip(expected, found, strict=True):
        torch.testing.assert_close(others, scores, rtol=1e-5, atol=1e-5)
    assert set(seen) == {8, 16, 24}


def test_weights_are_wide_enough_for_order_to_mean_something(both: tuple[Encoder, EncoderReference]) -> None:
    encoder, _ = both
    passages = ["a bear", "datetime", "Sichuan", "what is a string", "熊猫"]
    with torch.inference_mode():
        scores = encoder.forward(pack_sequences(encoder.encode("panda", passages)))
    assert scores.std() > 0.05


@pytest.mark.parametrize("max_length", [5, 6, 7, 12, 40, 128])
def test_a_long_query_leaves_room_and_the_passage_is_cut_to_what_is_left(
    classifier_dirs: dict[str, str], max_length: int
) -> None:
    encoder = load(classifier_dirs["xlm-roberta"], max_length=max_length)
    long, short = "panda " * 500, "hi"
    for query, passage in [(long, long), (long, short), (short, long), (short, short)]:
        (sequence,) = encoder.encode(query, [passage])
        assert len(sequence) <= max_length
        assert sequence.input_ids[0] == 0
        assert sequence.input_ids[-1] == 2
        assert sequence.input_ids.count(2) == 3  # the template is never cut
    (sequence,) = encoder.encode(long, [long])
    assert len(sequence) == max_length
    assert sequence.input_ids.index(2) - 1 == min(max_length * 3 // 4, max_length - 4)


def test_a_passage_that_fits_to_the_last_token_is_not_said_to_be_cut(encoder_dir: str) -> None:
    passages = ["a " * count for count in range(25)]
    whole, cut = (load(encoder_dir, max_length=length, query_max_length=6) for length in (512, 24))
    lengths = [len(sequence) for sequence in whole.encode("panda", passages)]
    assert {23, 24, 25} <= set(lengths)
    assert [sequence.truncated for sequence in cut.encode("panda", passages)] == [length > 24 for length in lengths]


def test_what_fills_a_pack_up_may_be_longer_than_the_longest_pair(both: tuple[Encoder, EncoderReference]) -> None:
    """As in a large pack for a model of few positions."""
    encoder, reference = both
    pack = pack_sequences(encoder.encode("panda", ["a bear"]), rows_for=lambda rows: rows + 200)
    with torch.inference_mode():
        assert encoder.forward(pack).tolist()[:1] == pytest.approx([reference.score("panda", "a bear")], abs=1e-4)


def test_query_max_length_is_respected(encoder_dir: str) -> None:
    (sequence,) = load(encoder_dir, max_length=64, query_max_length=3).encode("panda " * 100, ["hi"])
    assert sequence.input_ids.index(2) - 1 == 3


def test_a_query_longer_than_the_whole_pair_is_refused_also_where_the_checkpoint_gives_the_length(
    encoder_dir: str,
) -> None:
    assert load(encoder_dir, query_max_length=512).max_length == 512
    with pytest.raises(ValueError, match="query_max_length=513: longer than the whole pair, max_length=512"):
        load(encoder_dir, query_max_length=513)


def test_instructions_stand_before_the_texts(encoder_dir: str) -> None:
    plain, instructed = load(encoder_dir), load(encoder_dir, query_instruction="Find: ", passage_instruction="Text: ")
    assert instructed.encode("panda", ["hi"]) == plain.encode("Find: panda", ["Text: hi"])


def test_max_length_is_what_the_positions_allow(encoder_dir: str, classifier_dirs: dict[str, str]) -> None:
    assert load(encoder_dir).max_length == 512  # 514 positions, of which XLM-R leaves 512
    assert load(classifier_dirs["bert"]).max_length == 128
    with pytest.raises(ValueError, match=r"max_length=513: .* at most 512"):
        load(encoder_dir, max_length=513)
    with pytest.raises(ValueError, match="max_length=4: no room"):
        load(encoder_dir, max_length=4)


@pytest.mark.parametrize(("option", "value"), [("prompt", "Is it?"), ("cutoff_layer", 3)])
def test_options_of_other_families_are_refused(encoder_dir: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}={re.escape(repr(value))}: .* cross-encoder"):
        Scorer(encoder_dir, **{option: value}).score("a", ["b"])  # type: ignore[arg-type]


@pytest.fixture
def copied(encoder_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_dir, tmp_path / "model"))


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_a_missing_head_is_an_error_never_a_random_score(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.out_proj")}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks classifier.out_proj.bias, classifier.out_proj.weight; .* random"):
        Scorer(str(copied)).score("a", ["b"])


def test_any_missing_weight_is_an_error(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["roberta.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks roberta.encoder.layer.1.attention.self.query.weight"):
        Scorer(str(copied)).score("a", ["b"])


def test_several_labels_are_an_error(copied: Path) -> None:
    change_config(copied, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="2 labels"):
        Scorer(str(copied)).score("a", ["b"])


def test_relative_positions_are_refused(copied: Path) -> None:
    change_config(copied, position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        Scorer(str(copied)).score("a", ["b"])


def test_truncation_and_padding_left_in_the_tokenizer_file_are_switched_off(copied: Path) -> None:
    """Published tokenizer files often carry the settings of their training run; they cut texts silently."""
    before = load(str(copied)).encode("a query", ["panda " * 50])
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load(str(copied)).encode("a query", ["panda " * 50]) == before


def test_a_lora_adapter_is_merged(encoder_dir: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(encoder_dir)
    adapted = get_peft_model(
        base, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "value"], init_lora_weights=False)
    )
    for name, parameter in adapted.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path)
    ids = load(encoder_dir).encode("panda", ["hi"])[0].input_ids
    fresh = AutoModelForSequenceClassification.from_pretrained(encoder_dir)
    with torch.inference_mode():
        want = PeftModel.from_pretrained(fresh, tmp_path).eval()(torch.tensor([ids])).logits.item()
    with Scorer(encoder_dir, peft_path=str(tmp_path)) as scorer, Scorer(encoder_dir) as plain:
        assert scorer.score("panda", ["hi"]) == pytest.approx([want], abs=1e-5)
        assert plain.score("panda", ["hi"]) != pytest.approx([want], abs=1e-2)


def test_an_adapter_may_bring_the_head_that_the_base_model_lacks(
    classifier_dirs: dict[str, str], tmp_path: Path
) -> None:
    """An embedding model becomes a reranker with a LoRA adapter; without the adapter it must not score."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    bare = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained(classifier_dirs["bert"]).bert.save_pretrained(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(classifier_dirs["bert"]) / name, bare)
    model = AutoModelForSequenceClassification.from_pretrained(bare, num_labels=1)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query", "dense"]))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = load(classifier_dirs["bert"]).encode("panda", ["hi"])[0]
    with torch.inference_mode():
        inputs = {"input_ids": torch.tensor([ids.input_ids]), "token_type_ids": torch.tensor([ids.token_type_ids])}
        want = adapted.eval()(**inputs).logits.item()
    with Scorer(str(bare), peft_path=str(tmp_path / "adapter")) as scorer:
        assert scorer.score("panda", ["hi"]) == pytest.approx([want], abs=1e-4)
    with pytest.raises(ValueError, match="BertModel, which is not supported"):
        Scorer(str(bare)).score("panda", ["hi"])


def test_bfloat16_keeps_the_ranking_of_the_embedded_model() -> None:
    from scipy.stats import spearmanr

    from bge_rerank_plugins.docstrings import standard_library

    passages = [docstring.text[:400] for docstring in standard_library()[::180]]  # slow where bfloat16 is emulated
    with Scorer("embedded") as exact, Scorer("embedded", dtype="bfloat16") as half:
        for query in ("shorten a text to a width", "read a file line by line", "how do I parse a date"):
            both = exact.score(query, passages), half.score(query, passages)
            assert spearmanr(*both).statistic > 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_is_about_as_near_as_that_of_transformers(name: str, classifier_dirs: dict[str, str]) -> None:
    """BERT's pooler, in float32 with the head, once met bfloat16 states in its backbone and raised."""
    passages = ["a bear", "datetime", "Sichuan", "what is a string", "熊猫"]
    reference = EncoderReference(classifier_dirs[name], 128)
    exact = torch.tensor([reference.score("panda", passage) for passage in passages])
    reference.model = reference.model.to(torch.bfloat16)
    theirs = torch.tensor([reference.score("panda", passage) for passage in passages])
    with Scorer(classifier_dirs[name], dtype="bfloat16") as scorer:
        ours = torch.tensor(scorer.score("panda", passages))
    assert (ours - exact).abs().mean() < 3 * (theirs - exact).abs().mean() + 0.1


def test_bfloat16_keeps_the_ranking(encoder_dir: str) -> None:
    from scipy.stats import spearmanr

    passages = [
        f"Item {i} of the archive describes panda number {i * 7 % 31} in Sichuan." * (1 + i % 5) for i in range(60)
    ]
    with Scorer(encoder_dir) as exact, Scorer(encoder_dir, dtype="bfloat16") as half:
        assert (
            spearmanr(exact.score("panda number 7", passages), half.score("panda number 7", passages)).statistic > 0.97
        )

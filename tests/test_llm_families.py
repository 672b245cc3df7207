"""The decoder and layerwise families against plain code, in any company, with and without shared prefixes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference import DecoderReference, LayerwiseReference
from safetensors.torch import load_file, save_file
from strategies import texts
from torch import nn

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.core import attention, inplace, linear
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.families import Family, family_of
from bge_rerank_plugins.core.packing import pack_sequences
from bge_rerank_plugins.core.prefixes import Prefixes
from bge_rerank_plugins.core.sequences import TokenSequence
from bge_rerank_plugins.settings import RerankSettings

DECODER, LAYERWISE = str(DATA / "decoder"), str(DATA / "layerwise")


def load(directory: str, **options: Any) -> Any:
    settings = RerankSettings(model=directory, **options)
    checkpoint = Checkpoint.from_settings(settings)
    return family_of(checkpoint).load(checkpoint, settings, torch.device("cpu"), torch.float32)


def forward(family: Family, sequences: list[TokenSequence], layers: tuple[int, ...] = ()) -> Any:
    with torch.inference_mode():
        return family.forward(pack_sequences(sequences), layers).tolist()


def unshared(sequences: list[TokenSequence]) -> list[TokenSequence]:
    return [replace(sequence, prefix=0) for sequence in sequences]


requests = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, DecoderReference]:
    return load(DECODER, max_length=48), DecoderReference(DECODER, 48)


@pytest.fixture(scope="module")
def layerwise() -> tuple[Any, LayerwiseReference]:
    return load(LAYERWISE, max_length=48), LayerwiseReference(LAYERWISE, 48)


@hypothesis_settings(max_examples=25)
@given(requests)
def test_decoder_scores_are_the_model_cards(decoder: tuple[Any, DecoderReference], requests: Any) -> None:
    family, reference = decoder
    sequences = [s for query, passages in requests for s in family.encode(query, passages)]
    expected = [reference.score(query, passage) for query, passages in requests for passage in passages]
    assert forward(family, sequences) == pytest.approx(expected, abs=1e-4)


@hypothesis_settings(max_examples=25)
@given(requests)
def test_layerwise_scores_are_those_of_minicpm_written_out(
    layerwise: tuple[Any, LayerwiseReference], requests: Any
) -> None:
    family, reference = layerwise
    layers = (3, 6, 11)
    sequences = [s for query, passages in requests for s in family.encode(query, passages)]
    expected = [reference.scores(query, passage) for query, passages in requests for passage in passages]
    for row, scores in zip(forward(family, sequences, layers), expected, strict=True):
        assert row == pytest.approx([scores[layer] for layer in layers], abs=1e-4)


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
@hypothesis_settings(max_examples=25)
@given(requests=requests, data=st.data())
def test_scores_depend_neither_on_the_pack_nor_on_the_sharing(directory: str, requests: Any, data: Any) -> None:
    family = FAMILIES.setdefault(directory, load(directory, max_length=48))
    sequences = [s for query, passages in requests for s in family.encode(query, passages)]
    alone = [forward(family, unshared([s]))[0] for s in sequences]
    order = data.draw(st.permutations(range(len(sequences))))
    for together in ([sequences[i] for i in order], unshared([sequences[i] for i in order])):
        assert forward(family, together) == pytest.approx([alone[i] for i in order], rel=1e-5, abs=1e-5)


FAMILIES: dict[str, Any] = {}


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_scores_do_not_depend_on_the_attention_of_the_device(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load(directory)
    sequences = family.encode("what is panda?", ["hi", "a bear " * 30, ""]) + family.encode("datetime", ["parse " * 9])
    expected = forward(family, sequences)
    monkeypatch.setattr(attention, "attention_for", lambda *_: attention._attend_padded)
    assert forward(family, sequences) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_the_query_is_computed_once_for_all_passages(directory: str) -> None:
    family = load(directory)
    sequences = family.encode("what is panda " * 20, [f"passage {i}" for i in range(10)])
    shared, apart = len(pack_sequences(sequences)), len(pack_sequences(unshared(sequences)))
    assert shared == apart - 9 * sequences[0].prefix
    assert sequences[0].prefix > 40


def forward_in_packs(family: Family, packs: list[list[TokenSequence]]) -> tuple[list[float], int]:
    """Scores of packs that follow one another as a worker scores them, and how many tokens were computed."""
    kept, scores, tokens = Prefixes(), [], 0
    for i, sequences in enumerate(packs):
        keep = {sequence.group for later in packs[i + 1 : i + 2] for sequence in later}
        with torch.inference_mode():
            pack = pack_sequences(sequences, kept=kept, keep=keep)
            scores += family.forward(pack).tolist()
        kept = pack.carried.after
        tokens += len(pack)
    assert list(kept) == []
    return scores, tokens


@pytest.mark.parametrize("implementation", [attention._attend_segments, attention._attend_padded])
@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_a_query_is_computed_once_for_passages_in_several_packs(
    directory: str, implementation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(directory)
    first = family.encode("what is panda " * 20, [f"passage {i} " * (1 + i) for i in range(10)])
    second = family.encode("datetime", ["parse", "a string", "as a date"])
    expected = forward(family, unshared(first)) + forward(family, unshared(second))
    monkeypatch.setattr(attention, "attention_for", lambda *_: implementation)
    packs = [first[:3], first[3:4], [*first[4:], second[0]], second[1:]]
    scores, tokens = forward_in_packs(family, packs)
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert tokens == len(pack_sequences(first)) + len(pack_sequences(second))


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_prefixes_of_several_requests_are_kept_apart(directory: str) -> None:
    family = load(directory)
    requests = [family.encode(f"query {i} " * (3 + i), ["one", "two", "three"]) for i in range(4)]
    expected = [score for sequences in requests for score in forward(family, unshared(sequences))]
    in_turns, _ = forward_in_packs(family, [[sequences[i] for sequences in requests[::-1]] for i in range(3)])
    scores = [in_turns[4 * i + 3 - request] for request in range(4) for i in range(3)]
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)


def rows_of_blocks(family: Any) -> list[int]:
    """How many rows the feed-forward block of each layer is given, layer by layer from now on."""
    seen: list[int] = []
    for layer in family._backbone.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2]))
    return seen


@pytest.mark.parametrize("cutoff_layers", [(), (7,), (11, 3), (3, 4, 5)])
def test_after_the_attention_of_the_highest_layer_only_last_tokens_are_computed(
    cutoff_layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "pays", lambda _: False)  # else a few more rows, on some processors
    family = load(LAYERWISE)
    sequences = family.encode("what is panda?", ["hi", "a bear of Sichuan", ""])
    tokens = len(pack_sequences(sequences))
    seen = rows_of_blocks(family)
    forward(family, sequences, cutoff_layers)
    assert seen == [tokens] * (max(cutoff_layers, default=11) - 1) + [3]


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_last_rows_come_in_few_sizes_where_every_size_has_a_program_of_its_own(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(directory)
    packs = [family.encode("what is panda?", [f"passage {i}" for i in range(n)]) for n in range(1, 20)]
    expected = [forward(family, pack) for pack in packs]
    monkeypatch.setattr(linear, "pays", lambda _: True)
    seen = rows_of_blocks(family)
    found = [forward(family, pack) for pack in packs]
    assert found == [pytest.approx(scores, abs=1e-5) for scores in expected]
    assert set(seen[len(family._backbone.layers) - 1 :: len(family._backbone.layers)]) == {8, 16, 24}


@pytest.mark.skipif(not linear.can_pack(torch.float32), reason="this torch has no such operators")
@pytest.mark.parametrize("rows", [4, 1024])
@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_products_by_onednn_make_the_same_scores_of_the_same_weights(
    directory: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever library is the faster on this processor."""
    scores = []
    for faster in (False, True):
        monkeypatch.setattr(linear, "onednn_beats_blas", lambda faster=faster: faster)
        monkeypatch.setattr(inplace, "PACKED_ROWS", rows)
        family = load(directory)
        kinds = {type(module) for module in family._backbone.modules()} & {nn.Linear, linear.PackedLinear}
        assert kinds == {linear.PackedLinear if faster else nn.Linear}
        scores.append(forward(family, family.encode("what is panda?", ["hi", "a bear of Sichuan " * 9, ""])))
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_a_pack_that_failed_half_way_leaves_the_layers_as_they_were(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(directory)
    sequences = family.encode("what is panda?", ["hi", "a bear"])
    expected = forward(family, sequences)
    for block in ("self_attn", "mlp"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(family._backbone.layers[-1], block), "forward", lambda *_, **__: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                forward(family, sequences)
        assert forward(family, sequences) == expected
        if directory == LAYERWISE:
            lower = forward(family, sequences, (4, 10))
            assert [row[0] for row in lower] == pytest.approx(
                [row[0] for row in forward(family, sequences, (4,))], abs=1e-6
            )


CAUSAL_MODELS = ["Gemma", "Gemma2", "Llama", "Mistral", "Qwen2", "Qwen3"]


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_every_causal_model_of_the_table_scores_as_transformers_does(
    name: str, causal_dirs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them: grouped keys, sliding windows, soft caps, norms of heads, heads tied to the embeddings and not."""
    monkeypatch.setattr(linear, "pays", lambda _: False)  # else a few more rows, on some processors
    family, reference = load(causal_dirs[name]), DecoderReference(causal_dirs[name], 1024)
    passages = ["hi", "a bear of Sichuan " * 4, ""]
    expected = [reference.score("what is panda?", passage) for passage in passages]
    sequences = family.encode("what is panda?", passages)
    seen = rows_of_blocks(family)
    assert forward(family, sequences) == pytest.approx(expected, abs=1e-4)
    assert seen == [len(pack_sequences(sequences))] * 3 + [len(passages)], "rows that nobody reads"
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_every_causal_model_of_the_table_scores_the_same_in_several_packs(
    name: str, causal_dirs: dict[str, str]
) -> None:
    """The query is kept from one to the next, behind windows too."""
    query, passages = "what is a panda?", ["", *(f"panda number {i} in Sichuan " * (1 + i % 5) for i in range(12))]
    reference = DecoderReference(causal_dirs[name], 96)
    expected = [reference.score(query, passage) for passage in passages]
    assert max(expected) - min(expected) > 0.3
    with Scorer(causal_dirs[name], max_length=96, max_batch_tokens=300) as scorer:
        assert scorer.score(query, passages) == pytest.approx(expected, abs=1e-4)
        assert scorer.stats()["packs"] > 2


def layerwise_variant(directory: Path, head_type: str, head_multi: bool) -> str:
    """The oracle's layerwise checkpoint with other heads, random ones, in the published layout."""
    shutil.copytree(LAYERWISE, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"head_type": head_type, "head_multi": head_multi}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {k: v for k, v in load_file(directory / "model.safetensors").items() if not k.startswith("lm_head")}
    width = 1 if head_type == "simple" else config["vocab_size"]
    layers = range(config["num_hidden_layers"] - config["start_layer"] + 1)
    generator = torch.Generator().manual_seed(0)
    for prefix in [f"lm_head.{i}" for i in layers] if head_multi else ["lm_head"]:
        name = f"{prefix}.weight" if head_type == "raw" else f"{prefix}.linear_head.weight"
        weights[name] = torch.randn(width, config["hidden_size"], generator=generator)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("head_multi", [True, False])
@pytest.mark.parametrize("head_type", ["simple", "complex", "raw"])
def test_every_kind_of_head_scores_by_its_definition(head_type: str, head_multi: bool, tmp_path: Path) -> None:
    directory = layerwise_variant(tmp_path / "model", head_type, head_multi)
    reference = LayerwiseReference(directory, 1024)
    passages = ["hi", "a bear of Sichuan " * 4]
    with Scorer(directory) as scorer:
        scores = scorer.score_layers("what is panda?", passages, [3, 7, 11])
    for i, passage in enumerate(passages):
        expected = reference.scores("what is panda?", passage)
        assert [scores[k][i] for k in (3, 7, 11)] == pytest.approx([expected[k] for k in (3, 7, 11)], abs=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 50.0},
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
)
def test_positions_turn_as_fast_as_the_config_of_a_layerwise_model_says(rope: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(LAYERWISE, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | rope))
    query, passages = "what is panda?", ["hi", "a bear of Sichuan " * 4]
    reference, usual = (LayerwiseReference(str(directory), 1024) for directory in (tmp_path / "model", LAYERWISE))
    expected = [reference.scores(query, passage)[11] for passage in passages]
    assert expected != pytest.approx([usual.scores(query, passage)[11] for passage in passages], abs=1e-2)
    with Scorer(str(tmp_path / "model")) as scorer:
        assert scorer.score(query, passages) == pytest.approx(expected, abs=1e-4)


def without_layers_from(directory: Path, first_missing: int) -> str:
    """A copy of the layerwise checkpoint whose file does not hold the upper layers and their heads."""
    shutil.copytree(LAYERWISE, directory)
    start = json.loads((directory / "config.json").read_text())["start_layer"]

    def kept(name: str) -> bool:
        parts = name.split(".")
        if name.startswith("model.layers."):
            return int(parts[2]) < first_missing
        return not name.startswith("lm_head.") or int(parts[1]) + start <= first_missing

    weights = {k: v for k, v in load_file(directory / "model.safetensors").items() if kept(k)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def test_layers_above_the_cutoff_are_not_read_from_disk(tmp_path: Path) -> None:
    directory = without_layers_from(tmp_path / "model", 5)
    passages = ["hi", "a bear"]
    with Scorer(directory, cutoff_layer=5) as scorer, Scorer(LAYERWISE, cutoff_layer=5) as whole:
        assert scorer.score("panda", passages) == pytest.approx(whole.score("panda", passages), abs=1e-6)
    with pytest.raises(ValueError, match=r"lacks .*layers\.5"):
        Scorer(directory, cutoff_layer=6).score("panda", passages)


@pytest.mark.parametrize("cutoff_layer", [5, 8, 10])
@pytest.mark.parametrize("start_layer", [2, 4])
def test_a_config_that_numbers_heads_otherwise_is_refused_below_the_top_too(
    start_layer: int, cutoff_layer: int, tmp_path: Path
) -> None:
    """Every layer was scored with another layer's head."""
    model = Path(shutil.copytree(LAYERWISE, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"start_layer": start_layer}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"in its files end at layer .*, and the layers at 11"):
        Scorer(str(model), cutoff_layer=cutoff_layer).score("panda", ["hi"])


def test_layers_above_the_cutoff_are_loaded_when_they_are_asked_for() -> None:
    with Scorer(LAYERWISE, cutoff_layer=4) as low, Scorer(LAYERWISE) as high:
        before = low.score("panda", ["hi", "a bear"])
        layers = low.score_layers("panda", ["hi", "a bear"], [11, 4, 3])
        assert list(layers) == [11, 4, 3]
        assert layers[11] == pytest.approx(high.score("panda", ["hi", "a bear"]), abs=1e-6)
        assert layers[4] == pytest.approx(before, abs=1e-6)
        assert low.score("panda", ["hi", "a bear"]) == pytest.approx(before, abs=1e-6)


def test_layers_that_do_not_fit_into_memory_fail_who_asked_for_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a pack that is too large: the checkpoint was read again for every half, and later packs stayed small."""
    from bge_rerank_plugins.core import layerwise

    load, tops = layerwise.load_model, []

    def tight(checkpoint: Any, kind: Any, config: Any, *rest: Any, **options: Any) -> Any:
        tops.append(config.num_hidden_layers)
        if config.num_hidden_layers > 5:
            raise torch.OutOfMemoryError("injected")
        return load(checkpoint, kind, config, *rest, **options)

    monkeypatch.setattr(layerwise, "load_model", tight)
    with Scorer(LAYERWISE, cutoff_layer=5, max_batch_tokens=4001) as scorer:
        before = scorer.score("panda", ["hi", "a bear"])
        with pytest.raises(RuntimeError, match="cutoff_layer=11: out of memory with the layers up to it: injected"):
            scorer.score_layers("panda", ["hi", "a bear"], [11, 4])
        assert tops == [5, 11]
        assert scorer.score("panda", ["hi", "a bear"]) == before
        assert scorer.stats()["out_of_memory"] == 0


def test_of_a_vocabulary_head_one_row_is_kept(causal_dirs: dict[str, str]) -> None:
    """In float32 the row was a view, and held the whole head: two gigabytes of a Qwen2-7B."""
    with Scorer(causal_dirs["Llama"], dtype="float32") as scorer:
        family: Any = scorer._lease.loaded()[1]
        row = family._answer_row
        assert row.untyped_storage().nbytes() == row.nbytes


def test_requests_for_other_layers_share_no_pack_and_mix_up_nothing() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Scorer(LAYERWISE, max_batch_tokens=512) as scorer, ThreadPoolExecutor(8) as threads:
        wanted = [[3], [3, 7], [11], [7, 5, 3]] * 5
        expected = scorer.score_layers("panda", ["hi", "a bear"], range(3, 12))
        results = threads.map(lambda layers: scorer.score_layers("panda", ["hi", "a bear"], layers), wanted)
        for layers, scores in zip(wanted, results, strict=True):
            assert list(scores) == layers
            for layer in layers:
                assert scores[layer] == pytest.approx(expected[layer], abs=1e-5)


@pytest.mark.parametrize("layer", [2, 12, 50])
def test_a_layer_without_a_head_names_the_range(layer: int) -> None:
    message = f"cutoff_layer={layer}: this checkpoint scores at layers 3 to 11"
    with pytest.raises(ValueError, match=message):
        Scorer(LAYERWISE, cutoff_layer=layer).score("a", ["b"])
    with Scorer(LAYERWISE) as scorer, pytest.raises(ValueError, match=message.replace("layer=", "layers=")):
        scorer.score_layers("a", ["b"], [3, layer])


def test_layers_of_a_model_that_has_none_are_an_error(encoder_dir: str) -> None:
    for directory in (encoder_dir, DECODER):
        with Scorer(directory) as scorer, pytest.raises(ValueError, match="no layerwise checkpoint"):
            scorer.score_layers("a", ["b"], [3])
    with pytest.raises(ValueError, match=r"cutoff_layer=3: .* no layerwise checkpoint"):
        Scorer(DECODER, cutoff_layer=3).score("a", ["b"])
    with Scorer(LAYERWISE) as scorer, pytest.raises(ValueError, match="name at least one"):
        scorer.score_layers("a", ["b"], [])
    assert Scorer("/no/such/model").score_layers("a", [], [3, 8]) == {3: [], 8: []}


@pytest.mark.parametrize("name", ["Gemma", "Gemma2"])
def test_gemma_is_not_run_in_float16(name: str, causal_dirs: dict[str, str]) -> None:
    """Its hidden states overflow to NaN there, as users of other libraries found out."""
    with pytest.raises(ValueError, match=r"dtype='float16': Gemma.*NaN; use 'bfloat16' or 'float32'"):
        Scorer(causal_dirs[name], dtype="float16").score("a", ["b"])


def test_other_language_models_run_in_float16(causal_dirs: dict[str, str]) -> None:
    with Scorer(causal_dirs["Llama"], dtype="float16") as scorer:
        assert len(scorer.score("a", ["b"])) == 1


@pytest.mark.parametrize("directory", [DECODER, LAYERWISE])
def test_a_missing_head_or_layer_is_an_error(directory: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(directory, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    gone = "lm_head.0.linear_head.weight" if directory == LAYERWISE else "model.layers.1.mlp.up_proj.weight"
    del weights[gone]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {gone}"):
        Scorer(str(model)).score("a", ["b"])


def test_an_unknown_kind_of_head_is_an_error(tmp_path: Path) -> None:
    model = Path(shutil.copytree(LAYERWISE, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"head_type": "spiral"}))
    with pytest.raises(ValueError, match=r"head_type='spiral' .* not one of simple, complex, raw"):
        Scorer(str(model)).score("a", ["b"])


def test_code_in_the_checkpoint_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    """AutoTokenizer asks on the terminal whether to run the code of a repository whose config has an `auto_map`."""
    model = Path(shutil.copytree(LAYERWISE, tmp_path / "model"))
    for name in ("configuration_minicpm_reranker.py", "modeling_minicpm_reranker.py"):
        (model / name).write_text("raise SystemExit('code of the checkpoint was run')\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    program = f"from bge_rerank_plugins import Scorer; print(len(Scorer({str(model)!r}).score('a', ['b'])))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    weights = load_file(DATA / "layerwise" / "model.safetensors")
    model = Path(shutil.copytree(LAYERWISE, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for i, part in enumerate([names[::2], names[1::2]], start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, model / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(w.nbytes for w in weights.values())
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    with Scorer(str(model), cutoff_layer=7) as sharded, Scorer(LAYERWISE, cutoff_layer=7) as whole:
        assert sharded.score("panda", ["hi", "a bear"]) == pytest.approx(whole.score("panda", ["hi", "a bear"]))


@pytest.mark.parametrize("model", [DECODER, LAYERWISE], ids=["decoder", "layerwise"])
def test_a_passage_without_a_token_of_its_own_does_not_get_its_neighbours_score(model: str, tmp_path: Path) -> None:
    """A tokenizer may drop the separator; then nothing followed the shared query, and the row before was read."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    said = json.loads((folder / "tokenizer.json").read_text())
    said["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    passages = ["a bear", "", "zebra", "\n"]
    with Scorer(str(folder), prompt="", passage_instruction="") as scorer:
        alone = [scorer.score("panda", [passage])[0] for passage in passages]
        assert alone[0] != pytest.approx(alone[1], abs=1e-3)
        assert scorer.score("panda", passages) == pytest.approx(alone, abs=1e-4)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with Scorer(str(folder), prompt="", query_instruction="", passage_instruction="") as scorer:
        assert len(scorer.score("", ["a"])) == 1
        with pytest.raises(ValueError, match=r"^pair 1: query, passage and prompt have no token"):
            scorer.score("", ["a", ""])


def test_a_lora_adapter_on_a_decoder_is_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = {"task_type": TaskType.CAUSAL_LM, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(DECODER), LoraConfig(r=4, init_lora_weights=False, **options)
    )
    adapted.save_pretrained(tmp_path)
    reference = DecoderReference(DECODER, 1024)
    plain = reference.score("panda", "hi")
    reference.model = PeftModel.from_pretrained(reference.model, tmp_path).eval()
    with Scorer(DECODER, peft_path=str(tmp_path)) as scorer:
        assert scorer.score("panda", ["hi"]) == pytest.approx([reference.score("panda", "hi")], abs=1e-4)
        assert scorer.score("panda", ["hi"]) != pytest.approx([plain], abs=1e-2)


def test_an_adapter_on_layers_above_the_cutoff_alone_changes_nothing_below(tmp_path: Path) -> None:
    """peft found none of its layers, and the adapter was said not to fit."""
    from peft import LoraConfig, get_peft_model

    from bge_rerank_plugins.core.layerwise import LayerwiseModel, granite_config

    model = LayerwiseModel.from_pretrained(
        LAYERWISE, config=granite_config(json.loads((DATA / "layerwise" / "config.json").read_text()), 11)
    )
    options = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]}
    get_peft_model(model, LoraConfig(layers_to_transform=[8, 9], **options)).save_pretrained(tmp_path)
    adapted = {"peft_path": str(tmp_path)}
    with (
        Scorer(LAYERWISE, cutoff_layer=5, **adapted) as low,
        Scorer(LAYERWISE, cutoff_layer=11, **adapted) as high,
        Scorer(LAYERWISE, cutoff_layer=11) as plain,
    ):
        assert low.score("panda", ["hi"]) == pytest.approx(plain.score_layers("panda", ["hi"], [5])[5], abs=1e-5)
        assert high.score("panda", ["hi"]) != pytest.approx(plain.score("panda", ["hi"]), abs=1e-3)
        assert low.score_layers("panda", ["hi"], [11])[11] == pytest.approx(high.score("panda", ["hi"]), abs=1e-5)
    with pytest.raises(ValueError, match="does not fit"):  # a model that has no such layers
        Scorer(DECODER, **adapted).score("panda", ["hi"])


@pytest.mark.parametrize(("cutoff_layer", "task_type"), [(5, "CAUSAL_LM"), (11, None)])
def test_a_lora_adapter_on_a_layerwise_model_is_merged(
    tmp_path: Path, cutoff_layer: int, task_type: str | None
) -> None:
    """As FlagEmbedding saves it: LoRA on the attention, the heads whole; with layers above the cutoff, too."""
    from peft import LoraConfig, get_peft_model

    from bge_rerank_plugins.core.layerwise import LayerwiseModel, granite_config

    torch.manual_seed(0)
    model = LayerwiseModel.from_pretrained(
        LAYERWISE, config=granite_config(json.loads((DATA / "layerwise" / "config.json").read_text()), 11)
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            init_lora_weights=False,
            target_modules=targets,
            modules_to_save=["linear_head"],
            task_type=task_type,
        ),
    )
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    reference = LayerwiseReference(LAYERWISE, 1024)
    reference.weights = {name: tensor.detach() for name, tensor in merged.state_dict().items()}
    with Scorer(LAYERWISE, peft_path=str(tmp_path / "adapter"), cutoff_layer=cutoff_layer) as scorer:
        expected = reference.scores("panda", "hi")[cutoff_layer]
        assert scorer.score("panda", ["hi"]) == pytest.approx([expected], abs=1e-4)
        assert scorer.score_layers("panda", ["hi"], [7])[7] == pytest.approx(
            [reference.scores("panda", "hi")[7]], abs=1e-4
        )

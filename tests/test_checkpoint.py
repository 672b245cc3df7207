"""Checkpoints that cannot be used are refused with the reason; none is scored wrongly in silence."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, with_a_token_more
from hub import Hub, put_into_cache
from transformers import PreTrainedTokenizerFast

from bge_rerank_plugins import RerankSettings, Scorer
from bge_rerank_plugins.core import tokenizer
from bge_rerank_plugins.core.checkpoint import Checkpoint
from bge_rerank_plugins.core.prompt import PROMPT
from bge_rerank_plugins.export import export_onnx
from bge_rerank_plugins.finetune import FinetuneSettings
from bge_rerank_plugins.finetune.models import trainee_of
from bge_rerank_plugins.onnx import OnnxScorer


@pytest.fixture
def copied(encoder_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_dir, tmp_path / "model"))


NORMALIZER = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}


def refused(model: object) -> str:
    with pytest.raises(ValueError, match="model=") as caught:
        Scorer(str(model)).score("a", ["b"])
    assert repr(str(model)) in str(caught.value)
    return str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nothing")


def test_a_hub_id_that_cannot_be_had_offline() -> None:
    assert "cannot be read" in refused("nobody/no-such-model")


def test_what_may_only_be_here_is_not_asked_for_on_the_hub(encoder_dir: str, tmp_path: Path) -> None:
    """Without a network transformers asked half a minute long for an adapter, and peft failed at asking for its weights."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_dir)
    lora(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    put_into_cache(tmp_path / "cache", "some-org/model", Path(encoder_dir))
    put_into_cache(tmp_path / "cache", "some-org/adapter", tmp_path / "adapter")
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True, "peft_path": "some-org/adapter"}
    code = f"from bge_rerank_plugins import Scorer\nprint(Scorer('some-org/model', **{options}).score('panda', ['a bear']))"
    with Hub() as hub:
        ran = hub.run(code, tmp_path / "home")

    assert ran.returncode == 0, ran.stderr
    assert [path for path, _ in hub.asked if "some-org" in path] == []
    with Scorer(encoder_dir, peft_path=str(tmp_path / "adapter")) as scorer:
        assert json.loads(ran.stdout) == pytest.approx(scorer.score("panda", ["a bear"]), abs=1e-5)


def test_all_files_are_of_the_commit_that_was_found_first(encoder_dir: str, copied: Path, tmp_path: Path) -> None:
    """Each file came from what main was by then: one version's tokenizer before the next one's weights.

    And what is in the cache is not asked for again: without a network a load took the retries of every file, three minutes.
    """
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_dir)
    lora(model, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    (copied / "tokenizer.json").write_text("{}")
    repositories = {
        "some-org/model": [Path(encoder_dir), copied],
        "some-org/adapter": [tmp_path / "adapter", tmp_path / "empty"],
    }
    options = {"cache_dir": str(tmp_path / "cache"), "revision": "main", "peft_path": "some-org/adapter"}
    code = f"from bge_rerank_plugins import Scorer\nprint(Scorer('some-org/model', **{options}).score('panda', ['a bear']))"
    asked = []
    for _ in range(2):
        with Hub(repositories) as hub:
            ran = hub.run(code, tmp_path / "home")
        asked.append([path for path, _ in hub.asked if path.startswith("/some-org/")])
        assert ran.returncode == 0, ran.stderr
        with Scorer(encoder_dir, peft_path=str(tmp_path / "adapter")) as scorer:
            assert json.loads(ran.stdout) == pytest.approx(scorer.score("panda", ["a bear"]), abs=1e-5)

    assert list(dict.fromkeys(path for path in asked[0] if "/main/" in path)) == FOUND_BY
    assert asked[1][:2] == FOUND_BY
    assert not [path for path in asked[1] if path.endswith(("tokenizer.json", "tokenizer_config.json", ".safetensors"))]


def test_workers_of_one_scorer_load_the_same_commit(encoder_dir: str, copied: Path, tmp_path: Path) -> None:
    """Each looked it up for itself, and one pair had two scores where main moved meanwhile."""
    shutil.rmtree(copied)
    options = {"cache_dir": str(tmp_path / "cache"), "device": ["cpu", "cpu"]}
    code = f"from bge_rerank_plugins import Scorer\nprint(Scorer('some-org/model', **{options}).score('panda', ['a bear']))"
    with Hub({"some-org/model": [Path(encoder_dir), copied]}) as hub:
        ran = hub.run(code, tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
    assert {path for path, _ in hub.asked if "/main/" in path} == set(FOUND_BY[:1])


QUICK = "import time\ntime.sleep = lambda seconds: None  # between the hub's retries\n"


@pytest.mark.parametrize("scorer", ["Scorer", "onnx.OnnxScorer"])
@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("tokenizer_config.json", 500, "tokenizer_config.json cannot be had: "),
        ("config.json", 503, "config.json"),
        ("config.json", 0, "config.json cannot be had: "),
    ],
    ids=str,
)
def test_a_file_that_the_hub_fails_to_give_is_not_taken_for_one_that_is_not_there(
    name: str, status: int, told: str, scorer: str, encoder_dir: str, tmp_path: Path
) -> None:
    """Texts were cut on the other side, and a connection that broke ended in an error of an HTTP library."""
    code = (
        f"{QUICK}import bge_rerank_plugins.onnx as onnx\nfrom bge_rerank_plugins import Scorer\n"
        f"try:\n    {scorer}('some-org/model', cache_dir={str(tmp_path / 'cache')!r}, device='cpu').score('a', ['b'])\n"
        "except ValueError as error:\n    print(error)"
    )
    with Hub({"some-org/model": [Path(encoder_dir)]}, {name: status}) as hub:
        ran = hub.run(code, tmp_path / "home")
    assert ran.stdout.startswith("model='some-org/model': "), ran.stderr
    assert told in ran.stdout


@pytest.mark.parametrize("status", [403, 503])
def test_a_model_that_is_wholly_in_the_cache_is_scored_while_the_hub_is_down(
    status: int, encoder_dir: str, tmp_path: Path
) -> None:
    """Nothing in the cache says which files the model never had, where something else than this package put it there."""
    put_into_cache(tmp_path / "cache", "some-org/model", Path(encoder_dir))
    options = {"cache_dir": str(tmp_path / "cache")}
    code = (
        f"{QUICK}from bge_rerank_plugins import Scorer\nprint(Scorer('some-org/model', **{options}).score('a', ['b']))"
    )
    with Hub(failing={"*": status}) as hub:
        ran = hub.run(code, tmp_path / "home")
    with Scorer(encoder_dir) as scorer:
        assert json.loads(ran.stdout) == pytest.approx(scorer.score("a", ["b"]), abs=1e-5), ran.stderr


FOUND_BY = ["/some-org/model/resolve/main/config.json", "/some-org/adapter/resolve/main/adapter_config.json"]


@pytest.mark.parametrize("lacks", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_the_hub_that_is_not_here_whole_is_refused(lacks: str, encoder_dir: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in {"adapter_config.json", "adapter_model.safetensors"} - {lacks}:
        (tmp_path / "adapter" / name).write_text("{}")
    put_into_cache(tmp_path / "cache", "some-org/adapter", tmp_path / "adapter")
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    with pytest.raises(
        ValueError, match=r"peft_path='some-org/adapter': no LoRA adapter .* no adapter_model.safetensors"
    ):
        Scorer(encoder_dir, peft_path="some-org/adapter", **options).score("a", ["b"])  # type: ignore[arg-type]


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)


def test_a_config_that_is_not_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    assert "cannot be read" in refused(copied)


def test_an_unknown_architecture_lists_those_that_are_supported(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"architectures": ["T5ForConditionalGeneration"]}))
    message = refused(copied)
    assert "T5ForConditionalGeneration, which is not supported" in message
    assert "XLMRobertaForSequenceClassification" in message


def test_a_config_that_names_no_architecture(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["architectures"]
    (copied / "config.json").write_text(json.dumps(config))
    assert "not supported" in refused(copied)


def test_weights_that_are_not_there(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "weights cannot be loaded" in refused(copied)


def test_a_pickle_is_never_opened(copied: Path) -> None:
    """A pickle runs code when it is read."""
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    assert "weights cannot be loaded: its pytorch_model.bin is a pickle, which is never opened" in refused(copied)


def test_weights_cut_short(copied: Path) -> None:
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "weights cannot be loaded" in refused(copied)


def test_a_tokenizer_that_is_not_there(copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    assert "tokenizer" in refused(copied)


def test_a_tokenizer_that_cannot_be_read(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be loaded" in refused(copied)


def test_an_adapter_that_is_not_there(encoder_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"peft_path=.*no LoRA adapter"):
        Scorer(encoder_dir, peft_path=str(tmp_path)).score("a", ["b"])


def test_a_load_that_failed_is_tried_again(copied: Path) -> None:
    """A download that broke off must not spoil the scorer for good."""
    scorer = Scorer(str(copied))
    (copied / "config.json").rename(copied / "elsewhere.json")
    with pytest.raises(ValueError, match=r"config\.json"):
        scorer.score("a", ["b"])
    (copied / "elsewhere.json").rename(copied / "config.json")
    assert len(scorer.score("a", ["b"])) == 1
    scorer.close()


def test_loading_prints_nothing(encoder_dir: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Scorer(encoder_dir, query_instruction="unlike any other scorer's ") as scorer:
        scorer.score("a", ["b"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("weights", ["whole", "cut short"])
def test_loading_leaves_transformers_as_loud_as_the_program_wants_it(bars: bool, weights: str, copied: Path) -> None:
    from transformers.utils import logging as loud

    if weights == "cut short":
        (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:5000])
    before = loud.get_verbosity(), loud.is_progress_bar_enabled()

    def set_bars(shown: bool) -> None:
        (loud.enable_progress_bar if shown else loud.disable_progress_bar)()  # type: ignore[no-untyped-call]

    try:
        loud.set_verbosity_info()
        set_bars(bars)
        with Scorer(str(copied)) as scorer, suppress(ValueError):
            scorer.warmup()
        assert (loud.get_verbosity(), loud.is_progress_bar_enabled()) == (loud.INFO, bars)
    finally:
        loud.set_verbosity(before[0])
        set_bars(before[1])


def test_models_may_be_loaded_at_the_same_time() -> None:
    """Transformers is not safe for that: it replaces methods of its classes while it loads."""
    from concurrent.futures import ThreadPoolExecutor

    from conftest import DATA
    from transformers import PreTrainedModel

    before = PreTrainedModel.tie_weights

    def load(number: int) -> int:
        directory = str(DATA / ("encoder", "decoder", "layerwise")[number % 3])
        with Scorer(directory, query_instruction=f"{number} ") as scorer:
            return len(scorer.score("a", ["b"]))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(load, range(48))) == [1] * 48
    assert PreTrainedModel.tie_weights is before


def lora(kind: Any, folder: Path, **options: Any) -> Any:
    """A LoRA adapter that changes what it is put on, saved."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(kind, LoraConfig(r=4, init_lora_weights=False, **options))
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_beside_the_weights_is_refused(copied: Path) -> None:
    """transformers loads it unasked, and then reports the weights that the adapter lacks, not those that the model lacks."""
    from transformers import AutoModelForSequenceClassification

    lora(AutoModelForSequenceClassification.from_pretrained(copied), copied, target_modules=["query", "value"])
    assert "a LoRA adapter (adapter_config.json) lies beside the weights" in refused(copied)


@pytest.mark.parametrize("fault", ["prefix", "layer", "base"])
def test_an_adapter_whose_weights_are_not_the_models_is_refused(copied: Path, tmp_path: Path, fault: str) -> None:
    """peft only warns, and the scores were those of the base model, or random."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForSequenceClassification

    adapter = tmp_path / "adapter"
    kind = AutoModel if fault == "prefix" else AutoModelForSequenceClassification
    lora(kind.from_pretrained(copied), adapter, target_modules=["query", "value"])
    if fault == "layer":
        weights = load_file(adapter / "adapter_model.safetensors")
        save_file(
            {name: tensor for name, tensor in weights.items() if ".layer.1." not in name},
            adapter / "adapter_model.safetensors",
        )
    base = str(copied) if fault != "base" else str(DATA / "decoder")
    with pytest.raises(ValueError, match=r"peft_path=.*does not fit model="), Scorer(base, peft_path=str(adapter)) as s:
        s.score("a", ["b"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of peft, where the adapter is made
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:`ensure_weight_tying` is set")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [*range(1, 1500)]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_on_the_words_of_a_model_whose_words_are_tied_changes_the_side_that_it_is_for(
    options: dict[str, Any], causal_dirs: dict[str, str], tmp_path: Path
) -> None:
    """Input and output words are one tensor: merging changed both, or one side of an adapter for both."""
    from transformers import AutoModelForCausalLM

    model = causal_dirs["Gemma"]
    torch.manual_seed(0)
    adapted = lora(AutoModelForCausalLM.from_pretrained(model), tmp_path, task_type="CAUSAL_LM", **options).eval()
    assert adapted.config.tie_word_embeddings
    with Scorer(model, peft_path=str(tmp_path)) as scorer:
        (sequence,) = scorer._lease.loaded()[1].encode("panda", ["a bear"])
        answer = scorer._lease.loaded()[1]._prompt.answer_id  # type: ignore[attr-defined]
        with torch.inference_mode():
            want = float(adapted(torch.tensor([sequence.input_ids])).logits[0, -1, answer])
        assert scorer.score("panda", ["a bear"]) == pytest.approx([want], abs=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "config.json"),
        (None, "config.json"),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, "names no model_type"),
        ({"model_type": "xlm-roberta", "architectures": "NoSuchModel"}, "the architecture NoSuchModel, which"),
        ({"model_type": "minicpm", "architectures": ["LayerWiseMiniCPMForCausalLM"]}, "lacks head_type, head_multi"),
        ({"architectures": ["LayerWiseMiniCPMForCausalLM"], "head_type": "raw"}, "scale_depth, dim_model_base"),
    ],
)
def test_a_config_that_says_too_little_is_named(copied: Path, config: object, message: str) -> None:
    (copied / "config.json").write_text(json.dumps(config))
    assert message in refused(copied)


def changed(model: str | Path, folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """A copy of a checkpoint that says something else in one of its files."""
    shutil.copytree(model, folder)
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | changes))
    return folder


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("layerwise", {"start_layer": 40}, "start_layer=40 is above its 11 layers"),
        ("layerwise", {"start_layer": 0}, "start_layer=0 in its config.json, not 1 or more"),
        ("layerwise", {"num_attention_heads": "4"}, "num_attention_heads='4' in its config.json"),
        ("layerwise", {"quantization_config": {"quant_method": "fp8"}}, "quantised layerwise checkpoints"),
        ("encoder", {"is_decoder": True}, "is_decoder=True is not supported"),
        ("encoder", {"pad_token_id": None}, "names no pad_token_id, from which positions are counted"),
        ("encoder", {"max_position_embeddings": 2}, "leaves 0 positions for a pair"),
        ("encoder", {"max_position_embeddings": None}, "its config.json cannot be used"),
        (
            "encoder",
            {"vocab_size": 99},
            "word_embeddings.weight has the shape (1500, 48), and by config.json it has (99, 48)",
        ),
        ("layerwise", {"rope_scaling": "x"}, "rope_scaling='x' in its config.json: expected an object"),
        ("layerwise", {"attention_bias": None}, "its config.json cannot be used: "),
        ("layerwise", {"rms_norm_eps": 0}, "its config.json cannot be used: "),
        ("layerwise", {"scale_depth": "1.4"}, "its config.json cannot be used: unsupported operand"),
        (
            "layerwise",
            {"start_layer": 4},
            "has heads for layers 4 to 11; by that the heads in its files end at layer 12, and the layers at 11",
        ),
        (
            "layerwise",
            {"num_hidden_layers": 9},
            "has heads for layers 3 to 9; by that the heads in its files end at layer 11, and the layers at 11",
        ),
        ("encoder", {"num_hidden_layers": 0}, "num_hidden_layers=0 in its config.json, not 1 or more"),
        ("decoder", {"num_hidden_layers": -1}, "num_hidden_layers=-1 in its config.json, not 1 or more"),
        ("encoder", {"architectures": 5}, "architectures=5 in its config.json: expected a list of names"),
        ("decoder", {"architectures": [None]}, "architectures=[None] in its config.json: expected a list of names"),
        ("encoder", {"num_hidden_layers": 30}, "layer.10.attention.output.LayerNorm.bias, "),
        ("decoder", {"hidden_act": "tangent"}, "its weights cannot be loaded: 'tangent'"),
        ("decoder", {"max_position_embeddings": 50}, "leaves -5 positions for a pair"),
        ("decoder", {"is_causal": False}, "looks at what follows"),
        ("decoder", {"use_bidirectional_attention": True}, "looks at what follows"),
    ],
)
def test_a_config_that_asks_for_what_is_not_computed_is_refused(
    model: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Each gave other scores than the model's, or an error that did not name it."""
    assert message in refused(changed(DATA / model, tmp_path / "model", **changes))


def test_a_checkpoint_that_gives_tuples_scores_as_one_that_does_not(tmp_path: Path) -> None:
    """What came back had no names."""
    for model in ("encoder", "decoder"):
        with Scorer(str(changed(DATA / model, tmp_path / model, return_dict=False))) as scorer:
            scores = scorer.score("panda", ["a bear"])
        with Scorer(str(DATA / model)) as scorer:
            assert scorer.score("panda", ["a bear"]) == scores


def test_an_adapter_that_cannot_be_merged_is_refused(copied: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(copied)
    get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match=r"peft_path=.*peft_type='PROMPT_TUNING' cannot be merged"):
        Scorer(str(copied), peft_path=str(tmp_path / "p")).score("a", ["b"])


def test_an_adapter_that_repeats_layers_is_refused(tmp_path: Path) -> None:
    """Repeated layers share their weights, and peft added to them what belongs to every one of them: other scores."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    repeats = LoraConfig(task_type="CAUSAL_LM", layer_replication=[(0, 2), (1, 2)], target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(DATA / "decoder"), repeats).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft_path=.*: layer_replication=\[.*\] cannot be merged"):
        Scorer(str(DATA / "decoder"), peft_path=str(tmp_path)).score("a", ["b"])


def test_an_adapter_that_peft_cannot_merge_is_not_said_not_to_fit(copied: Path, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(copied)
    kind = IA3Config(task_type="SEQ_CLS", target_modules=["query", "value"], feedforward_modules=[])
    get_peft_model(model, kind).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match=r"peft_path=.*: peft cannot merge peft_type='IA3' into model="):
        Scorer(str(copied), peft_path=str(tmp_path / "p")).score("a", ["b"])


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 99.0}, {"rope_parameters": {"rope_theta": 99.0, "rope_type": "default"}}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_a_layerwise_config_names_its_positions_in_either_way(
    older: dict[str, Any], newer: dict[str, Any], tmp_path: Path
) -> None:
    """The newer one was not looked at."""
    scores = []
    for number, changes in enumerate([{}, older, newer]):
        with Scorer(str(changed(DATA / "layerwise", tmp_path / str(number), **changes))) as scorer:
            scores.append(scorer.score("panda", ["a bear that eats bamboo in the hills"]))
    assert scores[2] == pytest.approx(scores[1], abs=1e-5)
    assert scores[2] != pytest.approx(scores[0], abs=1e-2)


PASSAGES = ["a bear", "a bear that eats bamboo, and lives in the hills of Sichuan, far away from the sea"]


def test_a_pair_is_cut_on_the_side_that_the_tokenizer_says(tmp_path: Path) -> None:
    """It was cut on the right in any case."""
    folder = changed(DATA / "encoder", tmp_path / "model", "tokenizer_config.json", truncation_side="left")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with Scorer(str(folder), max_length=20) as scorer:
        sequences = scorer._lease.loaded()[1].encode("panda", PASSAGES)
    wanted = [tokenizer("panda", passage, truncation="only_second", max_length=20).input_ids for passage in PASSAGES]
    assert [sequence.input_ids for sequence in sequences] == wanted
    assert [sequence.truncated for sequence in sequences] == [False, True]


@pytest.mark.parametrize("query", ["panda", "what does the giant panda eat in the hills of Sichuan, and where"])
@pytest.mark.parametrize("model", ["decoder", "layerwise"])
def test_a_prompt_is_cut_on_the_side_that_the_tokenizer_says(model: str, query: str, tmp_path: Path) -> None:
    folder = changed(DATA / model, tmp_path / "model", "tokenizer_config.json", truncation_side="left")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def ids(text: str, **options: Any) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, **options).input_ids)

    with Scorer(str(folder), max_length=20) as scorer:
        sequences = scorer._lease.loaded()[1].encode(query, PASSAGES)
        together = scorer.score(query, PASSAGES)
        assert together == pytest.approx([scorer.score(query, [passage])[0] for passage in PASSAGES], abs=1e-4)
    head = [tokenizer.bos_token_id, *ids("A: " + query, truncation=True, max_length=15)]
    tail = [*ids("\n"), *ids(PROMPT)]
    wanted = [[*head, *[*ids("\n"), *ids("B: " + passage)][len(head) - 20 :], *tail] for passage in PASSAGES]
    assert [sequence.input_ids for sequence in sequences] == wanted


def test_tokenizer_files_that_disagree_are_refused(classifier_dirs: dict[str, str], tmp_path: Path) -> None:
    """transformers takes one of them, by its version and the class."""
    folder = changed(
        classifier_dirs["bert"], tmp_path / "a", "tokenizer.json", normalizer={"type": "BertNormalizer", **NORMALIZER}
    )
    with Scorer(str(folder)) as scorer:
        assert len(scorer.score("a", ["b"])) == 1
    contradictions = {
        "do_lower_case": (False, True),
        "strip_accents": (False, None),
        "tokenize_chinese_chars": (False, True),
    }
    for option, (said, done) in contradictions.items():
        other = changed(folder, tmp_path / option, "tokenizer_config.json", **{option: said})
        message = f"{option}={said} in tokenizer_config.json, and {done} in tokenizer.json"
        assert message in refused(other)
        with pytest.raises(ValueError, match=message), OnnxScorer(str(other)) as scorer:
            scorer.score("a", ["b"])


@pytest.mark.parametrize("said", [None, True])
def test_tokenizer_files_that_say_the_same_in_other_words_are_taken(
    said: object, classifier_dirs: dict[str, str], tmp_path: Path
) -> None:
    """Accents go with upper case, unless something is said of them."""
    folder = changed(
        classifier_dirs["bert"], tmp_path / "a", "tokenizer.json", normalizer={"type": "BertNormalizer", **NORMALIZER}
    )
    folder = changed(folder, tmp_path / "b", "tokenizer_config.json", strip_accents=said, do_lower_case=True)
    with Scorer(str(folder)) as scorer:
        assert len(scorer.score("a", ["b"])) == 1


def test_a_template_without_special_tokens_is_refused(tmp_path: Path) -> None:
    """A cross-encoder's score is read at the first of them."""
    folder = changed(DATA / "encoder", tmp_path / "model", "tokenizer.json", post_processor=None)
    with pytest.raises(ValueError, match="puts no special token first"), Scorer(str(folder)) as scorer:
        scorer.score("a", ["b"])


@pytest.mark.parametrize("said", [{}, {"bos_token": None}])
def test_a_first_token_that_only_the_tokenizers_class_knows_must_be_named(
    said: dict[str, None], tmp_path: Path
) -> None:
    """transformers would put one there, and texts began without."""
    folder = Path(shutil.copytree(DATA / "decoder", tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "bos_token"}
    path.write_text(json.dumps(config | {"tokenizer_class": "GemmaTokenizer"} | said))
    if said:
        with Scorer(str(folder)) as scorer:
            assert len(scorer.score("a", ["b"])) == 1
    else:
        assert "names no bos_token, and that of GemmaTokenizer is '<bos>'" in refused(folder)


@pytest.mark.parametrize("token", ["<bos>", {"content": "<bos>", "lstrip": False}])
def test_a_first_token_of_the_tokenizers_class_that_the_special_tokens_map_confirms_is_followed(
    token: object, tmp_path: Path
) -> None:
    """tokenizer.json is read without that class, and texts would begin without it."""
    folder = changed(DATA / "decoder", tmp_path / "model", "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    assert said.pop("bos_token") == "<bos>"
    path.write_text(json.dumps(said))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": token}))
    with Scorer(str(DATA / "decoder")) as whole, Scorer(str(folder)) as scorer:
        assert scorer.score("panda", ["a bear"]) == whole.score("panda", ["a bear"])


def test_a_vocabulary_is_read_by_the_class_that_is_named(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For Mistral, transformers 5 takes another by itself, whose tokens of the same file lack the space before a text."""
    from transformers import AutoTokenizer, LlamaTokenizer

    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: name)
    for named, kind in (
        ("LlamaTokenizerFast", LlamaTokenizer),
        ("LlamaTokenizer", LlamaTokenizer),
        ("TheirTokenizer", AutoTokenizer),
        ("utils", AutoTokenizer),
        (None, AutoTokenizer),
    ):
        (copied / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
        assert tokenizer._reads_vocabulary(Checkpoint(str(copied))) is kind
    (copied / "tokenizer_config.json").write_text("{}")
    for model_type, kind in (("llama", LlamaTokenizer), ("mistral", LlamaTokenizer), ("gemma", AutoTokenizer)):
        folder = changed(copied, tmp_path / model_type, model_type=model_type)
        assert tokenizer._reads_vocabulary(Checkpoint(str(folder))) is kind
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install sentencepiece protobuf"):
        Scorer(str(copied)).score("a", ["b"])


def test_an_adapter_that_is_given_as_the_model_is_named_as_such(copied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    lora(AutoModelForSequenceClassification.from_pretrained(copied), tmp_path / "lora", target_modules=["query"])
    assert "a LoRA adapter, not a checkpoint; give it as peft_path" in refused(tmp_path / "lora")


def test_a_roberta_that_knows_two_segments_is_told_them(classifier_dirs: dict[str, str], tmp_path: Path) -> None:
    """They were left out, whatever its tokenizer said."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier_dirs["roberta"])
    torch.manual_seed(0)
    model.roberta.embeddings.token_type_embeddings = torch.nn.Embedding(2, model.config.hidden_size)
    model.config.type_vocab_size = 2
    model.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(classifier_dirs["roberta"])
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", start), ("</s>", end)]
    )
    tokenizer.save_pretrained(tmp_path)
    path, names = tmp_path / "tokenizer_config.json", ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    inputs = PreTrainedTokenizerFast.from_pretrained(tmp_path)("panda", "a bear", return_tensors="pt")
    assert inputs["token_type_ids"].any()
    with torch.inference_mode(), Scorer(str(tmp_path)) as scorer:
        assert scorer.score("panda", ["a bear"]) == pytest.approx([model.eval()(**inputs).logits.item()], abs=1e-5)


def test_a_classifying_adapter_on_a_language_model_is_refused(causal_dirs: dict[str, str], tmp_path: Path) -> None:
    """The head that it had trained was left out, and the answer was the language model's."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(causal_dirs["Llama"], num_labels=1)
    lora(model, tmp_path, task_type="SEQ_CLS", target_modules=["q_proj"])
    with (
        pytest.raises(ValueError, match=r"for sequence classification, and model=.* is LlamaForCausalLM; supported"),
        Scorer(causal_dirs["Llama"], peft_path=str(tmp_path)) as scorer,
    ):
        scorer.score("a", ["b"])


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("Mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("Llama", {"final_logit_softcapping": 3.0}),
    ],
)
def test_a_config_is_read_as_transformers_reads_it(
    model: str, changes: dict[str, Any], causal_dirs: dict[str, str], tmp_path: Path
) -> None:
    """A Mistral with layers of two kinds is one of another class; what a model does not know it does not do."""
    from transformers import AutoModelForCausalLM

    folder = changed(causal_dirs[model], tmp_path / "model", **changes)
    passage = "a bear that eats bamboo, and lives in the hills of Sichuan, " * 4
    with Scorer(str(folder)) as scorer:
        (sequence,) = scorer._lease.loaded()[1].encode("panda", [passage])
        answer = scorer._lease.loaded()[1]._prompt.answer_id  # type: ignore[attr-defined]
        reference = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            want = float(reference(torch.tensor([sequence.input_ids])).logits[0, -1, answer])
        assert scorer.score("panda", [passage]) == pytest.approx([want], abs=1e-4)


def test_a_language_model_must_say_what_a_text_begins_with(tmp_path: Path) -> None:
    """Without the file the first token was left out in silence."""
    shutil.copytree(DATA / "decoder", tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    (tmp_path / "model" / "special_tokens_map.json").unlink(missing_ok=True)
    assert "no tokenizer_config.json" in refused(tmp_path / "model")


@pytest.mark.parametrize(
    ("model", "name", "kind"), [("Llama", "rope_parameters", "rope_type"), ("layerwise", "rope_scaling", "type")]
)
def test_positions_that_depend_on_the_company_are_refused(
    model: str, name: str, kind: str, causal_dirs: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(causal_dirs.get(model, DATA / model), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    rope = {kind: "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}
    config.pop("rope_scaling", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {name: rope}))
    assert "longrope" in refused(tmp_path / "model")
    settings = FinetuneSettings(model=str(tmp_path / "model"), data="-", output_dir="-")
    with pytest.raises(ValueError, match="longrope"):
        trainee_of(settings)


def test_segments_are_left_out_where_the_tokenizer_says_so(classifier_dirs: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    shutil.copytree(classifier_dirs["bert"], tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "model")("panda", "a bear", return_tensors="pt")
    assert "token_type_ids" not in inputs
    with torch.inference_mode(), Scorer(str(tmp_path / "model")) as scorer:
        assert scorer.score("panda", ["a bear"]) == pytest.approx([model(**inputs).logits.item()], abs=1e-5)
    export_onnx(RerankSettings(model=str(tmp_path / "model")), tmp_path / "graph")
    with torch.inference_mode(), OnnxScorer(str(tmp_path / "graph")) as graph:  # which was sent them all the same
        assert graph.score("panda", ["a bear"]) == pytest.approx([model(**inputs).logits.item()], abs=1e-4)


def test_a_revision_of_a_local_directory_is_said_to_change_nothing(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Scorer(str(copied), revision="v2") as scorer:
        assert len(scorer.score("a", ["b"])) == 1
    assert caplog.messages == [f"revision='v2' is not looked at: model={str(copied)!r} is a local directory"]


@pytest.mark.parametrize("model", ["encoder", "decoder", "layerwise"])
def test_a_token_that_the_weights_do_not_know_fails_its_own_request_alone(model: str, tmp_path: Path) -> None:
    """Looking it up failed all that was in the pack, and on CUDA it would have ended the process's use of the device."""
    with Scorer(str(with_a_token_more(DATA / model, tmp_path / "model"))) as scorer:
        scores = scorer.score("panda", ["a bear"])
        for query, passages in (("panda", ["a bear", "a <weird> bear"]), ("<weird>", ["a bear"])):
            with pytest.raises(ValueError, match=r"'<weird>' cannot be scored: it is token 150\d of the tokenizer"):
                scorer.score(query, passages)
        assert scorer.score("panda", ["a bear"]) == scores
        long = "a bear " * 1500
        assert scorer.score("panda", [long + "<weird>"]) == scorer.score("panda", [long])  # where it is cut off


@pytest.mark.parametrize(
    ("model", "token"), [("encoder", "<s>"), ("decoder", "whether the"), ("layerwise", "whether the")]
)
def test_a_token_of_every_pair_that_the_weights_do_not_know_is_found_at_loading(
    model: str, token: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / model, folder)
    said = json.loads((folder / "tokenizer.json").read_text())
    if token == "<s>":
        for special in said["post_processor"]["special_tokens"].values():
            special["ids"] = [1700]
    else:
        said["added_tokens"].append(said["added_tokens"][0] | {"id": 1502, "content": token, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="cannot be scored"), Scorer(str(folder)) as scorer:
        scorer.warmup()

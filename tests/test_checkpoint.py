"""Checkpoints that cannot be used are refused with the reason; none is scored wrongly in silence."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA

from bge_rerank_plugins import Scorer
from bge_rerank_plugins.finetune import FinetuneSettings
from bge_rerank_plugins.finetune.models import trainee_of


@pytest.fixture
def copied(encoder_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_dir, tmp_path / "model"))


def refused(model: object) -> str:
    with pytest.raises(ValueError, match="model=") as caught:
        Scorer(str(model)).score("a", ["b"])
    assert repr(str(model)) in str(caught.value)
    return str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nothing")


def test_a_hub_id_that_cannot_be_had_offline() -> None:
    assert "cannot be read" in refused("nobody/no-such-model")


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
    assert "weights cannot be loaded" in refused(copied)


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
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_the_words_of_a_model_whose_words_are_tied_changes_one_side(
    target: str, causal_dirs: dict[str, str], tmp_path: Path
) -> None:
    """Input and output words are one tensor, and merging changed both."""
    from transformers import AutoModelForCausalLM

    model = causal_dirs["Gemma"]
    torch.manual_seed(0)
    adapted = lora(
        AutoModelForCausalLM.from_pretrained(model), tmp_path, task_type="CAUSAL_LM", target_modules=["q_proj", target]
    ).eval()
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
    ],
)
def test_a_config_that_says_too_little_is_named(copied: Path, config: object, message: str) -> None:
    (copied / "config.json").write_text(json.dumps(config))
    assert message in refused(copied)


def test_layers_that_begin_above_the_last_are_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "layerwise", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"start_layer": 40}))
    assert "start_layer=40 is above its 11 layers" in refused(tmp_path / "model")


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


def test_a_revision_of_a_local_directory_is_said_to_change_nothing(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Scorer(str(copied), revision="v2") as scorer:
        assert len(scorer.score("a", ["b"])) == 1
    assert caplog.messages == [f"revision='v2' is not looked at: model={str(copied)!r} is a local directory"]
